"""`idcore train ...`: the embedded models, and the systems."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import cli_train_personal as personal
from .cli_options import (
    AllowChange,
    Change,
    PrintConfig,
    Resume,
    TrainBase,
    TrainConfig,
    TrainOut,
    arguments_of,
    say,
    tell,
)

app = typer.Typer(help="Train a system.", no_args_is_help=True)
app.command("textual-inversion")(personal.train_textual_inversion)
app.command("dreambooth")(personal.train_dreambooth)


@app.command("tiny")
def train_tiny(
    out: Annotated[Path, typer.Option(help="Folder of the checkpoints, the drawn people and the exported model.")],
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint in --out.")] = False,
    iterations: Annotated[int, typer.Option(min=1, help="Steps of the optimiser.")] = 10_000,
    batch: Annotated[int, typer.Option(min=1, help="Samples per worker and step.")] = 24,
    workers: Annotated[int, typer.Option(min=1, help="Processes, one CPU thread each.")] = 1,
    recogniser_from: Annotated[int, typer.Option(min=0, help="Step from which the identity loss counts.")] = 6_000,
    people: Annotated[int, typer.Option(min=500, help="Procedural people to draw, in 500s.")] = 30_000,
    seed: Annotated[int, typer.Option(min=0, help="Of data and weights.")] = 0,
) -> None:
    """Train the embedded model on procedural people that are drawn here; resumable."""
    from .workflows import train_tiny_model

    folder = train_tiny_model(
        out, resume=resume, iterations=iterations, batch=batch, workers=workers, recogniser_from=recogniser_from,
        shards=people // 500, seed=seed,
    )  # fmt: skip
    typer.echo(f"{folder}: use it with `idcore generate --base {folder}`", err=True)


@app.command("tiny-sd")
def train_tiny_sd(
    out: Annotated[
        Path | None, typer.Option(help="Folder of the checkpoints, the drawn people and the exported model.")
    ] = None,
    config: TrainConfig = None,
    resume: Resume = False,
    change: Change = None,
    allow_change: AllowChange = None,
    print_config: PrintConfig = False,
) -> None:
    """Train tiny-sd, the small text-to-image model of drawn people that other trainings start from; resumable."""
    from .training.tiny_sd.run import run_command

    tell(run_command(arguments_of(out, config, None, resume, change, allow_change, print_config)))


@app.command("pulid")
def train_pulid(
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run: stage1, stage2, stage3, and model, the result.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Prepared data of `idcore prepare`, or pictures with captions: prepared first.")
    ] = None,
    config: TrainConfig = None,
    stage: Annotated[str, typer.Option(help='1 (L_diff), 2 (+ L_id), 3 (+ L_align), "all", or such as "2,3".')] = "all",
    base: Annotated[
        str | None, typer.Option(help='"tiny" or "tiny-sd" (shipped, 64 pixels), or a folder with a pipeline.')
    ] = None,
    resume: Resume = False,
    change: Change = None,
    allow_change: AllowChange = None,
    print_config: PrintConfig = False,
) -> None:
    """Train PuLID (arXiv 2404.16022) in its three stages; resumable at any moment."""
    from .training.pulid.command import run_command

    tell(run_command(
        out=out, data=data, config=config, stage=stage, base=base, resume=resume, changes=change or [],
        allow_change=allow_change or [], print_config=print_config, say=say,
    ))  # fmt: skip


@app.command("face-vit")
def train_face_vit(
    data: Annotated[
        str | None,
        typer.Option(
            help='Folders of people, PERSON/*.jpg, as they are or of `idcore prepare`; "drawn": drawn people.'
        ),
    ] = None,
    out: TrainOut = None,
    config: TrainConfig = None,
    resume: Resume = False,
    change: Change = None,
    allow_change: AllowChange = None,
    print_config: PrintConfig = False,
) -> None:
    """Train a face ViT for identification (ArcFace's head), which DreamIdentity's encoder begins with."""
    from .training.face_vit.run import run_command

    tell(run_command(data, arguments_of(out, config, None, resume, change, allow_change, print_config)))


@app.command("sefi-ide")
def train_sefi_ide(
    images: Annotated[
        list[Path] | None, typer.Option("--images", help="A photo of one person; again for more; or a folder of them.")
    ] = None,
    out: TrainOut = None,
    class_word: Annotated[str | None, typer.Option(help='What the photos show, in a plain word: "person".')] = None,
    placeholder: Annotated[str | None, typer.Option(help='What prompts will say: "V*".')] = None,
    base: TrainBase = None,
    config: TrainConfig = None,
    resume: Resume = False,
    change: Change = None,
    allow_change: AllowChange = None,
    print_config: PrintConfig = False,
) -> None:
    """Learn one person as a pair of words per stage (SeFi-IDE, arXiv 2402.00631) from one photo, in minutes."""
    from .training.sefi_ide.command import run_command

    arguments = arguments_of(out, config, base, resume, change, allow_change, print_config)
    tell(run_command(arguments, images=images or [], class_word=class_word, placeholder=placeholder))


@app.command("dreamidentity")
def train_dreamidentity(
    data: Annotated[
        str | None,
        typer.Option(help='Faces to draw again: pictures, a folder of `idcore prepare`, or "drawn": drawn people.'),
    ] = None,
    pairs: Annotated[Path | None, typer.Option(help="Faces and edited pictures: a folder of `idcore augment`.")] = None,
    editability: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of the pairs; 0: reconstruction alone.")
    ] = None,
    vit: Annotated[
        str | None, typer.Option(help='Face ViT to begin with: timm\'s key names, safetensors; or "embedded".')
    ] = None,
    base: TrainBase = None,
    out: TrainOut = None,
    config: TrainConfig = None,
    resume: Resume = False,
    change: Change = None,
    allow_change: AllowChange = None,
    print_config: PrintConfig = False,
) -> None:
    """Train DreamIdentity's encoder (arXiv 2307.00300): a face to words of the prompt in one pass; resumable."""
    from .training.dreamidentity.run import run_command

    arguments = arguments_of(out, config, base, resume, change, allow_change, print_config)
    tell(run_command(data, pairs, vit, editability, arguments))


@app.command("styleforge")
def train_styleforge(
    out: TrainOut = None,
    style_ref: Annotated[
        Path | None, typer.Option(help="15 to 20 pictures in the style, people and backgrounds mixed.")
    ] = None,
    aux: Annotated[Path | None, typer.Option(help="15 to 20 portraits in digital painting, of other styles.")] = None,
    people: Annotated[
        Path | None, typer.Option(help="Multi-StyleForge, in place of --style-ref: pictures of people.")
    ] = None,
    backgrounds: Annotated[Path | None, typer.Option(help="And pictures without people.")] = None,
    multi: Annotated[bool, typer.Option("--multi", help="Multi-StyleForge: split --style-ref by its faces.")] = False,
    config: TrainConfig = None,
    base: TrainBase = None,
    resume: Resume = False,
    change: Change = None,
    allow_change: AllowChange = None,
    print_config: PrintConfig = False,
) -> None:
    """Train a style (StyleForge, Multi-StyleForge, arXiv 2404.05256): a LoRA, or a whole UNet."""
    from .training.styleforge.command import run_command

    sets = {"style_ref": style_ref, "aux": aux, "people": people, "backgrounds": backgrounds}
    arguments = arguments_of(out, config, base, resume, change, allow_change, print_config)
    tell(run_command(arguments, **sets, multi=multi))
