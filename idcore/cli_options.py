"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

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

# Of the training commands.
TrainOut = Annotated[Path | None, typer.Option("--out", help="Folder of the run; model/ in it is the result.")]
TrainConfig = Annotated[Path | None, typer.Option("--config", help="Settings: YAML or JSON. See --print-config.")]
TrainBase = Annotated[
    str | None,
    typer.Option("--base", help='"tiny-sd" (embedded), or a folder with an SD 1.x, SD 2.x or SDXL pipeline.'),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out where it stopped.")]
Change = Annotated[
    list[str] | None, typer.Option("--set", help="A setting over the file's: loop.lr=1e-4. May be repeated.")
]
AllowChange = Annotated[
    list[str] | None,
    typer.Option("--allow-change", help="A setting that may differ from the resumed run's: lr, data, ..."),
]
PrintConfig = Annotated[
    bool, typer.Option("--print-config", help="Print all settings with their sources, as YAML, and stop.")
]


def one_or_each(given: Sequence[Any] | None, default: Any) -> Any:
    """The value of an option that may be repeated: one for all, or one for each."""
    return default if not given else given[0] if len(given) == 1 else tuple(given)


def arguments_of(
    out: Path | None, config: Path | None, base: str | None, resume: bool, change: list[str] | None,
    allow_change: list[str] | None, print_config: bool,
) -> Any:  # fmt: skip
    """`training.commands.TrainArguments` of the options that every `idcore train ...` has."""
    from .training.commands import TrainArguments

    return TrainArguments(out, config, base, resume, change or (), allow_change or (), print_config, say)


def say(text: str) -> None:
    """A line for standard error."""
    typer.echo(text, err=True)


def tell(lines: Iterable[str]) -> None:
    """Lines for standard output."""
    for line in lines:
        typer.echo(line)
