"""`idcore stylise`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .cli_options import Choose, Faces, Json, Parsing, Retina, Vision, Weights, one_or_each


def stylise(
    photos: Annotated[list[Path], typer.Argument(help="Photos to redraw, each by itself.")],
    prompt: Annotated[str, typer.Option(help='What they show, in which style: "a photo of [V] style, a man".')],
    out: Annotated[Path, typer.Option(help="Folder for the pictures and stylise.json.")],
    base: Annotated[
        str, typer.Option(help='"tiny-sd", or a folder with SD 1.x, SD 2.x or SDXL in diffusers\' layout.')
    ] = "tiny-sd",
    strength: Annotated[
        float, typer.Option(help="Above 0, at most 1: the share of the steps that is drawn anew.")
    ] = 0.6,
    style: Annotated[
        list[Path] | None, typer.Option(help="LoRA file, or a result of `idcore train styleforge`; may be repeated.")
    ] = None,
    style_scale: Annotated[
        list[float] | None, typer.Option(help="Strength of --style, default 1; or one each.")
    ] = None,
    id: Annotated[
        list[Path] | None,
        typer.Option(
            "--id",
            help="Who is kept: a photo (often the same), an identity of `idcore encode`, or learned words.",
        ),
    ] = None,
    id_scale: Annotated[
        list[float] | None, typer.Option(help="Strength of the identity, default 1, 0 leaves it out; or one per --id.")
    ] = None,
    negative: Annotated[str, typer.Option(help="Negative prompt.")] = "",
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Of a whole run; strength times as many are taken.")] = 4,
    guidance: Annotated[
        float | None,
        typer.Option(help="Classifier-free guidance, default 1.2 (tiny-sd: 1); 1 leaves it out.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Picture i of a photo uses seed + i.")] = 0,
    count: Annotated[int, typer.Option(min=1, max=10_000, help="Pictures per photo.")] = 1,
    long_side: Annotated[
        int | None, typer.Option(min=8, help="Pixels of the pictures' longer side; default the model's own.")
    ] = None,
    system: Annotated[str, typer.Option(help='"auto": what --weights holds; its name; or a fetched recipe.')] = "auto",
    weights: Weights = None,
    vision: Vision = None,
    parsing: Parsing = None,
    retinaface: Retina = None,
    preset: Annotated[str | None, typer.Option(help='PuLID: "fidelity" or "style".')] = None,
    faces: Faces = "embedded",
    choose: Choose = "largest",
    placeholder: Annotated[
        list[str] | None, typer.Option(help="People in the prompt: the word that is the person; one for each.")
    ] = None,
    background: Annotated[
        str | None, typer.Option(help='What is read outside of the people, e.g. "a photo of [W] style, a garden".')
    ] = None,
    person_region: Annotated[
        str | None, typer.Option(help='With --background: where it is not read; "center", or a picture, white there.')
    ] = None,
    person_margin: Annotated[
        float, typer.Option(help="Share of the longer side by which that is grown, at soft edges; 0 to 0.25.")
    ] = 0.0625,
    mask: Annotated[list[Path] | None, typer.Option(help="Where an identity acts, white; one per --id.")] = None,
    layout: Annotated[str | None, typer.Option(help='Who acts where: "left, right", or columns "1 1".')] = None,
    sampler: Annotated[
        str, typer.Option(help='SDXL: "lightning", "lightning-euler", "karras-2m", "karras-sde", "own" or "auto".')
    ] = "auto",
    quantize: Annotated[str | None, typer.Option(help='SDXL: "int8" or "fp8" weights of the UNet (torchao).')] = None,
    offload: Annotated[str | None, typer.Option(help='SDXL on a GPU: "model" or "sequential".')] = None,
    unet_weights: Annotated[
        Path | None, typer.Option(help="SDXL: one file with a whole UNet, e.g. sdxl_lightning_4step_unet.safetensors.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="With one checkpoint file as --base: a folder with its configurations.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Photos redrawn in a style (SDEdit): the layout stays, people stay with --id, and what was kept is printed."""
    from .stylising import StyliseRequest, stylise_photos

    request = StyliseRequest(
        photos=tuple(photos), prompt=prompt, out=out, base=base, strength=strength, styles=tuple(style or ()),
        style_scale=one_or_each(style_scale, 1.0), id=tuple(id or ()), id_scale=one_or_each(id_scale, 1.0),
        negative=negative, steps=steps, guidance=guidance, seed=seed, count=count, long_side=long_side, system=system,
        weights=weights, vision=vision, parsing=parsing, retinaface=retinaface, preset=preset, faces=faces,
        choose=choose, placeholder=one_or_each(placeholder, None), background=background, person_region=person_region,
        person_margin=person_margin, masks=tuple(mask or ()), layout=layout, sampler=sampler, quantize=quantize,
        offload=offload, unet_weights=unet_weights, config=config,
    )  # fmt: skip
    made = stylise_photos(request, lambda text: typer.echo(text, err=True))
    if as_json:
        typer.echo(json.dumps(made, indent=1))
        return
    for name in made["pictures"]:
        typer.echo(out / name)
