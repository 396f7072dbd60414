"""StyleForge on drawn styles against DreamBooth without Aux, over several seeds.

    python -m idcore.training.styleforge.experiment --out runs/styleforge --docs docs

For each style and seed: DreamBooth without Aux (the StyleRef term alone), StyleForge, and Multi-StyleForge, with the
same number of steps and of StyleRef samples in a step. Resumable: what is done is passed over.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from ...env import command_line, machine
from ...errors import told
from ...metrics.gate import Judge, background_of
from ...results import is_result
from ...systems.lora import load_lora
from ...systems.styleforge import StyleWords
from ...workflows import write_text
from ..bases.tiny_sd import TinySDBase
from .config import load_config
from .drawn import Styles, person, place
from .run import StyleData, train_styleforge
from .search import draw

TARGETS = {"duotone": "cartoon", "pencil": "cartoon", "cartoon": "oil", "oil": "cartoon"}  # and the Aux images' style
METHODS = {
    "DreamBooth without Aux": ("loss.aux=0", "loop.batch=2"),
    "StyleForge": ("loop.batch=4",),
    "Multi-StyleForge": ("loop.batch=4",),
}
PEOPLE, PLACES, AUX = 10, 6, 16  # pictures
REF_SEED, AUX_SEED = 5_100_000, 5_200_000  # of the people on them
CHANGES = ("loop.steps=60", "loop.validate_every=0", "loop.save_every=1000", "loop.trackers=", "pictures.mix=false")
SEEDS = (100,)  # of the pictures
CONTENTS = {
    "a person, blue background": "blue", "a man smiling, red background": "red", "a woman, green background": "green",
    "a person looking left, yellow background": "yellow", "a man, pink background": "pink",
    "a woman smiling, white background": "white",
}  # fmt: skip
EMPTY = ("an empty scene, blue background", "nobody, red background", "an empty background, green background")
COLUMNS = {
    "style": "target style", "background": "background as asked", "face": "face found", "nobody": "nobody where asked",
    "plain": "photo without the word",
}  # fmt: skip


class Exam:
    """Pictures by the prompts above, and what they show."""

    def __init__(self, base: TinySDBase) -> None:
        self.base, self.styles, self.faces = base, Styles(), Judge()

    def __call__(self, target: str, words: StyleWords) -> tuple[dict[str, float], list[Image.Image]]:
        """Shares of pictures, and the pictures of people and of nobody."""
        shown = self._draw([words.person(c) for c in CONTENTS])
        empty = self._draw([words.place(c) for c in EMPTY])
        plain = self._draw([f"a photo of {c}" for c in CONTENTS])
        colours = [c for c in CONTENTS.values() for _ in SEEDS]
        figures = {
            "style": _mean([s == target for s in self.styles(shown)]),
            "background": _mean([background_of(p) == c for p, c in zip(shown, colours, strict=True)]),
            "face": _mean([self.faces.embed(p) is not None for p in shown]),
            "nobody": _mean([self.faces.embed(p) is None for p in empty]),
            "plain": _mean([s == "photo" for s in self.styles(plain)]),
        }
        return figures, [*shown[:: len(SEEDS)], *empty[:: len(SEEDS)]]

    def _draw(self, prompts: Sequence[str]) -> list[Image.Image]:
        return draw(self.base, prompts, SEEDS, 64, 4, 1.0)


def data_of(target: str, seed: int, multi: bool) -> StyleData:
    """StyleRef and Aux images of a style; other people for each seed."""
    first = 1000 * seed + 100 * list(TARGETS).index(target)
    people = [person(REF_SEED + first + i, [target])[0] for i in range(PEOPLE)]
    places = [place(REF_SEED + first + i, target) for i in range(PLACES)]
    aux = [person(AUX_SEED + first + i, [TARGETS[target]])[0] for i in range(AUX)]
    return StyleData(None, aux, people, places) if multi else StyleData([*people, *places], aux)


def run(
    out: Path, seeds: Sequence[int], targets: Sequence[str], changes: Sequence[str], say: Callable[[str], None]
) -> dict[str, Any]:
    """Train and measure what is missing."""
    out.mkdir(parents=True, exist_ok=True)
    base = TinySDBase.from_package()
    exam: Exam | None = None
    rows = []
    for seed in seeds:
        for target in targets:
            for method in (*METHODS, *(["no training"] if seed == seeds[0] else [])):
                folder = out / f"seed{seed}" / target / method.replace(" ", "-")
                if not (folder / "measures.json").exists():
                    exam = exam or Exam(base)
                    _one(exam, base, folder, (seed, target, method), changes, say)
                rows.append({"seed": seed, "target": target, "method": method})
                rows[-1] |= json.loads((folder / "measures.json").read_text())
    judge = out / "judge.json"
    if exam is not None:
        write_text(judge, json.dumps({"right": exam.styles.right}))
    return {"judge": json.loads(judge.read_text()), "rows": rows}


def _one(
    exam: Exam, base: TinySDBase, folder: Path, what: tuple[int, str, str], changes: Sequence[str], say: Callable
) -> None:
    seed, target, method = what
    words, multi = (
        StyleWords("[V] style", "[W] style" if method.startswith("Multi") else ""),
        method.startswith("Multi"),
    )
    if method in METHODS:
        config = load_config(None, [*CHANGES, *METHODS[method], *changes, f"loop.seed={seed}"], "tiny-sd")
        made = folder / "model"
        if not is_result(made):
            going_on = any(folder.glob("checkpoints/step-*"))
            made = train_styleforge(config, data_of(target, seed, multi), folder, base=base, resume=going_on)
        with load_lora(base.pipe, made / "styleforge.safetensors"):
            figures, pictures = exam(target, words)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        figures, pictures = exam(target, words)
    _row(pictures).save(folder / "pictures.png")
    write_text(folder / "measures.json", json.dumps(figures))
    say(f"seed {seed}, {target}, {method}: " + ", ".join(f"{k} {v:.2f}" for k, v in figures.items()))


def _row(pictures: Sequence[Image.Image]) -> Image.Image:
    row = Image.new("RGB", (64 * len(pictures), 64))
    for i, p in enumerate(pictures):
        row.paste(p, (64 * i, 0))
    return row


def _mean(values: Sequence[Any]) -> float:
    return float(np.mean(values))


def report(out: Path, found: Mapping[str, Any], changes: Sequence[str], docs: Path) -> list[Path]:
    """docs/results/styleforge.json, docs/styleforge-results.md and .png."""
    rows = found["rows"]
    seeds, targets = sorted({r["seed"] for r in rows}), list(dict.fromkeys(r["target"] for r in rows))
    (docs / "results").mkdir(parents=True, exist_ok=True)
    written = [docs / "results" / "styleforge.json", docs / "styleforge-results.md", docs / "styleforge-results.png"]
    settings = [*CHANGES, *changes]
    told_all = {"command": command_line(), "machine": machine(), "settings": settings, **found}
    write_text(written[0], json.dumps(told_all, indent=1))
    write_text(written[1], _words(rows, seeds, targets, found["judge"]["right"], settings))
    _sheet(out, seeds[0], targets).save(written[2])
    return written


def _words(rows: Sequence[Mapping], seeds: list, targets: list, right: float, settings: Sequence[str]) -> str:
    count = len(CONTENTS) * len(SEEDS)
    said = (
        f"LoRA on tiny-sd, {PEOPLE} pictures of people and {PLACES} of places in the style, {AUX} Aux images of people "
        f"in another painted style, all drawn by the project. Means over {len(seeds)} seeds ({len(targets)} styles "
        f"each) with the spread between the seeds; {count} pictures of people, {len(EMPTY) * len(SEEDS)} of nobody and "
        f"{count} without the style's word a run. The style is told by a linear classifier that is right for "
        f"{right:.1%} of drawings of unseen people; tiny-sd knows pencil, oil and cartoon by those words, duotone not "
        "at all."
    )
    shown = f"First seed; for each style the rows are {', '.join(METHODS)}, no training:"
    return "\n".join([
        "# StyleForge on drawn styles", "", said, "",
        "DreamBooth without Aux has the StyleRef term alone: the same steps and as many StyleRef samples in each. "
        "Multi-StyleForge draws nobody by its second word. Photo without the word: how many pictures of prompts that "
        "do not say the style are still photos.", "",
        *_table(rows, seeds), "", "Share of pictures in the target style, by style:", "",
        *_by_style(rows, seeds, targets), "",
        f"Settings: `{' '.join(settings)}`. Runs: `docs/results/styleforge.json`. Again: "
        "`python -m idcore.training.styleforge.experiment`.", "",
        shown, "", "![pictures](styleforge-results.png)", "",
    ])  # fmt: skip


def _table(rows: Sequence[Mapping], seeds: Sequence[int]) -> list[str]:
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for method in dict.fromkeys(r["method"] for r in rows):
        mine = [r for r in rows if r["method"] == method]
        cells = [_cell([[r[k] for r in mine if r["seed"] == s] for s in seeds]) for k in COLUMNS]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return lines


def _by_style(rows: Sequence[Mapping], seeds: Sequence[int], targets: Sequence[str]) -> list[str]:
    lines = ["| | " + " | ".join(targets) + " |", "|---" * (len(targets) + 1) + "|"]
    for method in dict.fromkeys(r["method"] for r in rows):
        mine = [r for r in rows if r["method"] == method]
        cells = [
            _cell([[r["style"] for r in mine if r["seed"] == s and r["target"] == t] for s in seeds]) for t in targets
        ]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return lines


def _cell(by_seed: Sequence[Sequence[float]]) -> str:
    """The mean over the seeds' means, and their spread."""
    means = [float(np.mean(v)) for v in by_seed if v]
    return f"{np.mean(means):.2f}" + (f" ± {np.std(means):.2f}" if len(means) > 1 else "")


