"""Model cards and curves of a training's result, the same for every system."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..workflows import write_text
from .settings_out import as_text

_WINDOW = 20  # steps that a curve averages over


@dataclass(frozen=True)
class Card:
    """What a system says of its result.

    Attributes:
        title: the heading.
        summary: what was trained, by which command, after which paper.
        base: of the model card's `base_model`.
        tags: of the model card.
        rows: of the table of facts, name to text.
        use: command lines that use the result.
        notes: a paragraph below them.
        limits: what the figures do not say, what is to be minded.
        run: the name of the curves.
    """

    title: str
    summary: str
    base: str
    tags: Sequence[str] = ()
    rows: Mapping[str, str] = field(default_factory=dict)
    use: Sequence[str] = ()
    notes: str = ""
    limits: str = ""
    run: str = "training"


def write_card(card: Card, settings: Any, folder: Path, facts: Mapping[str, Any]) -> list[Path]:
    """Write README.md, and curves.png where matplotlib is installed.

    Args:
        card: the system's part.
        settings: the dataclass of all settings: the recipe.
        folder: of the result; the run's records (losses.jsonl, measures.jsonl) stand in the folder above.
        facts: what the loop knows of the run (`contract.Task.export`).
    """
    run = folder.parent
    losses, measures = read_lines(run / "losses.jsonl"), read_lines(run / "measures.jsonl")
    written = []
    if losses and importlib.util.find_spec("matplotlib") is not None:
        written.append(draw_curves({card.run: (losses, measures)}, folder / "curves.png"))
    write_text(folder / "README.md", _text(card, settings, facts, losses, measures, bool(written)))
    return [*written, folder / "README.md"]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A file of JSON lines; [] where there is none."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _text(card: Card, settings: Any, facts: Mapping[str, Any], losses: list, measures: list, drawn: bool) -> str:
    data = facts.get("data", {})
    rows = {
        **card.rows,
        "steps": f"{facts.get('steps', '?')}, {facts.get('global_batch', '?')} samples each",
        "weights": "averaged" if facts.get("averaged") else "as trained",
        "data": ", ".join(f"{k} {v}" for k, v in data.items() if isinstance(v, (int, float, str))),
    }
    lines = [
        "---", f"tags: [{', '.join((*card.tags, 'text-to-image'))}]", f"base_model: {json.dumps(card.base)}", "---", "",
        f"# {card.title}", "", card.summary, "", "| | |", "|---|---|",
        *(f"| {name} | {text} |" for name, text in rows.items()), "", "## Use", "", *(f"    {u}" for u in card.use), "",
        *([card.notes, ""] if card.notes else []), "## Figures", "", *_figures(losses, measures), "",
    ]  # fmt: skip
    if drawn:
        lines += ["![curves](curves.png)", ""]
    limits = "A face is personal data: use photos of people who agreed. " + card.limits
    lines += ["## Limits", "", limits.strip(), "", "## Recipe", "", "```yaml", as_text(settings).rstrip(), "```"]
    return "\n".join(lines)


def _figures(losses: Sequence[Mapping], measures: Sequence[Mapping]) -> list[str]:
    if measures:
        first, last = measures[0], measures[-1]
        lines = [f"| measure | step {first['step']} | step {last['step']} |", "|---|---|---|"]
        for name in sorted(last["measures"]):
            told = ["–" if m.get(name) is None else f"{m[name]:.4f}" for m in (first["measures"], last["measures"])]
            lines.append(f"| {name} | {' | '.join(told)} |")
        return lines
    if not losses:
        return ["No measures were taken."]
    tail = losses[-_WINDOW:]
    names = sorted({k for line in tail for k in line["logs"]})
    means = {n: [v for line in tail if (v := line["logs"].get(n)) is not None] for n in names}
    return [
        f"Means over the last {len(tail)} steps: "
        + ", ".join(f"{k} {sum(v) / len(v):.4f}" for k, v in means.items() if v)
    ]


def draw_curves(runs: Mapping[str, tuple[list, list]], path: Path, title: str = "") -> Path:
    """Training figures (running means) and validation measures of runs that follow one another, in one picture.

    Args:
        runs: by name, lines of losses.jsonl and measures.jsonl.
        path: of the PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    series, ends = _series(runs)
    names = sorted(series)
    figure = Figure(figsize=(10, 2.3 * ((len(names) + 1) // 2)), layout="constrained")
    FigureCanvasAgg(figure)
    for i, name in enumerate(names):
        axes = figure.add_subplot((len(names) + 1) // 2, 2, i + 1)
        steps, values = series[name]
        if name.startswith("validation"):
            axes.plot(steps, values, "o-", markersize=3)
        else:
            axes.plot(steps, values, alpha=0.25, linewidth=0.7)
            axes.plot(steps, _running(values), linewidth=1.4)
        for end in ends[:-1]:
            axes.axvline(end, color="grey", linestyle=":", linewidth=0.8)
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
    if title:
        figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=90)
    return path


def _series(runs: Mapping[str, tuple[list, list]]) -> tuple[dict[str, tuple[list, list]], list[int]]:
    """(steps, values) by name over all runs, one behind the other, and where each run ends."""
    series: dict[str, tuple[list, list]] = {}
    start, ends = 0, []

    def add(name: str, step: int, value: float | None) -> None:
        if value is not None:
            steps, values = series.setdefault(name, ([], []))
            steps.append(start + step)
            values.append(value)

    for losses, measures in runs.values():
        for line in losses:
            for k, v in line["logs"].items():
                add(f"training: {k}", line["step"], v)
        for line in measures:
            for k, v in line["measures"].items():
                add(f"validation: {k}", line["step"], v)
        start += losses[-1]["step"] if losses else 0
        ends.append(start)
    return series, ends


def _running(values: Sequence[float]) -> list[float]:
    out = []
    for i in range(len(values)):
        part = values[max(0, i + 1 - _WINDOW) : i + 1]
        out.append(sum(part) / len(part))
    return out
