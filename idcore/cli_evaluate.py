"""`idcore evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .cli_options import Choose, Faces, Json, Parsing, Retina, Vision, Weights, one_or_each


def evaluate(
    out: Annotated[Path, typer.Option(help="Folder for evaluation.json, index.html and what was measured.")],
    pictures: Annotated[Path | None, typer.Argument(help="A folder of pictures; none: make them.")] = None,
    people: Annotated[
        str | None, typer.Option(help='Whom they show: a photo, a folder of photos (or of folders), or "drawn:24".')
    ] = None,
    prompts: Annotated[str, typer.Option(help="To make: a prompt set, or a .txt or .json file.")] = "tiny",
    seeds: Annotated[int, typer.Option(min=1, help="To make: pictures per person and prompt.")] = 4,
    first_seed: Annotated[int, typer.Option(min=0, help="To make: the first seed.")] = 0,
    base: Annotated[str, typer.Option(help="To make: as in `idcore generate`.")] = "tiny",
    system: Annotated[str, typer.Option(help="To make: as in `idcore generate`.")] = "auto",
    weights: Weights = None,
    vision: Vision = None,
    parsing: Parsing = None,
    retinaface: Retina = None,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="To make: denoising steps.")] = 4,
    id_scale: Annotated[float, typer.Option(help="To make: strength of the identity.")] = 1.0,
    guidance: Annotated[
        float | None, typer.Option(help="To make: classifier-free guidance, default 1.2 (tiny-sd: 1).")
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=8, max=8192, help="To make: pixels; default the model's own.")
    ] = None,
    height: Annotated[
        int | None, typer.Option(min=8, max=8192, help="To make: pixels; default the model's own.")
    ] = None,
    negative: Annotated[str, typer.Option(help="To make: negative prompt.")] = "",
    placeholder: Annotated[
        str | None, typer.Option(help="To make: the word that is the person, for systems that act through the prompt.")
    ] = None,
    instead_of: Annotated[
        str, typer.Option(help="To make: what prompts say where that word is put, if they lack it.")
    ] = "a person",
    style: Annotated[
        list[Path] | None, typer.Option(help="To make: LoRA file, or a result of `idcore train styleforge`.")
    ] = None,
    style_scale: Annotated[list[float] | None, typer.Option(help="To make: strength of --style; or one each.")] = None,
    without: Annotated[bool, typer.Option(help="To make: also without identity (PuLID's alignment).")] = False,
    faces: Faces = "embedded",
    second_faces: Annotated[str | None, typer.Option(help="An independent recogniser: a folder, or embedded.")] = None,
    conditioned_by: Annotated[
        str, typer.Option(help="Of a folder: which recogniser conditioned it: faces, second-faces, neither, unknown.")
    ] = "unknown",
    min_score: Annotated[float | None, typer.Option(help="Embedded detector; 0.9, for drawings 0.8.")] = None,
    choose: Choose = "largest",
    clip: Annotated[Path | None, typer.Option(help="Folder with a CLIP model of transformers.")] = None,
    features: Annotated[
        str | None, typer.Option(help="embedded, clip:FOLDER, torch-fidelity:FILE, or a TorchScript Inception.")
    ] = None,
    real: Annotated[Path | None, typer.Option(help="Real pictures for FID and KID (with --features).")] = None,
    attributes: Annotated[bool, typer.Option(help="Background and style of the embedded model's world.")] = False,
    against: Annotated[Path | None, typer.Option(help="An earlier evaluation.json; status 1 if worse.")] = None,
    as_json: Json = False,
) -> None:
    """Judge pictures: identity, prompt, alignment, FID and KID, as JSON and a page. Goes on where it was stopped."""
    from .evaluating import EvaluateRequest, run_evaluation
    from .metrics.evaluation_json import summary

    result = run_evaluation(
        EvaluateRequest(
            out=out, pictures=pictures, people=people, prompts=prompts, seeds=seeds, first_seed=first_seed, base=base,
            system=system, weights=weights, vision=vision, parsing=parsing, retinaface=retinaface, steps=steps,
            id_scale=id_scale, guidance=guidance, width=width, height=height, without=without, faces=faces,
            negative=negative, placeholder=placeholder, instead_of=instead_of, styles=tuple(style or ()),
            style_scale=one_or_each(style_scale, 1.0), second_faces=second_faces, conditioned_by=conditioned_by,
            min_score=min_score, choose=choose, clip=clip, features=features, real=real, attributes=attributes,
            against=against,
        )
    )  # fmt: skip
    print(json.dumps(result, indent=1) if as_json else summary(result) + f"\n{out / 'index.html'}")
    if any(c["verdict"] == "worse" for c in result.get("changes", ())):
        raise typer.Exit(1)
