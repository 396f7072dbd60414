"""`idcore generate`, callable from Python: pictures of a prompt, with a person's identity, written to a folder."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError
from .generating_album import Album
from .generating_checks import check_texts, unused
from .photos import telling_faces
from .results import is_result
from .workflows import (
    analyzer,
    chosen_files,
    face_choice,
    preset_of,
    write_text,
)

if TYPE_CHECKING:
    from PIL import Image

TINY_SD = "tiny-sd"
TINY_BATCH = 16
GUIDANCE = 1.2  # where none is given; the embedded models draw without
MARGIN = 0.0625  # of the longer side, by which people's regions are grown before the background's text; our choice


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
    id_scale: float | Sequence[float] = 1.0
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    system: str = "auto"
    weights: Path | None = None
    vision: Path | None = None
    parsing: Path | None = None
    retinaface: Path | None = None
    preset: str | None = None
    faces: str = "embedded"
    choose: str = "largest"
    placeholder: str | Sequence[str] | None = None
    id_start: float = 0.0
    id_end: float = 1.0
    masks: Sequence[Path] = ()
    layout: str | None = None
    styles: Sequence[Path] = ()
    style_scale: float | Sequence[float] = 1.0
    background: str | None = None
    person_region: str | None = None
    person_margin: float = MARGIN
    like: Sequence[Path] = ()
    compare: bool = False
    sampler: str = "auto"
    runner: str = "eager"
    quantize: str | None = None
    offload: str | None = None
    unet_weights: Path | None = None
    config: Path | None = None
    command: str = "generate"  # whose it is, for errors

    def people(self) -> list[Path]:
        """Photos and identities of those who are to be drawn."""
        if self.id is None:
            return []
        return [self.id] if isinstance(self.id, Path) else list(self.id)

    def scales(self, places: Sequence[int]) -> list[float]:
        """Strengths of some of the people.

        Raises:
            InputError: another number of strengths than people.
        """
        if isinstance(self.id_scale, (int, float)):
            return [float(self.id_scale)] * len(places)
        count = max(1, len(self.people()))
        if len(self.id_scale) != count:
            raise InputError(f"{self.command}: {count} people need one --id-scale or {count}, got {len(self.id_scale)}")
        return [float(self.id_scale[i]) for i in places]

    def guides(self) -> float:
        """The guidance scale."""
        if self.guidance is not None:
            return self.guidance
        return 1.0 if is_tiny_sd(self.base) or is_tiny(self.base) else GUIDANCE


def is_tiny(base: str) -> bool:
    """Whether this names an embedded model: "tiny", or a folder of `idcore train tiny`."""
    folder = Path(base)
    there = (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()
    return base == "tiny" or there and not is_tiny_sd(base)


def is_tiny_sd(base: str) -> bool:
    """Whether this names the small model in SD 1.5's layout: "tiny-sd", or a folder of `idcore train tiny-sd`."""
    from .training.bases import opening

    return base == TINY_SD or opening.is_tiny_sd(Path(base))


def generate_pictures(r: GenerateRequest, say: Callable[[str], Any] = lambda text: None) -> list[Path]:
    """Make the pictures and write them with `generate.json` into `r.out`; returns the pictures' paths.

    Picture i is made from seed `r.seed + i` alone, so that it does not depend on the count. With `r.compare` the same
    pictures without the styles are written into `r.out/without_style`.

    Args:
        r: what to draw.
        say: gets lines about how alike the pictures are to the people's photos.
    """
    _check(r)
    for line in unused(r):
        say(line)
    album = Album(r)
    try:
        if is_tiny(r.base):
            info = _generate_tiny(r, say, album)
        else:
            from .generating_styles import unsaid_words

            for line in unsaid_words(r.styles, [r.prompt, r.background or ""]):
                say(line)
            info = _generate_on_base(r, say, album)
    except KeyboardInterrupt:
        if line := album.what_is_left():
            say(line)
        raise
    info["request"] = plain_values(asdict(r))
    info["pictures"] = [p.name for p in album.paths]
    write_text(album.folder / "generate.json", json.dumps(info, indent=1))
    return album.paths


def _check(r: GenerateRequest) -> None:
    """What can be told before anything is loaded."""
    from .generating_likeness import photos_of

    check_texts(r)
    photos = photos_of(r)
    if r.compare and not r.styles:
        raise InputError("generate: --compare draws the same pictures without --style, and there is none")
    if r.compare and all(p is None for p in photos):
        raise InputError(
            "generate: --compare measures how alike the pictures are to the people's photos: give --like PHOTO, one "
            "per --id, or photos as --id"
        )


