"""What is put together: drawn people unseen by any training, the systems that carry them, and a style."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ...identity import Identity
from ...metrics.drawn_attributes import drawn_photo, table_people
from ...results import is_result
from ..resuming import begun
from ..tiny.people import sample_person

PHOTO = 256  # pixels of the photos that people are encoded and learned from
REFS = 16  # StyleRef images, and as many Aux images (arXiv 2404.05256: 15 to 20 each)
REF_SEED = 5_600_000  # of the people on them; none is a person of the table


@dataclass(frozen=True)
class Settings:
    """Of the study; all our choice."""

    base: str = "tiny-sd"
    style: str = "pencil"
    people: int = 3
    seeds: tuple[int, ...] = (0, 1, 2)
    style_changes: tuple[str, ...] = ("loop.steps=60", "loop.batch=4", "loop.validate_every=0", "pictures.mix=false")
    person_changes: tuple[str, ...] = ("loop.steps=60", "loop.batch=4", "loop.lr=3e-3", "loop.validate_every=0")


@dataclass
class Carrier:
    """A way to bring a person into the picture: `of(person)` gives an identity, `system` what puts it on."""

    name: str
    of: Any
    system: Any = None
    by_prompt: bool = True


def photos(settings: Settings, out: Path) -> tuple[list[int], list[Path], Any]:
    """Seeds of the people, a photo of each below `out`, and the exam that knows them."""
    seeds, exam = table_people(settings.people)
    files = []
    for i, seed in enumerate(seeds):
        path = out / "people" / f"p{i}.png"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            drawn_photo(seed, size=PHOTO).save(path)
        files.append(path)
    return seeds, files, exam


def style_pictures(style: str, count: int = REFS, first: int = REF_SEED) -> list[Image.Image]:
    """Other people in a style, every fourth picture a wall without anybody."""
    from ..tiny.prompts import BACKGROUNDS, COLOURS
    from ..tiny.styles import stylise
    from ..tiny.textures import texture_bank

    grain, made = texture_bank(4, 64).astype(np.float32) / 255 - 0.5, []
    for i in range(count):
        colour = COLOURS[i % len(COLOURS)]
        if i % 4 != 3:
            made.append(drawn_photo(first + i, style=style, background=colour, number=i))
            continue
        wall = np.clip(np.float32(BACKGROUNDS[colour]) / 255 + 0.2 * grain[i // 4 % len(grain)], 0, 1)
        x = stylise(torch.from_numpy(wall).permute(2, 0, 1)[None], [style])
        made.append(Image.fromarray((x[0].permute(1, 2, 0).clamp(0, 1) * 255 + 0.5).to(torch.uint8).numpy()))
    return made


def trained_style(settings: Settings, base: Any, seed: int, out: Path, say: Any) -> Path:
    """StyleForge's result folder for this seed; trained where it is not there yet."""
    from ..styleforge.config import load_config
    from ..styleforge.run import StyleData, train_styleforge

    folder = out / f"style_{seed}"
    if not is_result(folder / "model"):
        changes = [*settings.style_changes, f"loop.seed={seed}", "loop.trackers="]
        config = load_config(None, changes, settings.base)
        # Aux images mean "style" as art of people, in other hands than the target style.
        data = StyleData(style_pictures(settings.style), style_pictures("oil", first=REF_SEED + 1000))
        train_styleforge(config, data, folder, base=base, resume=begun(folder), say=say)
    return folder / "model"


def learned_person(settings: Settings, base: Any, photo: Path, seed: int, out: Path, say: Any) -> Identity:
    """A person of SeFi-IDE, learned from one photo where it is not there yet."""
    from ...systems.sefi_files import load_tokens
    from ..sefi_ide.config import load_config
    from ..sefi_ide.run import train_sefi_ide

    folder = out / f"sefi_{photo.stem}_{seed}"
    if not is_result(folder / "model"):
        changes = [*settings.person_changes, f"loop.seed={seed}", "loop.trackers="]
        config = load_config(None, changes, settings.base)
        train_sefi_ide(config, folder, images=[photo], base=base, resume=begun(folder), say=say)
    return load_tokens(folder / "model" / "person.safetensors")


def own_word(seed: int, width: int) -> Identity:
    """The word by which tiny-sd would know this person: what an encoder of faces to one word could reach at best."""
    from ..tiny_sd.codes import codes

    word = codes([sample_person(np.random.default_rng(seed), wildness=0.0)], width)
    return Identity(torch.from_numpy(word)[None], None, "dreamidentity", {"class_word": "person"})


def carriers(
    settings: Settings, base: Any, seeds: Sequence[int], files: Sequence[Path], out: Path, say: Any,
    *, pulid: Path | None = None, dream: Path | None = None,
) -> list[Carrier]:  # fmt: skip
    """Those that there are: the person's own word, SeFi-IDE (trained here), and PuLID and DreamIdentity where given."""
    from ...systems.loading import load_system
    from ...workflows import chosen_files

    width = base.pipe.text_encoder.config.hidden_size
    found = [
        Carrier("own word", lambda i: own_word(seeds[i], width)),
        Carrier("SeFi-IDE", lambda i: learned_person(settings, base, files[i], settings.seeds[0], out, say)),
    ]
    for name, path in (("DreamIdentity", dream), ("PuLID", pulid)):
        if path is None:
            continue
        spec = (str(path), {}) if is_result(path) else ("auto", {"weights": path})
        system = load_system(**chosen_files(*spec, for_photos=True), for_photos=True)
        encoded = [system.encode([f]) for f in files]
        found.append(Carrier(name, lambda i, e=encoded: e[i], system, hasattr(system, "put_on")))
    return found
