"""What the command line does, callable from Python: encode photos, mix, fetch and convert; see also `generating`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import IdcoreError, InputError
from .photos import photos_of, telling_faces
from .results import is_result, read_result

if TYPE_CHECKING:
    from PIL import Image

    from .identity import Identity


def face_choice(text: str) -> str | int:
    """ "0" -> 0; names stay."""
    return int(text) if text.lstrip("-").isdigit() else text


def encode_photos(
    photos: Sequence[Path],
    *,
    system: str = "tiny",
    weights: Path | None = None,
    vision: Path | None = None,
    parsing: Path | None = None,
    retinaface: Path | None = None,
    faces: str = "embedded",
    choose: str = "largest",
    bank: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Identity:
    """Photos of one person to an identity of the named system.

    Args:
        photos: one or several files (JPEG, PNG, WEBP), or folders of them.
        system: "tiny"; "pulid", "faceid", "instantid", "dreamidentity", "auto" (what `weights` holds); or a fetched
            recipe, such as "pulid-v1.1"; or a training's result folder.
        weights, vision, parsing, retinaface: files of the system, see `idcore.systems.loading.load_system`.
        faces: "embedded" or a folder with SCRFD and ArcFace models.
        choose: which face: "largest", "center", "only", or a number.
        bank: a base model in diffusers' layout; its layers' keys and values are kept in the identity, which needs no
            adapter weights then.
        say: gets a line per photo with several faces, and what the encoding took, where the system measures it.
    """
    photos = photos_of(photos)
    if not photos:
        raise InputError("encode: wanted at least one photo, got none")
    if system == "tiny":
        if bank is not None:
            raise InputError("encode: --bank keeps keys and values of an adapter; the embedded model has none")
        files = {"weights": weights, "vision": vision, "parsing": parsing, "retinaface": retinaface}
        if given := [f"--{name}" for name, file in files.items() if file is not None]:
            raise InputError(
                f'encode: {", ".join(given)}: system "tiny" reads photos with what is embedded; say whose the files '
                "are: --system auto (what --weights holds), pulid, faceid, instantid or dreamidentity"
            )
        from .sampling.tiny_pipeline import TinyPipeline

        with telling_faces(say):
            return TinyPipeline.from_package().encode(photos, analyzer(faces), face_choice(choose))
    from .systems.loading import load_system

    files = {"weights": weights, "vision": vision, "parsing": parsing, "retinaface": retinaface, "faces": faces}
    loaded = load_system(**chosen_files(system, files, for_photos=True), policy=face_choice(choose))
    with telling_faces(say):
        identity = loaded.encode(photos)
    if bank is not None:
        from .sampling.loading import unet_shapes

        if not hasattr(loaded, "project"):
            raise InputError(f"encode: --bank keeps keys and values of layers, which {loaded.name} does not make")
        identity = identity.with_bank(loaded, unet_shapes(bank))
    timing = getattr(loaded, "timing", None)
    if timing:
        say(
            f"one forward pass for {len(photos)} photo{'s' * (len(photos) > 1)}: {timing['forward_ms']:.1f} ms; "
            f"finding and cutting out the face: {timing['preprocess_ms']:.1f} ms"
        )
    return identity


def check_system(system: str) -> None:
    """Raise InputError unless `system` is the name of one, of a recipe, or a training's result folder."""
    from .recipes import RECIPES
    from .systems.loading import SYSTEMS

    if system not in ("auto", *SYSTEMS) and system not in RECIPES and not is_result(system):
        raise InputError(
            f'system must be "tiny" (embedded model), "auto", {", ".join(SYSTEMS)}, a fetched recipe such as '
            f'"pulid-v1.1", or the result folder of a training, got {system!r}'
        )


def chosen_files(system: str, files: dict[str, Any], *, for_photos: bool) -> dict[str, Any]:
    """Arguments of `load_system`: the files given, over those of the fetched recipe where `system` is the name of one,
    or those of the result folder that it names.

    Raises:
        InputError: an unknown system.
        WeightsError: a file of the recipe is missing.
    """
    from .recipes import RECIPES
    from .systems.loading import SYSTEMS, fetched

    check_system(system)
    if is_result(system):
        found = read_result(system)
        given = {k: v for k, v in files.items() if v is not None}
        own = {"features": found.features} if found.features else {}
        return {"system": found.system, **own, "weights": Path(system) / found.weights, **given}
    as_recipe = system in RECIPES and (system not in SYSTEMS or files.get("weights") is None)
    if not as_recipe:
        return {"system": system, **files}
    given = {k: v for k, v in files.items() if v is not None and (k, v) != ("faces", "embedded")}
    return {**fetched(system, for_photos=for_photos), **given}


def preset_of(system: str, preset: str | None) -> str | None:
    """The mode that was asked for, else that of the result folder which `system` names."""
    return read_result(system).mode or None if preset is None and is_result(system) else preset


def mix_identities(files: Sequence[Path], out: Path, weights: str | None = None) -> Identity:
    """Mix identity files as `Identity.mix` does and write the result; `weights` as "0.7,0.3"."""
    from .identity import Identity

    if len(files) < 2:
        raise InputError(f"mix: wanted at least two identities, got {len(files)}")
    new_file(out)
    try:
        numbers = None if weights is None else [float(w) for w in weights.split(",")]
    except ValueError:
        raise InputError(f'mix: weights must be numbers such as "0.7,0.3", got {weights!r}') from None
    mixed = Identity.mix([Identity.load(f) for f in files], numbers)
    mixed.save(out)
    return mixed


