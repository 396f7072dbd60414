"""The command line: a table of commands; the work is in other modules."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from . import __version__
from .cli_augment import augment
from .cli_evaluate import evaluate
from .cli_generate import generate
from .cli_options import Choose, Faces, Json, Parsing, Retina, System, Vision, Weights
from .cli_stylise import stylise
from .cli_train import app as train_app
from .errors import InputError, told

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(train_app, name="train")


def _tell_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"idcore {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version, and stop.")
    ] = False,
) -> None:
    """Identity-customised text-to-image diffusion, fast."""


app.command()(generate)
app.command()(stylise)
app.command()(evaluate)
app.command()(augment)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for grid.png, the pictures and demo.json.")] = Path("demo_out"),
    photo: Annotated[Path | None, typer.Option(help="Your photo instead of the astronaut.")] = None,
    as_json: Json = False,
) -> None:
    """A real photo through face encoders, identity encoder, fused attention and 4 steps, with similarity scores."""
    from .demo import run_demo

    result = run_demo(out, photo=photo, as_json=as_json)
    if as_json:
        print(json.dumps(result, indent=1))


@app.command()
def encode(
    photos: Annotated[list[Path], typer.Argument(help="One or several photos of one person, or a folder of them.")],
    out: Annotated[Path, typer.Option(help="The identity to write: a file that ends in .safetensors.")],
    system: System = "tiny",
    weights: Weights = None,
    vision: Vision = None,
    parsing: Parsing = None,
    retinaface: Retina = None,
    faces: Faces = "embedded",
    choose: Choose = "largest",
    bank: Annotated[
        Path | None,
        typer.Option(help="Also keep keys and values for this base: a folder in diffusers' layout."),
    ] = None,
) -> None:
    """Photos of a person to an identity file."""
    from .workflows import encode_photos, new_file

    new_file(out)
    identity = encode_photos(
        photos, system=system, weights=weights, vision=vision, parsing=parsing, retinaface=retinaface, faces=faces,
        choose=choose, bank=bank, say=lambda text: typer.echo(text, err=True),
    )  # fmt: skip
    identity.save(out)
    typer.echo(f"{out}: {identity}", err=True)


@app.command()
def mix(
    identities: Annotated[list[Path], typer.Argument(help="Two or more identities of one system.")],
    out: Annotated[Path, typer.Option(help="The identity to write: a file that ends in .safetensors.")],
    weights: Annotated[
        str | None, typer.Option(help='One number per identity, e.g. "0.7,0.3"; equal by default.')
    ] = None,
) -> None:
    """A weighted mean of identities: of several people, or of photos of one that were encoded one by one."""
    from .workflows import mix_identities

    typer.echo(f"{out}: {mix_identities(identities, out, weights)}", err=True)


@app.command()
def ui(
    base: Annotated[str, typer.Option(help='"tiny", a folder of `idcore train tiny`, or one with SDXL.')] = "tiny",
    system: Annotated[str, typer.Option(help='"auto": what --weights holds; its name; or a fetched recipe.')] = "auto",
    weights: Weights = None,
    vision: Vision = None,
    parsing: Parsing = None,
    retinaface: Retina = None,
    unet: Annotated[Path | None, typer.Option(help="A whole UNet for --base, such as SDXL-Lightning's.")] = None,
    preset: Annotated[str | None, typer.Option(help='PuLID: "fidelity" or "style".')] = None,
    faces: Faces = "embedded",
    device: Annotated[str | None, typer.Option(help="Default: CUDA where it is usable (SDXL).")] = None,
    host: Annotated[str, typer.Option(help="Address; there is no authentication.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default: the first free one from 7860.")] = None,
    open_browser: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
) -> None:
    """An app in the browser: photos, prompt, pictures with their similarity. Nothing leaves this machine."""
    from .ui.page import run_ui

    run_ui(
        host=host, port=port, open_browser=open_browser, base=base, system=system, weights=weights, vision=vision,
        parsing=parsing, retinaface=retinaface, unet=unet, preset=preset, faces=faces, device=device,
    )  # fmt: skip


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="PuLID, FaceID, InstantID, EVA-CLIP, BiSeNet; or a LoRA.")],
    out: Annotated[Path, typer.Option(help="The safetensors file to write; for peft a folder.")],
    layout: Annotated[
        str | None, typer.Option(help='PuLID: "pulid" or "community". LoRA: "kohya", "diffusers" or "peft".')
    ] = None,
    unpickle: Annotated[
        bool, typer.Option(help="Allow reading a pickle (weights_only; no code of the file runs).")
    ] = False,
    family: Annotated[str, typer.Option(help="LoRA to kohya, where it cannot be told: sd15, sd21 or sdxl.")] = "",
) -> None:
    """Published weights to safetensors, and PuLID's and LoRA from one key layout to another."""
    from .workflows import convert_weights

    typer.echo(convert_weights(source, out, layout=layout, unpickle=unpickle, family=family), err=True)


