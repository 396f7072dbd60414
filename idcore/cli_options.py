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

# Of the commands that draw.
IdScale = Annotated[
    list[float] | None, typer.Option(help="Strength of the identity, default 1, 0 leaves it out; or one per --id.")
]
Guidance = Annotated[
    float | None,
    typer.Option(help="Classifier-free guidance, default 1.2 (tiny-sd: 1); 1 leaves it out.", show_default=False),
]
AutoSystem = Annotated[str, typer.Option(help='"auto": what --weights holds; its name; or a fetched recipe.')]
Preset = Annotated[
    str | None, typer.Option(help='PuLID: "fidelity", "style", "v1.1" or "plain"; default: its version\'s.')
]
Styles = Annotated[
    list[Path] | None, typer.Option(help="LoRA file, or a result of `idcore train styleforge`; may be repeated.")
]
StyleScale = Annotated[list[float] | None, typer.Option(help="Strength of --style, default 1; or one each.")]
Background = Annotated[
    str | None, typer.Option(help='What is read outside of the people, e.g. "a photo of [W] style, a garden".')
]
PersonRegion = Annotated[
    str | None, typer.Option(help='With --background: where it is not read; "center", or a picture, white there.')
]
PersonMargin = Annotated[
    float, typer.Option(help="Share of the longer side by which that is grown, at soft edges; 0 to 0.25.")
]
Masks = Annotated[list[Path] | None, typer.Option(help="Where an identity acts, white; one per --id.")]
Layout = Annotated[str | None, typer.Option(help='Who acts where: "left, right", or columns "1 1".')]
Sampler = Annotated[
    str, typer.Option(help='SDXL: "lightning", "lightning-euler", "karras-2m", "karras-sde", "own" or "auto".')
]
Quantize = Annotated[str | None, typer.Option(help='SDXL: "int8" or "fp8" weights of the UNet (torchao).')]
Offload = Annotated[str | None, typer.Option(help='SDXL on a GPU: "model" or "sequential".')]
UnetWeights = Annotated[
    Path | None, typer.Option(help="SDXL: one file with a whole UNet, e.g. sdxl_lightning_4step_unet.safetensors.")
]
OneFileConfig = Annotated[
    Path | None, typer.Option(help="With one checkpoint file as --base: a folder with its configurations.")
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
