"""What the command line does, callable from Python: encode photos, generate pictures, convert weights."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import IdcoreError, InputError, WeightsError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from .identity import Identity

TINY_BATCH = 16


@dataclass(frozen=True)
class GenerateRequest:
    """Arguments of `idcore generate`; see `idcore generate --help` for each."""

    prompt: str
    out: Path
    id: Path | None = None
    base: str = "tiny"
    negative: str = ""
    steps: int = 4
    seed: int = 0
    count: int = 1
    id_scale: float = 1.0
    guidance: float = 1.2
    width: int = 768
    height: int = 1024
    system: str = "auto"
    weights: Path | None = None
    vision: Path | None = None
    parsing: Path | None = None
    retinaface: Path | None = None
    preset: str | None = None
    faces: str = "embedded"
    choose: str = "largest"


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
) -> Identity:
    """Photos of one person to an identity of the named system.

    Args:
        photos: one or several files (JPEG, PNG, WEBP).
        system: "tiny", or "pulid", "faceid", "instantid", "auto" (what `weights` holds).
        weights, vision, parsing, retinaface: files of the system, see `idcore.systems.loading.load_system`.
        faces: "embedded" or a folder with SCRFD and ArcFace models.
        choose: which face: "largest", "center", "only", or a number.
    """
    if not photos:
        raise InputError("encode: wanted at least one photo, got none")
    if system == "tiny":
        from .sampling.tiny_pipeline import TinyPipeline

        analyzer = None if faces == "embedded" else _analyzer(faces)
        return TinyPipeline.from_package().encode(list(photos), analyzer, face_choice(choose))
    from .systems.loading import SYSTEMS, load_system

    if system not in ("auto", *SYSTEMS):
        raise InputError(f'encode: system must be "tiny", "auto", {", ".join(SYSTEMS)}, got {system!r}')
    loaded = load_system(
        weights,
        system=system,
        vision=vision,
        parsing=parsing,
        retinaface=retinaface,
        faces=faces,
        policy=face_choice(choose),
    )
    return loaded.encode(list(photos))


def mix_identities(files: Sequence[Path], out: Path, weights: str | None = None) -> Identity:
    """Mix identity files as `Identity.mix` does and write the result; `weights` as "0.7,0.3"."""
    from .identity import Identity

    if len(files) < 2:
        raise InputError(f"mix: wanted at least two identities, got {len(files)}")
    try:
        numbers = None if weights is None else [float(w) for w in weights.split(",")]
    except ValueError:
        raise InputError(f'mix: weights must be numbers such as "0.7,0.3", got {weights!r}') from None
    mixed = Identity.mix([Identity.load(f) for f in files], numbers)
    mixed.save(out)
    return mixed


def _analyzer(faces: str):
    from .encoders.analyzer import analyzer_from

    return analyzer_from(faces)


def _is_identity(path: Path) -> bool:
    return path.suffix == ".safetensors"


def generate_pictures(r: GenerateRequest) -> list[Path]:
    """Make the pictures and write them with `generate.json` into `r.out`; returns the pictures' paths.

    Picture i is made from seed `r.seed + i` alone, so that it does not depend on the count.
    """
    if not r.prompt.strip():
        raise InputError("generate: the prompt is empty; write what to draw in words")
    out = writable_folder(r.out)
    tiny = (
        r.base == "tiny" or (Path(r.base) / "config.json").is_file() and (Path(r.base) / "model.safetensors").is_file()
    )
    run = _generate_tiny if tiny else _generate_folder
    made, info = run(r)
    paths = []
    for i, picture in enumerate(made):
        paths.append(save_picture(picture, out / f"{i:03d}_seed{r.seed + i}.png"))
    info["request"] = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(r).items()}
    info["pictures"] = [p.name for p in paths]
    write_text(out / "generate.json", json.dumps(info, indent=1))
    return paths


def _bar(total: int):
    from tqdm import tqdm

    return tqdm(total=total, unit="picture", desc="generate")


def _generate_tiny(r: GenerateRequest) -> tuple[list[Image.Image], dict[str, Any]]:
    from .identity import Identity
    from .sampling.tiny_pipeline import TinyPipeline

    if r.system not in ("auto", "tiny"):
        raise InputError(
            f'generate: base "tiny" works with system "tiny", got {r.system!r}; give --base FOLDER for SDXL'
        )
    pipe = TinyPipeline.from_package()
    identity = None
    if r.id is not None:
        found = _is_identity(r.id)
        identity = Identity.load(r.id) if found else pipe.encode(r.id, None, face_choice(r.choose))
    seeds, pictures = list(range(r.seed, r.seed + r.count)), []
    with _bar(r.count) as bar:
        for k in range(0, r.count, TINY_BATCH):
            part = seeds[k : k + TINY_BATCH]
            pictures += pipe(
                r.prompt, identity, id_scale=r.id_scale, num_inference_steps=r.steps, seed=part,
                num_images_per_prompt=len(part),
            )  # fmt: skip
            bar.update(len(part))
    info: dict[str, Any] = {}
    if r.id is not None and not _is_identity(r.id):
        info["similarity"] = similarity_report(r.id, pictures, choose=r.choose)
    return pictures, info


def similarity_report(photo: Path, pictures: Sequence[Image.Image], *, choose: str = "largest") -> dict[str, Any]:
    """Each picture against the photo by the embedded recogniser: distance, or None where no face was found."""
    from .encoders.analyzer import default_analyzer, embed_photo, find_face

    analyzer = default_analyzer()
    wanted = embed_photo(photo, analyzer, policy=face_choice(choose))[0]
    values: list[float | None] = []
    for picture in pictures:
        large = picture if min(picture.size) >= 256 else picture.resize((256, 256), 3)
        image, face = find_face(large, analyzer, on_no_face="skip")
        got: np.ndarray | None = None if face is None else analyzer.embed(image, face)
        values.append(None if got is None else round(float(analyzer.measure.value(wanted, got)), 4))
    return {"measure": analyzer.measure.describe(), "values": values}


def _load_pipeline(folder: str):
    import torch
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    path = Path(folder)
    if not (path / "model_index.json").is_file():
        raise WeightsError(
            f'generate: base must be "tiny" or a folder with an SDXL or SD 1.5 pipeline in diffusers\' layout; {path} '
            "has no model_index.json"
        )
    sd15 = '"StableDiffusionPipeline"' in (path / "model_index.json").read_text()
    cls = StableDiffusionPipeline if sd15 else StableDiffusionXLPipeline
    cuda = torch.cuda.is_available()
    dtype = torch.float16 if cuda else torch.float32
    try:
        pipe = cls.from_pretrained(path, local_files_only=True, torch_dtype=dtype)
    except (OSError, ValueError, KeyError) as e:
        raise WeightsError(f"generate: {path} does not load as a {cls.__name__}: {e}") from e
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if cuda else "cpu")


def _generate_folder(r: GenerateRequest) -> tuple[list[Image.Image], dict[str, Any]]:
    import torch

    from .attach import attach
    from .identity import Identity
    from .sampling.sdxl import few_step_scheduler
    from .systems.loading import SYSTEMS, load_system

    if r.system not in ("auto", *SYSTEMS):
        raise InputError(f"generate: a base folder works with system {', '.join(SYSTEMS)}, got {r.system!r}")
    pipe = _load_pipeline(r.base)
    if r.steps <= 8:
        pipe.scheduler = few_step_scheduler(pipe.scheduler.config)
    pictures = []
    with contextlib.ExitStack() as on:
        if r.id is not None:
            saved = _is_identity(r.id)
            system = load_system(
                r.weights, system=r.system, vision=r.vision, parsing=r.parsing, retinaface=r.retinaface, faces=r.faces,
                policy=face_choice(r.choose), preset=r.preset, for_photos=not saved,
            )  # fmt: skip
            identity = Identity.load(r.id) if saved else system.encode([r.id])
            if getattr(system, "lora_tensors", None):
                on.enter_context(system.lora(pipe))
            on.enter_context(attach(pipe, system, identity, id_scale=r.id_scale))
        with _bar(r.count) as bar:
            for i in range(r.count):  # one at a time: the same seed gives the same picture whatever the count
                generator = torch.Generator("cpu").manual_seed(r.seed + i)
                done = pipe(
                    r.prompt, negative_prompt=r.negative or None, num_inference_steps=r.steps,
                    guidance_scale=r.guidance, width=r.width, height=r.height, generator=generator,
                )  # fmt: skip
                pictures += done.images
                bar.update(1)
    return pictures, {}


def convert_weights(source: Path, out: Path, *, layout: str = "pulid", unpickle: bool = False) -> str:
    """Write published weights as safetensors, PuLID's in either layout; returns a line that says what was written."""
    from .weights import convert

    return f"{out}: {convert(source, out, layout=layout, unpickle=unpickle)}"


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
    from . import hub
    from .bundle import export_bundle, import_bundle
    from .recipes import RECIPES, recipe

    if from_bundle is not None and (names or bundle):
        raise InputError("fetch: --from-bundle takes what is in the bundle; give it alone")
    if from_bundle is not None:
        return import_bundle(from_bundle, home, say)
    if not names:
        return [f"{r.name:22} {r.what}; {r.licence}" for r in RECIPES.values()]
    names = [n for name in names for n in ([*recipe(name).needs, name] if needs else [name])]
    names = list(dict.fromkeys(names))
    if bundle is not None:
        return [str(export_bundle(names, bundle, home))]
    options = {"home": home, "accept_licence": accept_licence, "convert": convert, "say": say}
    return [str(hub.fetch(name, **options)) for name in names]


