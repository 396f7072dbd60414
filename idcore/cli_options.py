"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[
    bool, typer.Option("--json", help="One JSON object on standard output; all else goes to standard error.")
]
Faces = Annotated[
    str, typer.Option(help='Face models: "embedded", or a folder in the layout of antelopev2 (SCRFD and ArcFace).')
]
Choose = Annotated[
    str, typer.Option(help='Which face of a photo: "largest", "center", "only" (refuse several), or a number from 0.')
]
System = Annotated[
    str,
    typer.Option(
        help='"tiny" (embedded); a fetched recipe ("pulid-v1.1"); or with --weights "pulid", "faceid", '
        '"dreamidentity", "auto".'
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(help="PuLID, FaceID, InstantID (any published layout), DreamIdentity or SeFi-IDE: safetensors."),
]
Vision = Annotated[
    Path | None,
    typer.Option(help="For photos. PuLID: EVA02-CLIP-L-336 weights; FaceID Plus: a folder with CLIP ViT-H/14."),
]
Parsing = Annotated[Path | None, typer.Option(help="PuLID: BiSeNet face parsing weights; without them it warns.")]

Retina = Annotated[
    Path | None, typer.Option("--retinaface", help="PuLID: RetinaFace weights, landmarks of the published chain.")
]
