"""`idcore augment`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_options import Faces


def augment(
    out: Annotated[Path | None, typer.Option(help="Folder to write; a second call goes on where one stopped.")] = None,
    base: Annotated[
        str,
        typer.Option(help='"tiny-sd" (embedded), or a folder with an SD 1.5 or SDXL pipeline.'),
    ] = "tiny-sd",
    names: Annotated[str | None, typer.Option(help="File with a name a line; tiny-sd knows its own.")] = None,
    prompts: Annotated[
        str | None, typer.Option(help='Edit prompts, {person} in each: a file, or a set: "dreamidentity-edits".')
    ] = None,
    source_prompt: Annotated[
        list[str] | None, typer.Option(help='Of the source pictures: "a photo of {person}". May be repeated.')
    ] = None,
    clip: Annotated[Path | None, typer.Option(help="Folder with a CLIP model of transformers: text alignment.")] = None,
    text: Annotated[
        str | None, typer.Option(help='Text alignment by "clip", "drawn" (attributes of the drawn world), "none".')
    ] = None,
    faces: Faces = "embedded",
    unet: Annotated[
        Path | None, typer.Option("--unet-weights", help="A whole UNet for --base, such as SDXL-Lightning's.")
    ] = None,
    device: Annotated[str, typer.Option(help="Of the base and of CLIP.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Of the base: float32, float16, bfloat16.")] = "float32",
    config: Annotated[Path | None, typer.Option(help="Settings: YAML or JSON. See --print-config.")] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="A setting: steps=25, guidance=7, batch=16. May be repeated.")
    ] = None,
    ray: Annotated[
        str | None, typer.Option(help='Work on Ray: "local" starts it here, "auto" or HOST:PORT joins a cluster.')
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="With --ray: processes, each with the models in it.")] = 1,
    cpus: Annotated[float, typer.Option(min=0, help="With --ray: CPUs of a worker.")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="With --ray: GPUs of a worker (and --device cuda).")] = 0,
    retries: Annotated[int, typer.Option(min=0, help="With --ray: how often a worker may die.")] = 3,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print all settings, and stop.")] = False,
) -> None:
    """Pairs of pictures of people whom a base model knows: plain, and edited by prompts; filtered, resumable."""
    from .errors import InputError
    from .training.augment.command import run_augment
    from .training.augment.on_ray import Cluster
    from .training.augment.options import AugmentConfig
    from .training.settings import load
    from .training.settings_out import as_text

    if print_config:
        typer.echo(as_text(load(AugmentConfig, config, change or [])).rstrip())
        return
    if out is None:
        raise InputError("augment: --out FOLDER is missing; see idcore augment --help")
    if ray is None and (workers > 1 or gpus):
        raise InputError("augment: --workers and --gpus are for --ray; add --ray local for processes on this machine")
    run_augment(
        out=out, base=base, names=names, prompts=prompts, source_prompts=source_prompt or [], clip=clip, text=text,
        faces=faces, unet=unet, dtype=dtype, device=device, config=config, changes=change or [],
        cluster=None if ray is None else Cluster(ray, workers, cpus, gpus, retries),
        say=lambda line: typer.echo(line, err=True),
    )  # fmt: skip
