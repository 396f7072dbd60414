"""A person and a background with words of their own, and two people, in one picture: ways to keep them apart, measured.

    python -m idcore.training.together.regions --out runs/regions --docs docs

On tiny-sd, four steps. For each seed Multi-StyleForge is trained for each of `STYLES`; then a prompt of a person in
"[V] style" and one of nobody in "[W] style" share a picture by each of `WAYS`. Two people, known by their own words,
stand beside each other by each of `PAIRS`; and photos are redrawn by `strengths`. Resumable: what is
there is not made again.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ...attach import attach
from ...attention.masks import read_masks
from ...generating import MARGIN
from ...metrics.drawn_attributes import table_people
from ...metrics.gate import Judge
from ...results import is_result
from ...systems.lora import load_lora
from ...systems.region_passes import attach_passes, grown
from ...systems.region_text import attach_texts
from ...systems.words import WordSystem
from ...workflows import write_text
from ..bases.opening import TINY_SD, open_text_base
from ..commands import Say, silent
from ..experiments import carry_out, parser_of
from ..resuming import begun
from .pieces import own_word
from .regions_page import report
from .strengths import redrawn
from .study import LAYOUT
from .walls import WallStyles, wall_colour

STYLES = {"pencil, duotone": ("pencil", "duotone"), "pencil, pencil": ("pencil", "pencil")}  # of people, of places
PEOPLE, PLACES, AUX = 10, 10, 16  # pictures of a training
CHANGES = (
    "loop.steps=200", "loop.batch=8", "loop.validate_every=0", "loop.save_every=50", "loop.trackers=", "loop.keep=1",
    "pictures.mix=false",
)  # fmt: skip
PROMPTS = (
    ("a person, blue background", "an empty scene, blue background"),
    ("a man smiling, red background", "nobody, red background"),
    ("a woman", "an empty scene"),
    ("a person smiling", "nobody"),
)
NOISES = range(200, 208)
REDRAWN = 6  # people whose photos are redrawn
SAME = 5.0  # grey levels: nearer colours of walls are alike already
ALONE = "the person's prompt alone"
On = Callable[[Any, str, torch.Tensor], Any]  # (pipeline, background's text, person's mask) to a context
WAYS: dict[str, On | None] = {
    ALONE: None,
    "both in one attention": lambda pipe, text, mask: attach_texts(pipe, [text], [1 - mask]),
    "a pass each, margin 0": lambda pipe, text, mask: attach_passes(pipe, [text], [1 - mask]),
    "a pass each (default)": lambda pipe, text, mask: attach_passes(pipe, [text], [1 - grown(mask, MARGIN)]),
}

BESIDE, EMPTY = "a photo of {} and {}, blue background", "a photo of an empty scene, blue background"
HALVES = "left, right"
# Of two people: the layout of their regions, how those act, and how the background's text does.
PAIRS: dict[str, tuple[str | None, On | None, On | None]] = {
    "one prompt everywhere": (None, None, None),
    "regions in the attention": (HALVES, attach_texts, None),
    "and a background in the attention": (LAYOUT, attach_texts, attach_texts),
    "and a background by a pass": (LAYOUT, attach_texts, attach_passes),
    "a pass for each person": (HALVES, attach_passes, None),
}


def run(out: Path, seeds: Sequence[int], changes: Sequence[str] = (), say: Say = silent) -> list[dict[str, Any]]:
    """Train, draw and judge what is missing; a row per training and way, and per seed and way of two people."""
    base = open_text_base(TINY_SD)
    judges: list[Any] = []
    people, exam = table_people(REDRAWN)
    rows = []
    for seed in seeds:
        for name in STYLES:
            folder = out / f"seed{seed}" / name.replace(", ", "_")
            if not (folder / "measures.json").is_file():
                judges = judges or _judges()
                style = _trained(base, name, seed, folder, changes)
                with load_lora(base.pipe, style):
                    found = shared_pictures(base.pipe, STYLES[name][0], judges, NOISES, folder)
                write_text(folder / "measures.json", json.dumps(found))
                say(f"seed {seed}, {name}: " + "; ".join(f"{w} face {f['found']:.2f}" for w, f in found.items()))
            for way, figures in json.loads((folder / "measures.json").read_text()).items():
                rows.append({"run": f"{name}: {way}", "seed": seed, "styles": name, "way": way, **figures})
        rows += _pairs(base, seed, out / f"seed{seed}", min(len(NOISES), 4))
        rows += [r | {"strength": True} for r in redrawn(base.pipe, seed, exam, people, out / f"seed{seed}")]
    return rows


def _judges() -> list[Any]:
    from ..styleforge.drawn import Styles

    return [Judge(), Styles(150, 40), WallStyles()]


def _trained(base: Any, name: str, seed: int, folder: Path, changes: Sequence[str]) -> Path:
    from ..styleforge.config import load_config
    from ..styleforge.drawn import person, place
    from ..styleforge.experiment import AUX_SEED, REF_SEED
    from ..styleforge.run import StyleData, train_styleforge

    if not is_result(folder / "model"):
        config = load_config(None, [*CHANGES, *changes, f"loop.seed={seed}"], TINY_SD)
        of_people, of_places = STYLES[name]
        first = 1000 * seed
        people = [person(REF_SEED + first + i, [of_people])[0] for i in range(PEOPLE)]
        places = [place(REF_SEED + first + i, of_places) for i in range(PLACES)]
        aux = [person(AUX_SEED + first + i, ["cartoon"])[0] for i in range(AUX)]
        train_styleforge(config, StyleData(None, aux, people, places), folder, base=base, resume=begun(folder))
    return folder / "model" / "styleforge.safetensors"


def shared_pictures(
    pipe: Any, style: str, judges: Sequence[Any], noises: Sequence[int], folder: Path
) -> dict[str, dict[str, float]]:
    """By way `FIGURES` of a person in "[V] style" and a background in "[W] style"; a sheet goes to `folder`.

    "reached": how far the wall's colour has come from the person's prompt alone (0) to the background's (1); "as
    alone": share of walls whose style is taken for the one of the background's prompt alone.
    """
    faces, people, walls = judges
    jobs = [(f"a photo of [V] style, {p}", f"a photo of [W] style, {b}", n) for p, b in PROMPTS for n in noises]
    (mask,) = read_masks("center", 1)
    empty = [_draw(pipe, b, n) for _, b, n in jobs]
    colours, wanted = [wall_colour(p) for p in empty], walls(empty)
    alone: list[np.ndarray] = []
    told, sheet = {}, [empty]
    for way, put_on in WAYS.items():
        made = []
        for prompt, background, noise in jobs:
            with contextlib.nullcontext() if put_on is None else put_on(pipe, background, mask):
                made.append(_draw(pipe, prompt, noise))
        alone = alone or [wall_colour(p) for p in made]  # the first way is the person's prompt by itself
        told[way] = {
            "found": _share(faces.embed(p) is not None for p in made),
            "style": _share(s == style for s in people(made)),
            "reached": float(np.mean([_reached(*c) for c in zip(map(wall_colour, made), alone, colours, strict=True)])),
            "as alone": _share(a == b for a, b in zip(walls(made), wanted, strict=True)),
        }
        sheet.insert(-1, made)
    shown = [k + n for n in range(min(2, len(noises))) for k in range(0, len(jobs), len(noises))]
    save_sheet([[row[i] for i in shown] for row in sheet], folder / "pictures.png")
    return told


def _reached(got: np.ndarray, first: np.ndarray, last: np.ndarray) -> float:
    return 1 - float(np.linalg.norm(got - last) / max(np.linalg.norm(first - last), SAME))


def _share(hits: Any) -> float:
    return float(np.mean([bool(h) for h in hits]))


def _draw(pipe: Any, prompt: str, noise: int, **size: int) -> Image.Image:
    g = torch.Generator().manual_seed(noise)
    return pipe(prompt, num_inference_steps=4, guidance_scale=1.0, generator=g, **size).images[0]


def _pairs(base: Any, seed: int, folder: Path, noises: int) -> list[dict[str, Any]]:
    """How often two people side by side have faces, by way; no training."""
    path = folder / "pairs.json"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        seeds, _ = table_people(3)
        words = [own_word(s, base.pipe.text_encoder.config.hidden_size) for s in seeds]
        found = {way: _two(base.pipe, words, way, seed, noises) for way in PAIRS}
        save_sheet([made for made, _ in found.values()], folder / "pairs.png")
        write_text(path, json.dumps({way: figures for way, (_, figures) in found.items()}))
    rows = json.loads(path.read_text())
    return [{"run": way, "seed": seed, "way": way, **figures} for way, figures in rows.items()]


def _two(
    pipe: Any, words: Sequence[Any], way: str, seed: int, noises: int
) -> tuple[list[Image.Image], dict[str, float]]:
    layout, people_on, background_on = PAIRS[way]
    edge, judge, made = pipe.unet.config.sample_size * pipe.vae_scale_factor, Judge(), []
    asked = BESIDE.format("S*", "T*") if layout is None else BESIDE.format("person", "person")
    for i in range(len(words)):
        with contextlib.ExitStack() as on:
            pair = [words[i], words[(i + 1) % len(words)]]
            on.enter_context(attach(pipe, WordSystem(), pair, placeholder=["S*", "T*"]))
            texts, masks = [BESIDE.format("S*", "person"), BESIDE.format("person", "T*")], []
            if layout is not None:
                masks = list(read_masks(layout, 2))
            rest = [1 - sum(masks)] if background_on else []
            if background_on is people_on:
                texts, masks = [*texts, *([EMPTY] if rest else [])], [*masks, *rest]
            elif background_on:
                on.enter_context(background_on(pipe, [EMPTY], [1 - grown(1 - rest[0], MARGIN)]))
            if people_on is not None:
                on.enter_context(people_on(pipe, texts, masks))
            for k in range(noises):
                made.append(_draw(pipe, asked, 1000 * (noises * seed + k) + i, width=2 * edge, height=edge))
    sides = [[p.crop((x, 0, x + edge, edge)) for p in made] for x in (0, edge)]
    return made, {name: _share(judge.embed(p) is not None for p in s) for name, s in zip(("left", "right"), sides)}


def save_sheet(rows: Sequence[Sequence[Image.Image]], path: Path) -> None:
    """Rows of pictures of one size as one picture."""
    width, height = rows[0][0].size
    sheet = Image.new("RGB", (width * max(map(len, rows)), height * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture, (x * width, y * height))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = parser_of(
        "together.regions", __doc__, "runs/regions", "a setting of the trainings, idcore train styleforge"
    )
    settings: list[str] = list(CHANGES)

    def rows(options: Any, say: Say) -> list[dict[str, Any]]:
        settings.extend(options.changes)
        return run(options.out, options.seeds, options.changes, say)

    return carry_out(parser, rows, lambda out, made, docs: report(out, made, docs, settings), argv)


if __name__ == "__main__":
    sys.exit(main())
