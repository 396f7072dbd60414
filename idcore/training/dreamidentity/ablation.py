"""DreamIdentity with and without its editability source, in small: on tiny-sd, with drawn people whom no training saw.

    python -m idcore.training.dreamidentity.ablation --out runs/dream --pairs PAIRS --docs docs

PAIRS is made by `idcore augment --base tiny-sd --out PAIRS`. Of each seed one encoder is trained on faces alone and one
on faces and pairs, half and half, with as many steps. Resumable: what is done is passed over.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from ... import prompts
from ...encoders.align import template
from ...encoders.face_crops import crops_of
from ...metrics.drawn_attributes import drawn_photo, table_people
from ...results import is_result
from ...systems.dreamidentity import DreamIdentity
from ...systems.words import WordSystem
from ...workflows import write_text
from ..bases.opening import TINY_SD, open_text_base
from ..commands import Say
from ..experiments import carry_out, cell, deviation, parser_of, table, write_page
from ..resuming import begun
from .config import DRAWN, load_config
from .result import WEIGHTS
from .run import train_dreamidentity
from .validation import draw, identities

# Our choice: what a CPU core trains in a minute a run.
CHANGES = (
    "loop.steps=100", "loop.warmup=5", "loop.lr=2e-3", "loop.ema=0.9", "loop.precision=bf16", "loop.validate_every=0",
    "loop.trackers=", "loop.save_every=50", "loop.keep=1", "people.drawn=2000",
    "encoder.trains=heads",
)  # fmt: skip
ARMS = {"faces alone": 0.0, "faces and pairs": 0.5}
PEOPLE, EDITS, TILE = 16, "tiny-edits", 64
COLUMNS = {
    "distance": "identity distance (lower: more alike)", "rank1": f"right person of {PEOPLE}", "found": "face found",
    "adherence": "prompt adherence", "background": "background", "style": "style", "expression": "expression",
    "pose": "pose", "seconds": "training, s",
}  # fmt: skip


def run(
    out: Path, pairs: Path, seeds: Sequence[int], changes: Sequence[str] = (), *, base: str = TINY_SD, say: Say = print
) -> list[dict[str, Any]]:
    """Train and measure what is missing; a row for each seed and arm, and one for the class word."""
    out.mkdir(parents=True, exist_ok=True)
    frozen, exam = open_text_base(base), Exam()
    rows = []
    for seed in seeds:
        for name, share in ARMS.items():
            folder = out / f"seed{seed}" / name.replace(" ", "-")
            seconds = _train(folder, frozen, pairs, seed, share, changes, say)
            file = folder / "measures.json"
            if not file.exists():
                made = DreamIdentity.from_weights(folder / "model" / WEIGHTS)
                write_text(file, json.dumps(exam(frozen, made, folder)))
            rows.append({"seed": seed, "run": name, **json.loads(file.read_text()), "seconds": seconds})
            say(f"seed {seed}, {name}: " + ", ".join(f"{k} {v:.3f}" for k, v in rows[-1].items() if k in COLUMNS))
    file = out / "nobody.json"
    if not file.exists():
        write_text(file, json.dumps(exam(frozen, None, out)))
    return [{"seed": seeds[0], "run": "nobody: the word person", **json.loads(file.read_text())}, *rows]


def _train(
    folder: Path, base: Any, pairs: Path, seed: int, share: float, changes: Sequence[str], say: Say
) -> float | None:
    """Seconds of one core that the training took; None where it was stopped in between."""
    told_of = folder / "seconds.json"
    if not is_result(folder / "model"):
        going_on = begun(folder)
        settings = [*CHANGES, f"loop.seed={seed}", f"people.editability={share}", *changes]
        config = load_config(None, settings, TINY_SD)
        start = time.process_time()
        train_dreamidentity(config, DRAWN, pairs if share else None, folder, base=base, resume=going_on, say=say)
        write_text(told_of, json.dumps(None if going_on else time.process_time() - start))
    return json.loads(told_of.read_text()) if told_of.exists() else None


class Exam:
    """Draws unseen people with the prompts of `tiny-edits`, from one photo each, and judges the pictures."""

    def __init__(self, people: int = PEOPLE) -> None:
        self.seeds, self.exam = table_people(people)
        self.photos = [drawn_photo(s) for s in self.seeds]

    @torch.no_grad()
    def __call__(self, base: Any, system: DreamIdentity | None, folder: Path) -> dict[str, float]:
        """Measures; the pictures go to `folder/drawn.png`, a line for each person.

        Args:
            base: tiny-sd.
            system: the encoder; None: prompts say "a person".
        """
        asked = prompts.load(EDITS, subject="a person" if system is None else "S*")
        if system is None:
            rows = [self._draw(base, asked)] * len(self.photos)
        else:
            rows = []
            for person in identities(system.eval(), self._crops(system)):
                with WordSystem().put_on(base.pipe, person, placeholder="S*"):
                    rows.append(self._draw(base, asked))
        _sheet(self.photos, rows).save(folder / "drawn.png")
        who = [i for i, row in enumerate(rows) for _ in row]
        return self.exam.score([p for row in rows for p in row], who, list(asked.labels) * len(rows))

    def _crops(self, system: DreamIdentity) -> torch.Tensor:
        pictures = torch.from_numpy(np.stack([np.asarray(p) for p in self.photos])).permute(0, 3, 1, 2).float()
        points = torch.from_numpy(template("head", pictures.shape[-1]) - 0.5)[None].expand(len(pictures), -1, -1)
        c = system.config
        return crops_of(pictures / 127.5 - 1, points, c.vit.image_size, c.template)

    def _draw(self, base: Any, asked: Sequence[str]) -> list[Image.Image]:
        return draw(base.pipe, list(asked), range(len(asked)), 4, 1.0, 64)


def _sheet(photos: Sequence[Image.Image], rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    sheet = Image.new("RGB", (TILE * (1 + len(rows[0])), TILE * len(rows)), "white")
    for y, (photo, row) in enumerate(zip(photos, rows)):
        for x, tile in enumerate([photo, *row]):
            sheet.paste(tile.resize((TILE, TILE)), (x * TILE, y * TILE))
    return sheet


def report(out: Path, rows: Sequence[Mapping[str, Any]], docs: Path) -> list[Path]:
    """docs/results/dreamidentity-ablation.json, docs/dreamidentity-ablation.md and .png."""
    seeds = sorted({r["seed"] for r in rows})
    names = dict.fromkeys(r["run"] for r in rows)
    cells = {n: [cell([r.get(k) for r in rows if r["run"] == n], 3, deviation) for k in COLUMNS] for n in names}
    facts, page = {"seeds": seeds, "settings": list(CHANGES)}, _words(table(COLUMNS, cells.items()), seeds)
    written = write_page(docs, "dreamidentity-ablation", facts, rows, page)
    return [*written, _picture(out, seeds[0], docs / "dreamidentity-ablation.png")]


def _words(lines: Sequence[str], seeds: Sequence[int]) -> str:
    return "\n".join([
        "# DreamIdentity with and without its editability source, in small", "",
        f"On tiny-sd: means over {len(seeds)} seed(s), with the spread between several. {PEOPLE} drawn people whom no "
        "training saw, from one photo each in one forward pass, with the eight prompts of `tiny-edits`. Distances are "
        "those of the embedded recogniser; attributes are judged by networks trained on the project's drawings. "
        "Seconds are of one core.", "",
        *lines, "",
        f"Settings: `{' '.join(CHANGES)}`, all else as in `idcore train dreamidentity --base tiny-sd --print-config`.",
        "", "Runs: `docs/results/dreamidentity-ablation.json`, by `python -m idcore.training.dreamidentity.ablation`.",
        "", "The first seed's pictures of four people: photo, then the prompts; above faces alone, below faces and "
        "pairs.", "", "![four people drawn by both encoders](dreamidentity-ablation.png)",
    ])  # fmt: skip


def _picture(out: Path, seed: int, path: Path, people: int = 4) -> Path:
    """The first people of both arms, one below the other."""
    parts = [Image.open(out / f"seed{seed}" / n.replace(" ", "-") / "drawn.png").convert("RGB") for n in ARMS]
    parts = [p.crop((0, 0, p.width, people * TILE)) for p in parts]
    line = 16
    sheet = Image.new("RGB", (parts[0].width, sum(p.height + line for p in parts)), "white")
    pen, y = ImageDraw.Draw(sheet), 0
    for name, part in zip(ARMS, parts):
        pen.text((2, y + 2), name, fill="black")
        sheet.paste(part, (0, y + line))
        y += part.height + line
    sheet.save(path)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = parser_of("dreamidentity.ablation", __doc__, "runs/dreamidentity-ablation", "a setting of the training")
    parser.add_argument("--pairs", type=Path, required=True, help="folder of idcore augment")
    return carry_out(parser, lambda o, say: run(o.out, o.pairs, o.seeds, o.changes, say=say), report, argv)


if __name__ == "__main__":
    sys.exit(main())


__all__ = ["Exam", "report", "run"]