def plain_values(value: Any) -> Any:
    """Paths as text, for JSON."""
    if isinstance(value, dict):
        return {k: plain_values(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_values(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def about(r: GenerateRequest) -> dict[str, str]:
    """What the pictures say of themselves. People by a hash of their files alone: a name is personal."""
    from . import __version__
    from .files import file_hash
    from .generating_people import person_path
    from .generating_styles import style_file

    people = r.people() or [f for f in [r.weights] if f is not None and r.system == "sefi-ide"]
    styles = [p for p in map(style_file, r.styles) if p.is_file()]  # folders of peft have no one file
    scales = " ".join(map(str, r.scales(range(len(people)))))
    return {
        "prompt": r.prompt, "negative_prompt": r.negative, "background_prompt": r.background or "",
        "steps": str(r.steps), "guidance_scale": str(r.guides()), "base": Path(r.base).name,
        "identity_sha256": " ".join(file_hash(person_path(p)) for p in people), "id_scale": scales or str(r.id_scale),
        "style_sha256": " ".join(file_hash(p) for p in styles), "software": f"idcore {__version__}",
    }  # fmt: skip


def _generate_on_base(r: GenerateRequest, say: Callable[[str], Any], album: Album) -> dict[str, Any]:
    from .generating_base import pictures_of_base
    from .generating_likeness import compared, in_words, photos_of
    from .generating_regions import masks_of

    with contextlib.ExitStack() as ending:
        bars: list[Any] = []

        def done(picture: Image.Image | None, without_style: bool) -> None:
            if not bars:  # once the base is open: a bar beside an error would only be in its way
                bars.append(ending.enter_context(progress(r.count * (2 if r.compare else 1))))
            if picture is not None:
                album.add(picture, without_style)
                bars[0].update(1)

        made, plain = pictures_of_base(r, range(r.seed, r.seed + r.count), done, say)
    found = compared(r, made, plain, masks_of(r, len(r.people())))
    for line in in_words(found, photos_of(r)) if found else ():
        say(line)
    return {"similarity": found} if found else {}


def progress(total: int, what: str = "generate"):
    """A bar that counts pictures."""
    from tqdm import tqdm

    return tqdm(total=total, unit="picture", desc=what)


# What the embedded model cannot do: options that must be as they are when not given.
TINY_LACKS = (
    "negative", "guidance", "width", "height", "weights", "vision", "parsing", "retinaface", "placeholder", "masks",
    "layout", "styles", "style_scale", "background", "person_region", "sampler", "runner", "quantize", "offload",
    "unet_weights", "config",
)  # fmt: skip


def _check_tiny(r: GenerateRequest) -> None:
    """Refuse what the embedded model would not do."""
    usual = {f.name: f.default for f in fields(r)} | ({"guidance": 1.0} if r.guidance == 1 else {})
    given = [n for n in TINY_LACKS if getattr(r, n) != usual[n]]
    given = [f"--{ {'masks': 'mask', 'styles': 'style'}.get(n, n).replace('_', '-') }" for n in given]
    if r.preset is not None and not is_result(r.system):
        given.append("--preset")
    if given or len(r.people()) > 1:
        what = ", ".join(given) or "several --id"
        raise InputError(
            f'generate: {what}: base "tiny" draws one person everywhere, in 64x64, with a system and a sampler of its '
            "own and without guidance; leave that out, or give --base FOLDER for SDXL or SD 1.5, or --base tiny-sd"
        )


def _generate_tiny(r: GenerateRequest, say: Callable[[str], Any], album: Album) -> dict[str, Any]:
    from .generating_likeness import check_photos, judge_of, likeness, photos_of, summary_line
    from .generating_people import is_saved
    from .identity import Identity
    from .sampling.tiny_pipeline import TinyPipeline
    from .sampling.tiny_text import unknown_words

    if r.system not in ("auto", "tiny") and not is_result(r.system):
        raise InputError(
            f'generate: base "tiny" works with system "tiny" or the result folder of a training on it, got '
            f"{r.system!r}; give --base FOLDER for SDXL"
        )
    _check_tiny(r)
    check_photos(r)
    pipe = TinyPipeline.from_package() if r.base == "tiny" else TinyPipeline.from_folder(r.base)
    if unread := unknown_words(r.prompt):
        say(
            f"the embedded model never learned: {', '.join(unread)}. It draws heads of people, with backgrounds, "
            "styles, smiles and views by a few words"
        )
    who = next(iter(r.people()), None)
    photo = who is not None and not is_saved(who)
    if is_result(r.system):
        pipe = pipe.with_system(_result_system(r, for_photos=photo))
    identity = None
    if who is not None:
        with telling_faces(say):
            identity = pipe.encode(who, analyzer(r.faces), face_choice(r.choose)) if photo else Identity.load(who)
    seeds, pictures = list(range(r.seed, r.seed + r.count)), []
    with progress(r.count) as bar:
        for k in range(0, r.count, TINY_BATCH):
            part = seeds[k : k + TINY_BATCH]
            for picture in pipe(
                r.prompt, identity, id_scale=next(iter(r.scales([0]))), num_inference_steps=r.steps, seed=part,
                num_images_per_prompt=len(part), id_guidance_start=r.id_start, id_guidance_end=r.id_end,
            ):  # fmt: skip
                pictures.append(picture)
                album.add(picture)
            bar.update(len(part))
    shown = next(iter(photos_of(r)), None)
    if shown is None:
        return {}
    judge = judge_of(r)
    values = likeness(shown, pictures, judge, choose=r.choose)
    say(f"{summary_line(shown.name, values, judge.measure)}\n{judge.measure.describe()}")
    return {"similarity": {"measure": judge.measure.describe(), "values": values}}


def _result_system(r: GenerateRequest, *, for_photos: bool) -> Any:
    """The system of a training's result folder."""
    from .systems.loading import load_system

    files = chosen_files(r.system, {}, for_photos=for_photos)
    preset = preset_of(r.system, r.preset)
    return load_system(**files, policy=face_choice(r.choose), preset=preset, for_photos=for_photos)
