"""`idcore generate`, callable from Python: pictures of a prompt, with a person's identity, written to a folder."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError, WeightsError
from .workflows import analyzer, check_system, chosen_files, face_choice, save_picture, writable_folder, write_text

if TYPE_CHECKING:
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
    placeholder: str | None = None


def _is_identity(path: Path) -> bool:
    return path.suffix == ".safetensors"


def is_tiny(base: str) -> bool:
    """Whether this names an embedded model: "tiny", or a folder of `idcore train tiny`."""
    folder = Path(base)
    return base == "tiny" or (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()


def generate_pictures(r: GenerateRequest) -> list[Path]:
    """Make the pictures and write them with `generate.json` into `r.out`; returns the pictures' paths.

    Picture i is made from seed `r.seed + i` alone, so that it does not depend on the count.
    """
    if not r.prompt.strip():
        raise InputError("generate: the prompt is empty; write what to draw in words")
    out = writable_folder(r.out)
    run = _generate_tiny if is_tiny(r.base) else _generate_folder
    made, info = run(r)
    paths = []
    for i, picture in enumerate(made):
        paths.append(save_picture(picture, out / f"{i:03d}_seed{r.seed + i}.png"))
    info["request"] = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(r).items()}
    info["pictures"] = [p.name for p in paths]
    write_text(out / "generate.json", json.dumps(info, indent=1))
    return paths


def _saved(path: Path) -> Identity | None:
    """A saved identity, or the words of a textual inversion file; None: a photo."""
    from .identity import Identity
    from .systems.sefi_files import is_sefi_file, load_tokens
    from .text.inversion import is_inversion, read_words

    if not _is_identity(path):
        return None
    if is_sefi_file(path):
        return load_tokens(path)
    return read_words(path) if is_inversion(path) else Identity.load(path)


def _person_file(r: GenerateRequest) -> Path | None:
    """`--weights` where they are a person by themselves (SeFi-IDE)."""
    from .systems.sefi_files import is_sefi_file

    if r.weights is None or not _is_identity(r.weights):
        return None
    found = is_sefi_file(r.weights)
    if r.system == "sefi-ide" and not found:
        raise WeightsError(f"generate: {r.weights} holds no person of SeFi-IDE; train one, or name another --system")
    return r.weights if found else None


def require_placeholders(prompt: str, placeholders: Sequence[str]) -> None:
    """Raise InputError where a person that acts through the prompt is not in it."""
    from .text.placeholders import mentions

    for name in placeholders:
        if not mentions(prompt, [name]):
            raise InputError(
                f'generate: this identity acts through the prompt, which does not say {name}; write e.g. "a photo of '
                f'{name}", or name another word with --placeholder'
            )


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
    pipe = TinyPipeline.from_package() if r.base == "tiny" else TinyPipeline.from_folder(r.base)
    identity = None
    if r.id is not None:
        found = _is_identity(r.id)
        identity = Identity.load(r.id) if found else pipe.encode(r.id, analyzer(r.faces), face_choice(r.choose))
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

    judge = default_analyzer()
    wanted = embed_photo(photo, judge, policy=face_choice(choose))[0]
    values: list[float | None] = []
    for picture in pictures:
        large = picture if min(picture.size) >= 256 else picture.resize((256, 256), 3)
        image, face = find_face(large, judge, on_no_face="skip")
        got = None if face is None else judge.embed(image, face)
        values.append(None if got is None else round(float(judge.measure.value(wanted, got)), 4))
    return {"measure": judge.measure.describe(), "values": values}


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
    from .sampling.sdxl import few_step_scheduler
    from .systems.loading import load_system, system_for

    if r.system == "tiny":
        raise InputError(
            'generate: system "tiny" works on the embedded model alone; drop --base, or name another system'
        )
    check_system(r.system)
    pipe = _load_pipeline(r.base)
    if r.steps <= 8:
        pipe.scheduler = few_step_scheduler(pipe.scheduler.config)
    pictures = []
    with contextlib.ExitStack() as on:
        who = r.id or _person_file(r)
        if who is not None:
            identity = _saved(who)
            system = None if identity is None else system_for(identity)
            if system is None:
                names = ("weights", "vision", "parsing", "retinaface", "faces")
                photo = identity is None
                files = chosen_files(r.system, {n: getattr(r, n) for n in names}, for_photos=photo)
                system = load_system(**files, policy=face_choice(r.choose), preset=r.preset, for_photos=photo)
                identity = identity or system.encode([who])
            if getattr(system, "lora_tensors", None):
                on.enter_context(system.lora(pipe))
            named = {} if r.placeholder is None else {"placeholder": r.placeholder}
            handle = on.enter_context(attach(pipe, system, identity, id_scale=r.id_scale, **named))
            require_placeholders(r.prompt, getattr(handle, "placeholders", ()))
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
