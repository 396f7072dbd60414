"""`idcore generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import cli_options as options
from .cli_options import one_or_each


def generate(
    prompt: Annotated[str, typer.Option(help="What to draw.")],
    out: Annotated[Path, typer.Option(help="Folder for the pictures; those of the same number and seed are replaced.")],
    id: Annotated[
        list[Path] | None,
        typer.Option(
            "--id",
            help="A photo, an identity of `idcore encode`, or learned_embeds.safetensors; again for others.",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help='"tiny", "tiny-sd" (SD 1.5\'s layout), a folder of `idcore train tiny`, or with SDXL or SD 1.5. '
            'Default: what the trained folder of --system, --id or --style was trained on; else "tiny".',
            show_default=False,
        ),
    ] = None,
    negative: Annotated[str, typer.Option(help="Negative prompt (not of tiny).")] = "",
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Picture i uses seed + i.")] = 0,
    count: Annotated[int, typer.Option(min=1, max=10_000, help="How many pictures.")] = 1,
    id_scale: options.IdScale = None,
    guidance: options.Guidance = None,
    width: Annotated[int | None, typer.Option(min=8, max=8192, help="Pixels; SDXL 768, else the model's own.")] = None,
    height: Annotated[
        int | None, typer.Option(min=8, max=8192, help="Pixels; SDXL 1024, else the model's own.")
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
        list[str] | None,
        typer.Option(help="DreamIdentity, SeFi-IDE, textual inversion: the word that is the person; one for each."),
    ] = None,
    style: options.Styles = None,
    style_scale: options.StyleScale = None,
    background: options.Background = None,
    person_region: options.PersonRegion = None,
    person_margin: options.PersonMargin = 0.0625,
    like: Annotated[
        list[Path] | None, typer.Option(help="A photo per --id, to measure likeness by; default: --id itself.")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also draw without --style, and print what it takes of the likeness.")
    ] = False,
    id_start: Annotated[float, typer.Option(min=0, max=1, help="Part of the steps before the identity acts.")] = 0.0,
    id_end: Annotated[float, typer.Option(min=0, max=1, help="Part of the steps after which it does not.")] = 1.0,
    mask: options.Masks = None,
    layout: options.Layout = None,
    sampler: options.Sampler = "auto",
    runner: Annotated[str, typer.Option(help='SDXL: "eager", or "graph" (one CUDA graph).')] = "eager",
    quantize: options.Quantize = None,
    offload: options.Offload = None,
    unet_weights: options.UnetWeights = None,
    config: options.OneFileConfig = None,
) -> None:
    """Pictures of a prompt, with people of one or several systems and styles, in one pass."""
    from .generating import GenerateRequest, generate_pictures
    from .results import trained_on

    base = base or trained_on(system, *(id or ()), *(style or ())) or "tiny"
    request = GenerateRequest(
        prompt=prompt, out=out, id=tuple(id or ()), base=base, negative=negative, steps=steps, seed=seed, count=count,
        id_scale=one_or_each(id_scale, 1.0), guidance=guidance, width=width, height=height, system=system,
        weights=weights, vision=vision, parsing=parsing, retinaface=retinaface, preset=preset, faces=faces,
        choose=choose, placeholder=one_or_each(placeholder, None), id_start=id_start, id_end=id_end,
        masks=tuple(mask or ()), layout=layout, styles=tuple(style or ()), style_scale=one_or_each(style_scale, 1.0),
        background=background, person_region=person_region, person_margin=person_margin, like=tuple(like or ()),
        compare=compare, sampler=sampler, runner=runner, quantize=quantize, offload=offload,
        unet_weights=unet_weights, config=config,
    )  # fmt: skip
    for path in generate_pictures(request, lambda text: typer.echo(text, err=True)):
        typer.echo(path)
