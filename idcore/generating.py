"""`idcore generate`, callable from Python: pictures of a prompt, with a person's identity, written to a folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError
from .results import is_result
from .workflows import (
    analyzer,
    chosen_files,
    face_choice,
    preset_of,
    save_picture,
    writable_folder,
    write_text,
)

if TYPE_CHECKING:
    from PIL import Image

TINY_BATCH = 16


@dataclass(frozen=True)
class GenerateRequest:
    """Arguments of `idcore generate`; see `idcore generate --help` for each."""

    prompt: str
    out: Path
    id: Path | Sequence[Path] | None = None
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
    id_start: float = 0.0
    id_end: float = 1.0
    masks: Sequence[Path] = ()
    layout: str | None = None
    sampler: str = "auto"
    runner: str = "eager"
    quantize: str | None = None
    offload: str | None = None
    unet_weights: Path | None = None
    config: Path | None = None

    def people(self) -> list[Path]:
        """Photos and identities of those who are to be drawn."""
        if self.id is None:
            return []
        return [self.id] if isinstance(self.id, Path) else list(self.id)


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
    run = _generate_tiny if is_tiny(r.base) else _generate_on_base
    made, info = run(r)
    info["request"] = {k: _plain(v) for k, v in asdict(r).items()}
    about = _about(r)
    paths = []
    for i, picture in enumerate(made):
        named = {**about, "seed": str(r.seed + i)}
        paths.append(save_picture(picture, out / f"{i:03d}_seed{r.seed + i}.png", named))
    info["pictures"] = [p.name for p in paths]
    write_text(out / "generate.json", json.dumps(info, indent=1))
    return paths


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _about(r: GenerateRequest) -> dict[str, str]:
    """What the pictures say of themselves. People by a hash of their files alone: a name is personal."""
    from . import __version__
    from .files import file_hash

    people = r.people() or [f for f in [r.weights] if f is not None and r.system == "sefi-ide"]
    return {
        "prompt": r.prompt, "negative_prompt": r.negative, "steps": str(r.steps), "guidance_scale": str(r.guidance),
        "base": Path(r.base).name, "identity_sha256": " ".join(file_hash(p) for p in people),
        "id_scale": str(r.id_scale), "software": f"idcore {__version__}",
    }  # fmt: skip


def _generate_on_base(r: GenerateRequest) -> tuple[list[Image.Image], dict[str, Any]]:
    from .generating_base import pictures_of_base

    with _bar(r.count) as bar:
        return pictures_of_base(r, range(r.seed, r.seed + r.count), bar.update), {}


def _bar(total: int):
    from tqdm import tqdm

    return tqdm(total=total, unit="picture", desc="generate")


def _generate_tiny(r: GenerateRequest) -> tuple[list[Image.Image], dict[str, Any]]:
    from .generating_base import is_saved
    from .identity import Identity
    from .sampling.tiny_pipeline import TinyPipeline

    if r.system not in ("auto", "tiny") and not is_result(r.system):
        raise InputError(
            f'generate: base "tiny" works with system "tiny" or the result folder of a training on it, got '
            f"{r.system!r}; give --base FOLDER for SDXL"
        )
    pipe = TinyPipeline.from_package() if r.base == "tiny" else TinyPipeline.from_folder(r.base)
    given = [f"--{n}" for n in ("mask", "layout", "unet-weights", "quantize", "offload") if _given(r, n)]
    if given or len(r.people()) > 1:
        what = ", ".join(given) or "several --id"
        raise InputError(f'generate: {what}: base "tiny" draws one person everywhere; give --base FOLDER for SDXL')
    who = next(iter(r.people()), None)
    photo = who is not None and not is_saved(who)
    if is_result(r.system):
        pipe = pipe.with_system(_result_system(r, for_photos=photo))
    identity = None
    if who is not None:
        identity = pipe.encode(who, analyzer(r.faces), face_choice(r.choose)) if photo else Identity.load(who)
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
    if photo:
        info["similarity"] = similarity_report(who, pictures, choose=r.choose)
    return pictures, info


def _given(r: GenerateRequest, option: str) -> bool:
    return bool(getattr(r, {"mask": "masks"}.get(option, option.replace("-", "_"))))


def _result_system(r: GenerateRequest, *, for_photos: bool) -> Any:
    """The system of a training's result folder."""
    from .systems.loading import load_system

    files = chosen_files(r.system, {}, for_photos=for_photos)
    preset = preset_of(r.system, r.preset)
    return load_system(**files, policy=face_choice(r.choose), preset=preset, for_photos=for_photos)


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
