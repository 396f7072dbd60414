"""`idcore stylise`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from . import cli_options as options
from .cli_options import one_or_each


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
    style: options.Styles = None,
    style_scale: options.StyleScale = None,
    id: Annotated[
        list[Path] | None,
        typer.Option(
            "--id",
            help="Who is kept: a photo (often the same), an identity of `idcore encode`, or learned words.",
        ),
    ] = None,
    id_scale: options.IdScale = None,
    negative: Annotated[str, typer.Option(help="Negative prompt.")] = "",
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Of a whole run; strength times as many are taken.")] = 4,
    guidance: options.Guidance = None,
    seed: Annotated[int, typer.Option(min=0, help="Picture i of a photo uses seed + i.")] = 0,
    count: Annotated[int, typer.Option(min=1, max=10_000, help="Pictures per photo.")] = 1,
    long_side: Annotated[
        int | None, typer.Option(min=8, max=8192, help="Pixels of the pictures' longer side; default the model's own.")
    ] = None,
    system: options.AutoSystem = "auto",
    weights: options.Weights = None,
    vision: options.Vision = None,
    parsing: options.Parsing = None,
    retinaface: options.Retina = None,
    preset: options.Preset = None,
    faces: options.Faces = "embedded",
    choose: options.Choose = "largest",
    placeholder: Annotated[
        list[str] | None, typer.Option(help="People in the prompt: the word that is the person; one for each.")
    ] = None,
    background: options.Background = None,
    person_region: options.PersonRegion = None,
    person_margin: options.PersonMargin = 0.0625,
    mask: options.Masks = None,
    layout: options.Layout = None,
    sampler: options.Sampler = "auto",
    quantize: options.Quantize = None,
    offload: options.Offload = None,
    unet_weights: options.UnetWeights = None,
    config: options.OneFileConfig = None,
    as_json: options.Json = False,
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
