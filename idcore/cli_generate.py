"""`idcore generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_options import Choose, Faces, Parsing, Retina, Vision, Weights, one_or_each


def generate(
    prompt: Annotated[str, typer.Option(help="What to draw.")],
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")],
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
    id_scale: Annotated[
        list[float] | None, typer.Option(help="Strength of the identity, default 1, 0 leaves it out; or one per --id.")
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="Classifier-free guidance, default 1.2 (tiny-sd: 1); 1 leaves it out.", show_default=False),
    ] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; SDXL 768, else the model's own.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; SDXL 1024, else the model's own.")] = None,
    system: Annotated[str, typer.Option(help='"auto": what --weights holds; its name; or a fetched recipe.')] = "auto",
    weights: Weights = None,
    vision: Vision = None,
    parsing: Parsing = None,
    retinaface: Retina = None,
    preset: Annotated[str | None, typer.Option(help='PuLID: "fidelity" or "style".')] = None,
    faces: Faces = "embedded",
    choose: Choose = "largest",
    placeholder: Annotated[
        list[str] | None,
        typer.Option(help="DreamIdentity, SeFi-IDE, textual inversion: the word that is the person; one for each."),
    ] = None,
    style: Annotated[
        list[Path] | None, typer.Option(help="LoRA file, or a result of `idcore train styleforge`; may be repeated.")
    ] = None,
    style_scale: Annotated[
        list[float] | None, typer.Option(help="Strength of --style, default 1; or one each.")
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
    like: Annotated[
        list[Path] | None, typer.Option(help="A photo per --id, to measure likeness by; default: --id itself.")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also draw without --style, and print what it takes of the likeness.")
    ] = False,
    id_start: Annotated[float, typer.Option(min=0, max=1, help="Part of the steps before the identity acts.")] = 0.0,
    id_end: Annotated[float, typer.Option(min=0, max=1, help="Part of the steps after which it does not.")] = 1.0,
    mask: Annotated[list[Path] | None, typer.Option(help="Where an identity acts, white; one per --id.")] = None,
    layout: Annotated[str | None, typer.Option(help='Who acts where: "left, right", or columns "1 1".')] = None,
    sampler: Annotated[
        str, typer.Option(help='SDXL: "lightning", "lightning-euler", "karras-2m", "karras-sde", "own" or "auto".')
    ] = "auto",
    runner: Annotated[str, typer.Option(help='SDXL: "eager", or "graph" (one CUDA graph).')] = "eager",
    quantize: Annotated[str | None, typer.Option(help='SDXL: "int8" or "fp8" weights of the UNet (torchao).')] = None,
    offload: Annotated[str | None, typer.Option(help='SDXL on a GPU: "model" or "sequential".')] = None,
    unet_weights: Annotated[
        Path | None, typer.Option(help="SDXL: one file with a whole UNet, e.g. sdxl_lightning_4step_unet.safetensors.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="With one checkpoint file as --base: a folder with its configurations.")
    ] = None,
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
