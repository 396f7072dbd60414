"""PuLID's table 2 in small, on tiny-sd: what each part of the objective does, over several seeds.

    python -m idcore.training.pulid.ablation --out runs/ablation --docs docs

Of each seed: stage 1; from its weights the naive one-step identity loss, and stage 2 (L_id through four steps); from
stage 2's weights stage 3 (+ L_align), with the base's own weights of the alignment and with the paper's. All with the
same data and as many steps, measured on drawn people whom no training saw (`exam`). Resumable: what is done is passed
over, what was stopped goes on.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ...env import command_line, machine
from ...errors import told
from ...results import is_result
from ...workflows import write_text
from ..card import draw_curves, read_lines
from ..data.procedural import procedural_folder
from ..experiments import cell, deviation, parser_of, table
from . import exam as examining
from .config import PuLIDTrainConfig, load_config
from .data import open_data
from .exam import GALLERY, Exam, paste, side_by_side
from .run import train_pulid

# Our choice: what shows the order in the time of two CPU cores.
CHANGES = (
    "stage1.steps=400", "stage2.steps=100", "stage3.steps=100", "loop.precision=bf16", "loop.validate_every=0",
    "loop.trackers=", "loop.save_every=50", "loop.keep=1",
)  # fmt: skip


@dataclass(frozen=True)
class Branch:
    """A training after another one: which stage, whose weights it begins with, settings of `loss` that differ."""

    stage: int
    after: str
    loss: Mapping[str, Any] = field(default_factory=dict)


FIRST = "stage 1"
BRANCHES = {
    "naive one-step ID loss": Branch(2, FIRST, {"through": "one"}),
    "stage 2": Branch(2, FIRST),
    "stage 3": Branch(3, "stage 2"),
    "stage 3, paper's weights": Branch(3, "stage 2", {"identity": 1.0, "semantic": 0.6, "layout": 0.1}),
}
_TITLE = "stage 1, then stage 2, then stage 3 (first seed)"
PICTURES = 800
SHEET = "exam.png"
COLUMNS = {
    "distance": "identity distance (lower: more alike)", "rank1": f"right person of {GALLERY}", "found": "face found",
    "adherence": "prompt followed", "semantic": "semantic", "layout": "layout",
    "change_outside_face": "change outside the face",
}  # fmt: skip


def run(
    out: Path,
    seeds: Sequence[int],
    changes: Sequence[str] = (),
    *,
    base: str = "tiny-sd",
    one_start: bool = False,
    say: Any = print,
) -> list[dict[str, Any]]:
    """Train and measure what is missing; one row for each seed and run. `one_start`: the first seed's stage 1 is where
    the others begin too, which then have no row of their own for it."""
    config = load_config(None, [*CHANGES, *changes], base)
    out.mkdir(parents=True, exist_ok=True)
    source = open_data(procedural_folder(out / "people", PICTURES, zoom=0), out, config, say)
    exam: Exam | None = None
    rows = []
    for seed in seeds:
        first = out / f"seed{seeds[0] if one_start else seed}" / _folder(FIRST)
        for name, folder in _trained(config, source, out / f"seed{seed}", first, seed, say):
            file = folder / "measures.json"
            if not file.exists():
                exam = exam or Exam(config)
                write_text(file, json.dumps(exam(folder / "pulid.safetensors", folder / SHEET)))
            rows.append({"seed": seed, "run": name, **json.loads(file.read_text())})
            say(f"seed {seed}, {name}: " + ", ".join(f"{k} {v:.4f}" for k, v in rows[-1].items() if k in COLUMNS))
    if exam is not None or not (out / "bare.json").exists():
        exam = exam or Exam(config)
        write_text(out / "bare.json", json.dumps(exam(None, out / SHEET)))
        paste([[p] for p in exam.photos()]).save(out / "photos.png")
    return rows


def _trained(config: PuLIDTrainConfig, source: Any, out: Path, start: Path, seed: int, say: Any):
    """(name, result folder) of the runs of one seed, each trained when it is asked for."""
    seeded = replace(config, loop=replace(config.loop, seed=seed))
    made = {FIRST: _one(seeded, source, start, 1, say)}
    if start.parent == out:
        yield FIRST, made[FIRST]
    for name, branch in BRANCHES.items():
        own = replace(
            seeded, init=str(made[branch.after] / "pulid.safetensors"), loss=replace(config.loss, **branch.loss)
        )
        made[name] = _one(own, source, out / _folder(name), branch.stage, say)
        yield name, made[name]


def _folder(name: str) -> str:
    return "first" if name == FIRST else re.sub(r"[^a-zA-Z0-9]+", "-", name)


def _one(config: PuLIDTrainConfig, source: Any, out: Path, stage: int, say: Any) -> Path:
    if is_result(out / "model"):
        return out / "model"
    going_on = any(out.glob("stage*/checkpoints/step-*"))
    return train_pulid(config, source, out, stages=[stage], resume=going_on, say=say)


def report(out: Path, rows: Sequence[Mapping[str, Any]], docs: Path, settings: Sequence[str] = CHANGES) -> list[Path]:
    """docs/results/pulid-ablation.json, docs/pulid-ablation.md, and its two pictures."""
    names = list(dict.fromkeys(r["run"] for r in rows))
    bare = json.loads((out / "bare.json").read_text())
    seeds = list(dict.fromkeys(r["seed"] for r in rows))
    data = {
        "command": command_line(), "machine": machine(), "seeds": seeds, "settings": list(settings),
        "without identity": bare, "runs": list(rows),
    }  # fmt: skip
    (docs / "results").mkdir(parents=True, exist_ok=True)
    written = [docs / "results" / "pulid-ablation.json", docs / "pulid-ablation.md"]
    write_text(written[0], json.dumps(data, indent=1))
    named = {"no identity": [bare], **{name: [r for r in rows if r["run"] == name] for name in names}}
    cells = lambda mine: [cell([r.get(k) for r in mine], 3, deviation) for k in COLUMNS]  # noqa: E731
    lines = table(COLUMNS, [(name, cells(mine)) for name, mine in named.items()])
    counts = {name: sum(r["run"] == name for r in rows) for name in names}
    write_text(written[1], _words([*lines, *_kept(rows, bare)], seeds, counts, settings))
    written.append(docs / "pulid-ablation-people.png")
    side_by_side(_sheets(out, seeds[0])).quantize().save(written[-1])
    curves = _curves(out, seeds[0])
    return [*written, *([draw_curves(curves, docs / "pulid-ablation.png", _TITLE)] if curves else [])]


def _sheets(out: Path, seed: int) -> dict[str, Path]:
    """The exam's pictures of the first seed, by name."""
    found = {"photo": out / "photos.png", "no identity": out / SHEET}
    return found | {name: out / f"seed{seed}" / _folder(name) / "model" / SHEET for name in (FIRST, *BRANCHES)}


