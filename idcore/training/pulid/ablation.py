"""PuLID's table 2 in small, on the embedded model: what each part of the objective does, over several seeds.

    python -m idcore.training.pulid.ablation --out runs/ablation --docs docs

Of each seed: stage 1, and from its weights, with the same steps and data, the naive one-step identity loss, stage 2
(L_id through four steps) and stage 3 (+ L_align). All are measured on drawn people whom no training saw, with
prompts of the embedded model's gate. Resumable: what is done is passed over, what was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ...env import command_line, machine
from ...errors import told
from ...results import is_result
from ...workflows import write_text
from ..card import draw_curves, read_lines
from ..data.procedural import procedural_folder
from .config import PuLIDTrainConfig, ValidationSettings, load_config
from .data import open_data
from .run import Models, train_pulid
from .task import PuLIDTask
from .validation import Guest, Judge, Validator

# Our choice: enough steps for the order to show on two CPU cores.
CHANGES = (
    "stage1.steps=100", "stage2.steps=80", "stage3.steps=80", "stage2.batch=4", "stage3.batch=4", "stage2.lr=2e-3",
    "stage3.lr=2e-3", "loop.validate_every=0", "loop.trackers=", "loop.save_every=40", "loop.keep=1", "loop.ema=0.9",
)  # fmt: skip
BRANCHES = {
    "naive one-step ID loss": (2, {"through": "one"}),
    "stage 2": (2, {}),
    "stage 3": (3, {}),
}
_TITLE = "stage 1, then stage 2 and stage 3, each from the weights of stage 1 (first seed)"
PICTURES = 240
PEOPLE = 8
PROMPTS = (0, 2, 3, 6)  # of the gate's: photo, pencil, oil, night
COLUMNS = {
    "distance": "identity distance (lower: more alike)", "rank1": "right person of 8", "found": "face found",
    "astronaut": "distance, photo", "semantic": "semantic", "layout": "layout",
    "change_outside_face": "change outside the face", "background": "background as prompted",
}  # fmt: skip


def run(out: Path, seeds: Sequence[int], changes: Sequence[str] = (), say: Any = print) -> list[dict[str, Any]]:
    """Train and measure what is missing; one row for each seed and run."""
    config = load_config(None, [*CHANGES, *changes], "tiny")
    out.mkdir(parents=True, exist_ok=True)
    source = open_data(procedural_folder(out / "people", PICTURES), out, config, say)
    exam: Exam | None = None
    rows = []
    for seed in seeds:
        for name, folder in _trained(config, source, out / f"seed{seed}", seed, say):
            file = folder / "measures.json"
            if not file.exists():
                exam = exam or Exam(config)
                write_text(file, json.dumps(exam(folder / "pulid.safetensors")))
            rows.append({"seed": seed, "run": name, **json.loads(file.read_text())})
            say(f"seed {seed}, {name}: " + ", ".join(f"{k} {v:.4f}" for k, v in rows[-1].items() if k in COLUMNS))
    if exam is not None or not (out / "bare.json").exists():
        write_text(out / "bare.json", json.dumps((exam or Exam(config))(None)))
    return rows


def _trained(config: PuLIDTrainConfig, source: Any, out: Path, seed: int, say: Any):
    """(name, result folder) of the runs of one seed, each trained when it is asked for."""
    seeded = replace(config, loop=replace(config.loop, seed=seed))
    first = _one(seeded, source, out / "first", 1, say)
    yield "stage 1", first
    for name, (stage, loss) in BRANCHES.items():
        made = replace(seeded, init=str(first / "pulid.safetensors"), loss=replace(config.loss, **loss))
        yield name, _one(made, source, out / name.replace(" ", "-"), stage, say)


def _one(config: PuLIDTrainConfig, source: Any, out: Path, stage: int, say: Any) -> Path:
    if is_result(out / "model"):
        return out / "model"
    going_on = any(out.glob("stage*/checkpoints/step-*"))
    return train_pulid(config, source, out, stages=[stage], resume=going_on, say=say)


class Exam:
    """Measures weights on unseen people: pictures of everyone with the gate's prompts, one seed each."""

    def __init__(self, config: PuLIDTrainConfig) -> None:
        from ...demo import PHOTO
        from ...encoders.dlib_tokens import DlibTokens
        from ...metrics.gate import PROMPTS as GATE_PROMPTS
        from ...metrics.gate import Judge as GateJudge
        from ...metrics.gate import gate_people

        self.models, self.config = Models(config), config
        asked = [GATE_PROMPTS[i] for i in PROMPTS]
        self.backgrounds = [colour for _, colour in asked]
        judge = GateJudge()
        pictures, self.gallery, _ = gate_people(judge, PEOPLE)
        photo = Image.open(PHOTO).convert("RGB")
        self.judge = Judge("face", judge.analyzer)
        preprocess = DlibTokens(judge.analyzer)
        self.guests = [Guest(str(i), p, preprocess(_large(p))) for i, p in enumerate([*pictures, photo])]
        settings = ValidationSettings(prompts=tuple(p for p, _ in asked), seeds=(0,))
        self.validator = Validator(self.guests, [self.judge], settings)
        self.astronaut = self.judge.look(photo)[0]

    @torch.no_grad()
    def __call__(self, weights: Path | None) -> dict[str, float]:
        """Measures of a file of weights; None: of the base without identity."""
        from ...metrics.gate import background_of

        system = self.models.system(weights)
        task = PuLIDTask(system.eval(), 1, self.config, self.models.base)
        system.eval()
        try:
            drawn = [self.validator.draw(task, guest) for guest in self.guests]
        finally:
            task.close()
        pictures = [d[1] if weights is None else d[0] for d in drawn]
        looks = [[self.judge.look(p)[0] for p in row] for row in pictures]
        found = [e is not None for row in looks[:PEOPLE] for e in row]
        own = [(i, e) for i, row in enumerate(looks[:PEOPLE]) for e in row if e is not None]
        away = [np.linalg.norm(self.gallery - e, axis=1) for _, e in own]
        photo = [float(np.linalg.norm(self.astronaut - e)) for e in looks[PEOPLE] if e is not None]
        colours = [background_of(p) == c for row in pictures[:PEOPLE] for p, c in zip(row, self.backgrounds)]
        figures = {
            "distance": _mean([a[i] for (i, _), a in zip(own, away)]),
            "rank1": sum(int(a.argmin()) == i for (i, _), a in zip(own, away)) / len(found),
            "found": sum(found) / len(found), "astronaut": _mean(photo), "background": _mean(colours),
        }  # fmt: skip
        if weights is not None:
            figures |= self.validator.differences(drawn[:PEOPLE])
        return figures