@app.command()
def fetch(
    names: Annotated[list[str] | None, typer.Argument(help="Recipes; none: a list of them.")] = None,
    home: Annotated[Path | None, typer.Option(help="Folder; default $IDCORE_HOME or ~/.cache/idcore.")] = None,
    needs: Annotated[bool, typer.Option(help="Also what the recipes need.")] = False,
    convert: Annotated[bool, typer.Option(help="Also make safetensors of pickles (weights_only).")] = False,
    accept_licence: Annotated[bool, typer.Option(help="Accept the non-commercial terms of a recipe.")] = False,
    bundle: Annotated[Path | None, typer.Option(help="Write what is fetched to this tar file; no download.")] = None,
    from_bundle: Annotated[Path | None, typer.Option(help="Take files from this tar file; no download.")] = None,
) -> None:
    """Download published weights by name, resumable and checked; or carry them in a bundle to a machine offline."""
    from .workflows import fetch_weights

    for line in fetch_weights(
        names or [], home=home, needs=needs, convert=convert, accept_licence=accept_licence, bundle=bundle,
        from_bundle=from_bundle, say=lambda text: typer.echo(text, err=True),
    ):  # fmt: skip
        typer.echo(line)


@app.command()
def doctor(
    names: Annotated[list[str] | None, typer.Argument(help="Recipes; none: all.")] = None,
    home: Annotated[Path | None, typer.Option(help="Folder; default $IDCORE_HOME or ~/.cache/idcore.")] = None,
    verify: Annotated[bool, typer.Option(help="Read and hash every file.")] = False,
    as_json: Json = False,
) -> None:
    """Which weights are here, which are missing, where was looked, what to do. Status 1 if a named recipe lacks any."""
    from .doctor import as_json as to_json
    from .doctor import as_text, examine

    reports = examine(names or [], home=home, verify=verify)
    if as_json:
        print(json.dumps(to_json(reports, home), indent=1))
    else:
        typer.echo(as_text(reports, home, long=bool(names)))
    if names and not all(r.complete for r in reports):
        raise typer.Exit(1)


@app.command()
def prepare(
    data: Annotated[
        Path | None, typer.Argument(help="Folder of pictures with captions, or of WebDataset shards (.tar).")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write; a second call goes on where one stopped.")] = None,
    system: Annotated[
        str, typer.Option(help='Whose face features: "tiny-pulid" (embedded), "pulid", or "none" (faces alone).')
    ] = "tiny-pulid",
    faces: Faces = "embedded",
    vision: Vision = None,
    parsing: Parsing = None,
    retinaface: Retina = None,
    base: Annotated[
        str | None, typer.Option(help='Also encode the pictures: "tiny", "tiny-sd", or a folder with a pipeline.')
    ] = None,
    device: Annotated[str, typer.Option(help="Of the vision tower and the base's autoencoder.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Of the base: float32, bfloat16.")] = "float32",
    texts: Annotated[bool, typer.Option(help="With --base: also encode the captions, in the base's dtype.")] = False,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="A setting: resolution=768, several=largest. May be repeated.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes; the result is the same for any number.")] = 1,
    dry_run: Annotated[bool, typer.Option(help="Examine and report, write nothing.")] = False,
    procedural: Annotated[int, typer.Option(min=0, help="First draw this many people into DATA.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of --procedural.")] = 0,
    settings: Annotated[bool, typer.Option("--print-settings", help="Print all settings, and stop.")] = False,
) -> None:
    """Training data: find and filter faces, cache their features (and latents), once; what is dropped is reported."""
    from .training.data.command import run_prepare
    from .training.data.faces import Faces as Setup
    from .training.data.options import PrepareConfig
    from .training.settings import load
    from .training.settings_out import as_text

    if settings:
        typer.echo(as_text(load(PrepareConfig, None, change or [])).rstrip())
        return
    if data is None:
        raise InputError("prepare: wanted a folder of pictures: idcore prepare PHOTOS --out data")
    files = {k: None if v is None else str(v) for k, v in dict(vision=vision, parsing=parsing).items()}
    setup = Setup(system, faces, **files, retinaface=None if retinaface is None else str(retinaface), device=device)
    run_prepare(
        data, out, setup, changes=change or [], base=base, dtype=dtype, texts=texts, procedural=procedural, seed=seed,
        workers=workers, dry_run=dry_run, say=lambda text: typer.echo(text, err=True),
    )  # fmt: skip


@app.command()
def draw(
    out: Annotated[Path, typer.Argument(help="Folder for the pictures and their captions.")],
    kind: Annotated[str, typer.Option(help='"person" (one, several views), "people", or "backgrounds".')] = "person",
    count: Annotated[int, typer.Option(min=1, max=10_000, help="How many pictures.")] = 4,
    style: Annotated[str, typer.Option(help="photo, pencil, oil, cartoon, sepia or night.")] = "photo",
    seed: Annotated[int, typer.Option(min=0, help="Another seed draws others.")] = 0,
    size: Annotated[int, typer.Option(min=64, max=1024, help="Edge in pixels.")] = 128,
) -> None:
    """Draw small data sets of people and styles, to try the trainings with --base tiny-sd."""
    from .training.data.drawings import draw_folder

    made = draw_folder(out, kind, count, style=style, seed=seed, size=size)
    typer.echo(f"{len(made)} pictures in {out}")


@app.command(add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def bench(ctx: typer.Context) -> None:
    """Times of ops and whole models, as `python -m idcore.bench`; `idcore bench --help` lists what there is."""
    from .bench.main import main as run_bench

    raise typer.Exit(run_bench(ctx.args))


@app.command()
def env(as_json: Json = False) -> None:
    """What is built, and which backend, provider and weights are usable here, with the reason where not."""
    from .env import as_text, report

    r = report()
    print(json.dumps(r, indent=1) if as_json else as_text(r))


def main() -> None:
    """Entry point: errors of ours are one clear text and exit status 1 (128 + signal for a training that a signal
    stopped), no traceback."""
    sys.exit(told(app))


if __name__ == "__main__":
    main()
