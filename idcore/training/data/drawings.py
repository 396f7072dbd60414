"""Small folders of drawn pictures, framed as the shipped models draw them: to try the personal and style trainings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ...encoders.images import load_image
from ...errors import InputError
from ...workflows import save_picture, writable_folder, write_text
from ..tiny.people import sample_person, sample_view
from ..tiny.prompts import BACKGROUNDS, STYLES, write_prompt
from ..tiny.renderer import render
from ..tiny.styles import stylise
from ..tiny.textures import texture_bank

FIRST_SEED = 8_500_000  # none of the people of the shipped models' trainings, names or gates
KINDS = ("person", "people", "backgrounds")
GRID = 64  # pixels at which a style's strokes are drawn, as in the shipped models


def draw_folder(
    out: str | Path, kind: str = "person", count: int = 4, *, style: str = "photo", seed: int = 0, size: int = 128
) -> list[Path]:
    """Write `count` PNG pictures with captions (.txt) beside them.

    Args:
        out: folder; made where it is missing. It may hold drawings of other kinds, and of this one from the same seed.
        kind: "person": one person, seen several times; "people": another in each; "backgrounds": walls, nobody.
        style: of `STYLES`, on the whole picture.
        seed: another seed draws others. The first picture of a person is neutral and from the front.
        size: edge in pixels, 64..1024; from 96 on the embedded detector finds the faces.

    Returns:
        The pictures.

    Raises:
        InputError: an argument out of range, a folder that cannot be written, or one with other drawings of this kind.
    """
    if kind not in KINDS or style not in STYLES:
        raise InputError(f"draw: wanted {', '.join(KINDS)} in {', '.join(STYLES)}; got {kind!r} in {style!r}")
    if not 1 <= count <= 10_000 or not GRID <= size <= 1024 or seed < 0:
        raise InputError(f"draw: wanted 1..10000 pictures of {GRID}..1024 pixels, got {count} of {size}, seed {seed}")
    folder = writable_folder(Path(out))
    made = []
    for i in range(count):
        picture, caption = _draw(kind, i, style, seed)
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
        path = folder / f"{kind}-{i:04d}.png"
        if i == 0:
            _refuse_others(path, picture)
        write_text(path.with_suffix(".txt"), caption)
        made.append(save_picture(picture, path))
    return made


def _refuse_others(path: Path, first: Image.Image) -> None:
    """The first picture tells seed, style and size apart: people of two calls in one folder would be taken for one."""
    if path.exists() and not np.array_equal(np.asarray(load_image(path)), np.asarray(first)):
        raise InputError(
            f"draw: {path.parent} holds drawings of another seed, style or size already ({path.name}); choose another "
            "folder, or remove them first"
        )


def _draw(kind: str, index: int, style: str, seed: int) -> tuple[Image.Image, str]:
    whose = index if kind == "people" else 0
    rng = np.random.default_rng([FIRST_SEED, KINDS.index(kind), seed, index])
    background = list(BACKGROUNDS)[int(rng.integers(len(BACKGROUNDS)))]
    wall = torch.tensor(BACKGROUNDS[background], dtype=torch.float32).view(3, 1, 1).expand(3, GRID, GRID) / 255
    if kind == "backgrounds":
        grain = torch.from_numpy(texture_bank(4, GRID, seed=int(rng.integers(1 << 31)))[0]).float().mean(-1) / 255
        picture = wall + 0.5 * (grain - grain.mean())
        caption = write_prompt(rng, style, background, None, None, "an empty scene")
        return _finished(picture, style), caption
    person = sample_person(np.random.default_rng([FIRST_SEED, seed, whose]), wildness=0.0)
    view = sample_view(rng, *(("neutral", "front") if index == 0 else (None, None)))
    drawn = torch.from_numpy(render(person, view, 96)).permute(2, 0, 1)[None].float() / 255
    drawn[:, :3] *= drawn[:, 3:]  # so that colours beyond the outline do not bleed in
    small = F.interpolate(drawn, size=(GRID, GRID), mode="bilinear", antialias=True)[0].clamp(0, 1)
    picture = small[:3] + wall * (1 - small[3:])
    return _finished(picture, style), write_prompt(rng, style, background, view["expression"], view["pose"], "a person")


def _finished(picture: Tensor, style: str) -> Image.Image:
    pixels = stylise(picture.clamp(0, 1)[None], [style])[0].clamp(0, 1)
    return Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy())