def analyzer(faces: str) -> Any:
    """The analyzer that `--faces` names; None for the embedded one, which a system takes by itself."""
    from .encoders.analyzer import analyzer_from

    return None if faces == "embedded" else analyzer_from(faces)


def convert_weights(
    source: Path, out: Path, *, layout: str | None = None, unpickle: bool = False, family: str = ""
) -> str:
    """Write published weights as safetensors, PuLID's and LoRA in the layout asked for; returns a line that says what
    was written.

    Args:
        source: a file; or a folder of peft.
        layout: PuLID: "pulid" (default) or "community". LoRA: "kohya", "diffusers" or "peft" (a folder); default
            "diffusers" for kohya's, else "kohya".
        unpickle: see `idcore.weights.convert`.
        family: LoRA to kohya: "sd15", "sd21" or "sdxl", where it cannot be told.
    """
    from .lora_files import LAYOUTS, read_lora, write_lora
    from .weights import convert, describe

    if source.is_dir() or describe(source).layout == "lora":
        lora = read_lora(source)
        layout = layout or ("diffusers" if lora.layout == "kohya" else "kohya")
        if layout not in LAYOUTS:
            raise InputError(f"convert: {source} is a LoRA; layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
        return f"{write_lora(lora, out, layout, family=family)}: {lora}, written in the layout of {layout}"
    if layout in LAYOUTS or family:
        raise InputError(f"convert: {source} is no LoRA; layout {layout!r} and family are of LoRA files")
    return f"{out}: {convert(source, out, layout=layout or 'pulid', unpickle=unpickle)}"


def fetch_weights(
    names: Sequence[str],
    *,
    home: Path | None = None,
    needs: bool = False,
    convert: bool = False,
    accept_licence: bool = False,
    bundle: Path | None = None,
    from_bundle: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[str]:
    """What `idcore fetch` does; returns the lines for standard output. See `idcore fetch --help` for the arguments."""
    from .recipes import RECIPES, recipe

    if not names and bundle is None and from_bundle is None:
        return [f"{r.name:22} {r.what}; {r.licence}" for r in RECIPES.values()]
    from . import hub
    from .bundle import export_bundle, import_bundle

    if from_bundle is not None and (names or bundle):
        raise InputError("fetch: --from-bundle takes what is in the bundle; give it alone")
    if from_bundle is not None:
        return import_bundle(from_bundle, home, say)
    names = [n for name in names for n in ([*recipe(name).needs, name] if needs else [name])]
    names = list(dict.fromkeys(names))
    if bundle is not None:
        return [str(export_bundle(names, bundle, home))]
    for name in () if accept_licence else names:  # before anything large is on its way
        hub.require_accepted(name)
    options = {"home": home, "accept_licence": accept_licence, "convert": convert, "say": say}
    return [str(hub.fetch(name, **options)) for name in names]


def train_tiny_model(
    out: Path, *, resume: bool = False, iterations: int, batch: int, workers: int, recogniser_from: int, shards: int,
    seed: int,
) -> Path:  # fmt: skip
    """Train the embedded model and export it to `out/model`; see `training.tiny.run.TrainConfig`."""
    from dataclasses import replace

    from .training.tiny.run import TrainConfig, train_tiny

    writable_folder(out)
    config = TrainConfig(workers=workers, recogniser_from=recogniser_from, shards=shards)
    warmup = min(config.loop.warmup, iterations)
    loop = replace(config.loop, steps=iterations, batch=batch, seed=seed, warmup=warmup)
    # a run that is done may go on with more iterations
    return train_tiny(replace(config, loop=loop), out, resume=resume, allow_change=("steps", "warmup"))


def writable_folder(folder: Path) -> Path:
    """Make the folder, and find out now, not after the work, whether it can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise InputError(f"cannot write into {folder}: {e.strerror or e}; choose another --out folder") from e
    return folder


def new_file(path: Path, suffix: str = ".safetensors") -> Path:
    """Find out before the work whether this file can be written; folders on the way are made.

    Raises:
        InputError: another suffix (a photo's, say, that would be lost), a folder, or a place that cannot be written.
    """
    if path.suffix.lower() != suffix:
        raise InputError(f"--out {path}: wanted a name that ends in {suffix}, such as {path.with_suffix(suffix).name}")
    if path.is_dir():
        raise InputError(f"--out {path} is a folder; wanted a file, such as {path / ('me' + suffix)}")
    writable_folder(path.parent)
    return path


def save_picture(picture: Image.Image, path: Path, about: Mapping[str, str] | None = None) -> Path:
    """PNG, written beside its final name and renamed: a full disk leaves no half picture.

    Args:
        picture: to be written.
        path: where to.
        about: texts that the file says of itself.
    """
    from PIL.PngImagePlugin import PngInfo

    texts = PngInfo()
    for name, text in (about or {}).items():
        texts.add_text(name, text)
    staged = path.with_name(f".{path.name}.part")
    try:
        picture.save(staged, format="PNG", pnginfo=texts)
        os.replace(staged, path)
    except OSError as e:
        staged.unlink(missing_ok=True)
        raise IdcoreError(f"cannot write {path}: {e.strerror or e}; free some space or choose another folder") from e
    return path


def write_text(path: Path, text: str) -> None:
    """All or nothing."""
    staged = path.with_name(f".{path.name}.part")
    try:
        staged.write_text(text + "\n", encoding="utf-8")
        os.replace(staged, path)
    except OSError as e:
        staged.unlink(missing_ok=True)
        raise IdcoreError(f"cannot write {path}: {e.strerror or e}; free some space or choose another folder") from e


__all__ = [
    "convert_weights",
    "encode_photos",
    "fetch_weights",
    "mix_identities",
    "train_tiny_model",
]
