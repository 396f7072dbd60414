"""A folder of drawn people with captions: data for trying a training out where there are no photographs."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ...errors import IdcoreError, InputError
from ..tiny.people import sample_person, sample_view
from ..tiny.prompts import BACKGROUNDS, write_prompt
from ..tiny.renderer import render
from ..tiny.styles import stylise

FIRST_PERSON = 8_000_000  # the embedded model's own people, its gate's and its tests' lie below
# Mostly like photographs: what is learned of a person should come from how that person looks (our choice).
STYLES = {"photo": 0.7, "pencil": 0.06, "oil": 0.06, "cartoon": 0.06, "sepia": 0.06, "night": 0.06}
ZOOM = 0.12


def draw(
    seed: int, size: int = 128, styles: Mapping[str, float] = STYLES, zoom: float = ZOOM
) -> tuple[Image.Image, str]:
    """One person, seen once: picture and caption. The seed decides everything."""
    rng = np.random.default_rng(FIRST_PERSON + seed)
    person, view = sample_person(rng), sample_view(rng)
    large = int(size * rng.uniform(1.0, 1.0 + zoom))
    x, y = (int(rng.integers(large - size + 1)) for _ in range(2))
    drawn = render(person, view, large)[y : y + size, x : x + size].astype(np.float32) / 255
    share = np.array(list(styles.values()), np.float64)
    style = list(styles)[rng.choice(len(styles), p=share / share.sum())]
    background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    said = [view[key] if rng.random() < 0.7 else None for key in ("expression", "pose")]
    caption = write_prompt(rng, style, background, *said)
    figure, cover = drawn[..., :3], drawn[..., 3:]
    wall = np.array(BACKGROUNDS[background], np.float32) / 255
    light = torch.from_numpy(rng.normal(0, 0.05, (1, 1, 2, 2)).astype(np.float32))
    light = F.interpolate(light, (size, size), mode="bilinear", align_corners=False)[0, 0, :, :, None].numpy()
    # The style is put on the person over grey, so that the wall keeps the colour that the caption names.
    on_grey = torch.from_numpy(figure * cover + 0.5 * (1 - cover)).permute(2, 0, 1)[None]
    styled = stylise(on_grey, [style])[0].permute(1, 2, 0).numpy()
    pixels = styled * cover + wall * (1 + light) * (1 - cover)
    return Image.fromarray((pixels.clip(0, 1) * 255 + 0.5).astype(np.uint8)), caption


def _write(folder: str, index: int, seed: int, size: int, styles: Mapping[str, float], zoom: float) -> None:
    picture, caption = draw(seed, size, styles, zoom)
    data = io.BytesIO()
    picture.save(data, format="PNG", compress_level=1)
    name = Path(folder) / f"{index:06d}"
    # The caption first: a picture that stands is whole, caption included.
    for path, content in ((name.with_suffix(".txt"), f"{caption}\n".encode()), (name.with_suffix(".png"), data)):
        staged = path.with_name(f".{path.name}.{os.getpid()}.part")
        staged.write_bytes(content.getvalue() if isinstance(content, io.BytesIO) else content)
        os.replace(staged, path)


def procedural_folder(
    out: str | Path,
    people: int = 400,
    seed: int = 0,
    *,
    size: int = 128,
    styles: Mapping[str, float] = STYLES,
    zoom: float = ZOOM,
    workers: int = 1,
    progress: bool = True,
) -> Path:
    """Draw a folder of PNG pictures with captions beside them; what stands there already is kept.

    Args:
        out: the folder; made where it is missing.
        people: pictures, one of each person.
        seed: another seed draws other people.
        size: edge in pixels; from 96 on the embedded detector finds the faces.
        styles: shares of the styles of `idcore.training.tiny.styles`.
        zoom: pictures are drawn up to this share larger, and cut; 0: all in the frame of the shipped models' pictures.
        workers: processes.

    Raises:
        InputError: sizes that do not work. IdcoreError: the folder cannot be written.
    """
    from tqdm import tqdm

    if people < 1 or size < 96 or workers < 1:
        raise InputError(
            f"procedural data: wanted at least 1 person, 96 pixels and 1 worker, got {people}, {size} and {workers}"
        )
    if not 0 <= zoom <= 1:
        raise InputError(f"procedural data: zoom must be 0 to 1 (share by which pictures are enlarged), got {zoom!r}")
    out = Path(out)
    missing = [i for i in range(people) if not (out / f"{i:06d}.png").exists()]
    jobs = [(str(out), i, seed * 1_000_000 + i, size, dict(styles), zoom) for i in missing]
    bar = tqdm(total=len(jobs), desc="drawing people", unit="picture", disable=not progress or not jobs)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if workers == 1:
            for job in jobs:
                _write(*job)
                bar.update()
        else:
            # Not forked: a child of a process with running thread pools may wait for their locks for ever.
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                for _ in pool.map(_write, *zip(*jobs), chunksize=8):
                    bar.update()
    except OSError as e:
        raise IdcoreError(
            f"cannot write {out}: {e.strerror or e}; free some space or choose another folder, and run it again: "
            "what was drawn is kept"
        ) from e
    finally:
        bar.close()
    return out