def _large(picture: Image.Image) -> Image.Image:
    return picture if min(picture.size) >= 128 else picture.resize((256, 256), 3)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def report(out: Path, rows: Sequence[Mapping[str, Any]], docs: Path) -> list[Path]:
    """docs/results/pulid-ablation.json, docs/pulid-ablation.md and docs/pulid-ablation.png."""
    names = list(dict.fromkeys(r["run"] for r in rows))
    bare = json.loads((out / "bare.json").read_text())
    seeds = sorted({r["seed"] for r in rows})
    data = {
        "command": command_line(), "machine": machine(), "seeds": seeds, "settings": list(CHANGES),
        "without identity": bare, "runs": list(rows),
    }  # fmt: skip
    (docs / "results").mkdir(parents=True, exist_ok=True)
    written = [docs / "results" / "pulid-ablation.json", docs / "pulid-ablation.md"]
    write_text(written[0], json.dumps(data, indent=1))
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines.append("| no identity | " + " | ".join(_cell([bare[k]] if k in bare else []) for k in COLUMNS) + " |")
    for name in names:
        mine = [r for r in rows if r["run"] == name]
        lines.append(f"| {name} | " + " | ".join(_cell([r[k] for r in mine if k in r]) for k in COLUMNS) + " |")
    write_text(written[1], _words(lines, seeds))
    curves = _curves(out, seeds[0])
    return [*written, *([draw_curves(curves, docs / "pulid-ablation.png", _TITLE)] if curves else [])]


def _words(table: Sequence[str], seeds: Sequence[int]) -> str:
    return "\n".join([
        "# The parts of PuLID's objective, in small", "",
        f"Table 2 of the paper repeated on the embedded 64 px model: means over {len(seeds)} seed(s), with the spread "
        f"between several. {PEOPLE} drawn people whom no training saw, {len(PROMPTS)} prompts each. The alignment's "
        "distances are mean squares between the paths with and without identity. The recogniser that conditions and "
        "trains also judges: distances favour what it sees.", "",
        *table, "",
        f"Changed settings: `{' '.join(CHANGES)}`.", "",
        "Runs and settings: `docs/results/pulid-ablation.json`. Again: `python -m idcore.training.pulid.ablation`.", "",
        "![curves of the first seed](pulid-ablation.png)",
    ])  # fmt: skip


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ± {np.std(values):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def _curves(out: Path, seed: int) -> dict[str, tuple[list, list]]:
    """Training records of the first seed's stage 1, and of stages 2 and 3 after it."""
    runs = {"stage 1": "first/stage1", "stage 2": "stage-2/stage2", "stage 3": "stage-3/stage3"}
    found = {name: read_lines(out / f"seed{seed}" / at / "losses.jsonl") for name, at in runs.items()}
    return {name: (lines, []) for name, lines in found.items() if lines}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m idcore.training.pulid.ablation", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/pulid-ablation"), help="folder of the runs")
    parser.add_argument("--docs", type=Path, default=None, help="write the report into this folder")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument(
        "--set", action="append", default=[], dest="changes", help="a setting, as of idcore train pulid"
    )
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    seeds = [int(s) for s in options.seeds.split(",")]

    def all_of_it() -> None:
        rows = run(options.out, seeds, options.changes, say=lambda text: print(text, file=sys.stderr, flush=True))
        for path in report(options.out, rows, options.docs or options.out / "report"):
            print(path)

    return told(all_of_it)


if __name__ == "__main__":
    sys.exit(main())


__all__ = ["Exam", "report", "run"]
