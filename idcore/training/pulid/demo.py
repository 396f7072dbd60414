"""`make train-demo`: PuLID's three stages on tiny-sd, from drawn people to a result, in minutes on a CPU.

    python -m idcore.training.pulid.demo --out train_demo_out

Draws people, prepares them as `idcore prepare` does, trains stage after stage as `idcore train pulid` does, measures on
people whom no training saw, and shows them before and after each stage. Resumable: the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...env import command_line, machine
from ...errors import told
from ...workflows import save_picture, writable_folder, write_text
from ..card import draw_curves, read_lines
from ..data.opening import prepared_folder
from ..data.procedural import procedural_folder
from .command import run_command
from .config import load_config
from .data import face_setup
from .exam import GALLERY, Exam, paste, side_by_side

BASE = "tiny-sd"
PICTURES = 800
# Our choice: what shows each stage's effect in the time.
CHANGES = (
    "stage1.steps=600", "stage2.steps=100", "stage3.steps=80", "loop.validate_every=0", "loop.save_every=100",
    "loop.keep=1",
)  # fmt: skip
STAGES = (1, 2, 3)


def run_demo(
    out: Path, changes: Sequence[str] = (), pictures: int = PICTURES, base: str = BASE, say: Any = print
) -> dict[str, Any]:
    """Train, measure, draw. Returns what OUT/demo.json holds.

    Raises:
        InputError, TrainingStopped: as `idcore train pulid`.
    """
    start, cpu = time.perf_counter(), time.process_time()
    writable_folder(out)
    changes = [*CHANGES, *changes]
    workers = min(4, os.cpu_count() or 1, 1 + pictures // 100)  # a process takes seconds to start
    data = procedural_folder(out / "people", pictures, zoom=0, workers=workers)
    config = load_config(None, changes, base)
    prepared = prepared_folder(data, out, config.prepare, face_setup(config), say, workers)
    run_command(
        out=out / "run", data=prepared, config=None, stage="all", base=base, resume=any(out.glob("run/stage*")),
        changes=changes, allow_change=[], print_config=False, say=say,
    )  # fmt: skip
    figures, sheets = _measured(out, Exam(config))
    shown = save_picture(side_by_side(sheets), out / "stages.png")
    runs = {f"stage {n}": (read_lines(out / "run" / f"stage{n}" / "losses.jsonl"), []) for n in STAGES}
    curves = draw_curves(runs, out / "curves.png", f"PuLID on {base}: stages 1, 2, 3")
    result = {
        "command": command_line(), "machine": machine(), "stages": figures, "pictures": [str(shown), str(curves)],
        "seconds": round(time.perf_counter() - start, 1), "cpu_seconds": round(time.process_time() - cpu, 1),
    }  # fmt: skip
    write_text(out / "demo.json", json.dumps(result, indent=1))
    return result


def _measured(out: Path, exam: Exam) -> tuple[dict[str, dict[str, float]], dict[str, Path]]:
    """Figures and sheets of pictures of unseen people: without identity, and after each stage."""
    folder = out / "unseen"
    folder.mkdir(exist_ok=True)
    photos = folder / "photos.png"
    paste([[p] for p in exam.photos()]).save(photos)
    figures, sheets = {}, {"photo": photos}
    weights: dict[str, Path | None] = {"no identity": None}
    weights |= {f"stage {n}": out / "run" / f"stage{n}" / "model" / "pulid.safetensors" for n in STAGES}
    for name, file in weights.items():
        sheets[name] = folder / f"{name.replace(' ', '-')}.png"
        figures[name] = exam(file, sheets[name])
    return figures, sheets


def words(result: dict[str, Any]) -> str:
    """The figures in plain words."""
    lines = []
    for name, m in result["stages"].items():
        told_more = f", alignment semantic {m['semantic']:.4f}, layout {m['layout']:.4f}" if "semantic" in m else ""
        lines.append(
            f"{name}: identity distance {m['distance']:.3f}, right person of {GALLERY} {m['rank1']:.0%}, face found "
            f"{m['found']:.0%}, prompt followed {m['adherence']:.0%}{told_more}"
        )
    lines.append(
        "Measured on drawn people whom no training saw, by the recogniser that also trains: no independent proof of "
        "likeness."
    )
    lines.append(f"Pictures: {' '.join(result['pictures'])}   {result['seconds']} s ({result['cpu_seconds']} s of CPU)")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m idcore.training.pulid.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("train_demo_out"))
    parser.add_argument(
        "--set", action="append", default=[], dest="changes", help="a setting, as of idcore train pulid"
    )
    parser.add_argument("--base", default=BASE, help="the model that PuLID is trained on")
    options = parser.parse_args(argv)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def run() -> None:
        print(words(run_demo(options.out, options.changes, base=options.base, say=say)))

    return told(run)


if __name__ == "__main__":
    sys.exit(main())