def _sheet(out: Path, seed: int, targets: Sequence[str]) -> Image.Image:
    """Pictures of one seed: a block for each style, a row for each method."""
    names = [m.replace(" ", "-") for m in (*METHODS, "no training")]
    found = [[Image.open(out / f"seed{seed}" / t / n / "pictures.png") for n in names] for t in targets]
    width, line = found[0][0].width, 14
    sheet = Image.new("RGB", (width, len(targets) * (line + 64 * len(names))), "white")
    pen, y = ImageDraw.Draw(sheet), 0
    for target, rows in zip(targets, found, strict=True):
        pen.text((2, y + 1), target, fill="black")
        y += line
        for row in rows:
            sheet.paste(row, (0, y))
            y += 64
    return sheet


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m idcore.training.styleforge.experiment", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/styleforge"), help="folder of the runs")
    parser.add_argument("--docs", type=Path, default=None, help="write the report into this folder")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--styles", default="duotone,pencil,cartoon", help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--set", action="append", default=[], dest="changes", help="of idcore train styleforge")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)

    def all_of_it() -> None:
        say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
        seeds, styles = [int(s) for s in options.seeds.split(",")], options.styles.split(",")
        found = run(options.out, seeds, styles, options.changes, say)
        for path in report(options.out, found, options.changes, options.docs or options.out / "report"):
            print(path)

    return told(all_of_it)


if __name__ == "__main__":
    sys.exit(main())


__all__ = ["Exam", "report", "run"]