def _kept(rows: Sequence[Mapping[str, Any]], bare: Mapping[str, float]) -> list[str]:
    """A line below the table: what stage 3 keeps of the distance that stage 2 of the same seed gains."""
    gain = {r["seed"]: bare["distance"] - r["distance"] for r in rows if r["run"] == "stage 2"}
    parts = []
    for name in (n for n, b in BRANCHES.items() if b.after == "stage 2"):
        mine = [r for r in rows if r["run"] == name and gain.get(r["seed"], 0) > 0]
        shares = [(bare["distance"] - r["distance"]) / gain[r["seed"]] for r in mine]
        parts += [f"{name} {cell(shares, 3, deviation)}"] if shares else []
    if not parts:
        return []
    return ["", f"Kept of what stage 2 gains in distance over no identity: {'; '.join(parts)}."]


def _words(table: Sequence[str], seeds: Sequence[int], counts: Mapping[str, int], settings: Sequence[str]) -> str:
    of = ", ".join(f"{name} {n}" for name, n in counts.items())
    return "\n".join([
        "# The parts of PuLID's objective, in small", "",
        f"Table 2 of the paper repeated on tiny-sd, the shipped 64 px model: means over {len(seeds)} seed(s) "
        f"(runs: {of}), with the deviation between several. {examining.PEOPLE} drawn people whom no training saw, "
        f"{len(examining.PROMPTS)} prompts each, four steps without guidance; the right person is one of {GALLERY}. "
        "Stage 2 and the naive form begin with stage 1's weights, stage 3 with stage 2's, once with tiny-sd's factors "
        "of L_id and L_align and once with the paper's (1, 0.6, 0.1). "
        "\"prompt followed\": share of the asked backgrounds, styles, expressions and poses that judges find. "
        "The alignment's distances are mean squares between the paths with and without identity. The recogniser that "
        "conditions and trains also judges: distances favour what it sees.", "",
        *table, "",
        f"Changed settings: `{' '.join(settings)}`.", "",
        f"Runs and settings: `docs/results/pulid-ablation.json`. Again: `{command_line()}`.", "",
        "People of the exam, first seed; a photo before blue, smiling before green, looking left before red, a "
        "pencil drawing before pink:", "",
        "![unseen people](pulid-ablation-people.png)", "",
        "![curves of the first seed](pulid-ablation.png)",
    ])  # fmt: skip


def _curves(out: Path, seed: int) -> dict[str, tuple[list, list]]:
    """Training records of the first seed's stages, one after the other."""
    runs = {FIRST: 1, **{name: BRANCHES[name].stage for name in ("stage 2", "stage 3") if name in BRANCHES}}
    found = {
        name: read_lines(out / f"seed{seed}" / _folder(name) / f"stage{stage}" / "losses.jsonl")
        for name, stage in runs.items()
    }
    return {name: (lines, []) for name, lines in found.items() if lines}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = parser_of("pulid.ablation", __doc__, "runs/pulid-ablation", "a setting, as of idcore train pulid")
    parser.add_argument("--base", default="tiny-sd", help="the model that PuLID is trained on")
    parser.add_argument("--one-start", action="store_true", help="all seeds begin with the first one's stage 1")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    seeds = [int(s) for s in options.seeds.split(",")]

    def all_of_it() -> None:
        rows = run(
            options.out, seeds, options.changes, base=options.base, one_start=options.one_start,
            say=lambda text: print(text, file=sys.stderr, flush=True),
        )  # fmt: skip
        docs = options.docs or options.out / "report"
        for path in report(options.out, rows, docs, [*CHANGES, *options.changes]):
            print(path)

    return told(all_of_it)


if __name__ == "__main__":
    sys.exit(main())


__all__ = ["Exam", "report", "run"]
