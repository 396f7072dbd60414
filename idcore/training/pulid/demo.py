"""`make train-demo`: PuLID's three stages on the embedded model, from drawn people to a result, in minutes on a CPU.

    python -m idcore.training.pulid.demo --out train_demo_out

Draws people, prepares them as `idcore prepare` does, trains stage after stage as `idcore train pulid` does, measures on
people whom the training never saw, and shows them in one picture. Resumable: the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from ...encoders.analyzer import EmbeddedAnalyzer
from ...env import command_line, machine
from ...errors import InputError, told
from ...workflows import save_picture, writable_folder, write_text
from ..card import draw_curves, read_lines
from ..data.procedural import procedural_folder
from .command import run_command

UNSEEN = 4
PICTURES = 240
# Our choice: what shows each stage's effect in the time.
CHANGES = (
    "stage1.steps=200", "stage2.steps=120", "stage3.steps=140", "loop.ema=0.95", "loop.validate_every=60",
    "loop.save_every=60", "loop.keep=1",
)  # fmt: skip
LINE = 14


def run_demo(out: Path, changes: Sequence[str] = (), pictures: int = PICTURES, say: Any = print) -> dict[str, Any]:
    """Train, measure, draw. Returns what OUT/demo.json holds.

    Raises:
        InputError, TrainingStopped: as `idcore train pulid`.
    """
    start, cpu = time.perf_counter(), time.process_time()
    writable_folder(out)
    people = unseen_people(out / "unseen", UNSEEN)
    data = procedural_folder(out / "people", pictures)
    going_on = any(out.glob("run/stage*"))
    run_command(
        out=out / "run", data=data, config=None, stage="all", base="tiny", resume=going_on,
        changes=[f"validation.people={people}", *CHANGES, *changes], allow_change=[], print_config=False, say=say,
    )  # fmt: skip
    stages = {f"stage {n}": out / "run" / f"stage{n}" for n in (1, 2, 3)}
    records = {n: (read_lines(at / "losses.jsonl"), read_lines(at / "measures.jsonl")) for n, at in stages.items()}
    figures = {name: measures[-1]["measures"] for name, (_, measures) in records.items() if measures}
    if set(figures) != set(stages):
        raise InputError("train-demo: loop.validate_every must not be 0, there is nothing to show without measures")
    curves = draw_curves(records, out / "curves.png", "PuLID on the embedded model: stages 1, 2, 3")
    shown = save_picture(_before_and_after(stages), out / "stages.png")
    result = {
        "command": command_line(), "machine": machine(), "stages": figures, "pictures": [str(shown), str(curves)],
        "seconds": round(time.perf_counter() - start, 1), "cpu_seconds": round(time.process_time() - cpu, 1),
    }  # fmt: skip
    write_text(out / "demo.json", json.dumps(result, indent=1))
    return result


def unseen_people(folder: Path, count: int) -> Path:
    """Drawn people of the gate, whom no training draws, as PNG files; those whose face the detector finds."""
    from ...metrics.gate import FIRST_SEED, gate_person

    folder.mkdir(parents=True, exist_ok=True)
    analyzer, seed = EmbeddedAnalyzer(), FIRST_SEED
    while len(list(folder.glob("*.png"))) < count:
        picture = gate_person(seed)
        if analyzer.detect(picture):
            save_picture(picture, folder / f"{seed}.png")
        seed += 1
    return folder


def _before_and_after(stages: dict[str, Path]) -> Image.Image:
    """The last validation sheets of all stages, one below the other, with their names."""
    sheets = {}
    for name, at in stages.items():
        found = sorted((at / "validation").glob("step-*/people.png"))
        if found:
            sheets[name] = Image.open(found[-1]).convert("RGB")
    width = max(s.width for s in sheets.values())
    whole = Image.new("RGB", (width, sum(s.height + LINE for s in sheets.values())), "white")
    pen, y = ImageDraw.Draw(whole), 0
    for name, sheet in sheets.items():
        pen.text((2, y + 1), f"after {name}: photo, then without and with identity", fill="black")
        whole.paste(sheet, (0, y + LINE))
        y += sheet.height + LINE
    return whole


def words(result: dict[str, Any]) -> str:
    """The figures in plain words."""
    lines = []
    for name, m in result["stages"].items():
        lines.append(
            f"{name}: identity distance {m.get('face/distance', float('nan')):.3f} (without identity "
            f"{m.get('face/distance_without', float('nan')):.3f}), face found {m['face/found']:.0%}, alignment "
            f"semantic {m['semantic']:.5f}, layout {m['layout']:.5f}, change outside the face "
            f"{m['change_outside_face']:.3f}"
        )
    lines.append(
        "Measured on drawn people whom the training never saw, by the recogniser that also trains: no independent "
        "proof of likeness."
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
    options = parser.parse_args(argv)

    def run() -> None:
        print(words(run_demo(options.out, options.changes, say=lambda text: print(text, file=sys.stderr, flush=True))))

    return told(run)


if __name__ == "__main__":
    sys.exit(main())