def train_tiny_model(out: Path, *, resume: bool = False, **settings: Any) -> Path:
    """Train the embedded model and export it to `out/model`; `settings` as in `training.tiny.loop.TrainConfig`."""
    from .training.tiny.export import export
    from .training.tiny.loop import TrainConfig, train_tiny

    writable_folder(out)
    if not resume and (out / "checkpoint").exists():
        raise InputError(f"{out} holds a checkpoint already; add --resume to go on with it, or choose another --out")
    train_tiny(TrainConfig(out=str(out), **settings), resume=resume)
    return export(out, out / "model")


def writable_folder(folder: Path) -> Path:
    """Make the folder, and find out now, not after the work, whether it can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise InputError(f"cannot write into {folder}: {e.strerror or e}; choose another --out folder") from e
    return folder


def save_picture(picture: Image.Image, path: Path) -> Path:
    """PNG, written beside its final name and renamed: a full disk leaves no half picture."""
    staged = path.with_name(f".{path.name}.part")
    try:
        picture.save(staged, format="PNG")
        os.replace(staged, path)
    except OSError as e:
        staged.unlink(missing_ok=True)
        raise IdcoreError(f"cannot write {path}: {e.strerror or e}; free some space or choose another folder") from e
    return path


def write_text(path: Path, text: str) -> None:
    """All or nothing."""
    staged = path.with_name(f".{path.name}.part")
    try:
        staged.write_text(text + "\n")
        os.replace(staged, path)
    except OSError as e:
        staged.unlink(missing_ok=True)
        raise IdcoreError(f"cannot write {path}: {e.strerror or e}; free some space or choose another folder") from e


__all__ = [
    "GenerateRequest",
    "convert_weights",
    "encode_photos",
    "fetch_weights",
    "generate_pictures",
    "mix_identities",
    "similarity_report",
    "train_tiny_model",
]
