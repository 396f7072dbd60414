"""The model card of a result: recipe, figures, curves."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...workflows import write_text
from ..settings import as_text

if TYPE_CHECKING:
    from .task import PuLIDTask

_WHAT = {1: "L_diff", 2: "L_diff + L_id", 3: "L_diff + L_id + L_align"}
_WINDOW = 20  # steps that a curve averages over


def write_card(task: PuLIDTask, folder: Path, facts: Mapping[str, Any]) -> list[Path]:
    """README.md and curves.png of a result whose run's records stand in the folder above."""
    run = folder.parent
    losses, measures = read_lines(run / "losses.jsonl"), read_lines(run / "measures.jsonl")
    written = []
    drawn = bool(losses) and importlib.util.find_spec("matplotlib") is not None
    if drawn:
        written.append(draw_curves({f"stage {task.stage}": (losses, measures)}, folder / "curves.png"))
    text = _card(task, facts, losses, measures, drawn)
    write_text(folder / "README.md", text)
    return [*written, folder / "README.md"]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A file of JSON lines; [] where there is none."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _card(task: PuLIDTask, facts: Mapping[str, Any], losses: list, measures: list, drawn: bool) -> str:
    c, data = task.config, facts.get("data", {})
    base = task.base.name if task.fast is task.base else f"{task.base.name}, 4-step passes on {task.fast.name}"
    lines = [
        "---", "tags: [pulid, identity, text-to-image]", f"base_model: {json.dumps(c.model.base)}", "---", "",
        f"# PuLID ({task.module.version}), stage {task.stage}", "",
        f"An identity adapter trained by `idcore train pulid` after PuLID (arXiv 2404.16022): stage {task.stage}, "
        f"{_WHAT[task.stage]}.", "",
        "| | |", "|---|---|",
        f"| base | {base} |",
        f"| encoder reads | {c.face.features} |",
        f"| layers | {len(task.module.config.layers)} |",
        f"| steps of this stage | {facts.get('steps', '?')}, {facts.get('global_batch', '?')} samples each |",
        f"| weights | {'averaged' if facts.get('averaged') else 'as trained'}, {c.result.dtype} |",
        f"| inference mode | {c.result.mode} |",
        f"| data | {', '.join(f'{k} {v}' for k, v in data.items() if isinstance(v, (int, float, str)))} |",
        "", "## Use", "",
        "    idcore generate --system RESULT --id photo.jpg --prompt \"portrait, color, cinematic\" --out pictures"
        + (f" --base {c.model.base}" if c.model.base != "tiny" else ""),
        "", "`pulid.safetensors` has the keys of the published file; PuLID's own code and the community's loaders read "
        "it where the base and the sizes are the published ones.", "", "## Figures", "",
        *_figures(task, losses, measures), "",
    ]  # fmt: skip
    if drawn:
        lines += ["![curves](curves.png)", ""]
    lines += [
        "## Limits", "",
        "A face is personal data: use photos of people who agreed. Similarity is measured by "
        f"{', '.join(j.measure.recogniser for j in getattr(task.validator, 'judges', [])) or 'no recogniser'}; "
        "where that is the network of the identity loss or the one that the encoder reads, the figure favours what "
        "that network sees and is no independent proof of likeness.", "",
        "## Recipe", "", "```yaml", as_text(c).rstrip(), "```",
    ]  # fmt: skip
    return "\n".join(lines)


def _figures(task: PuLIDTask, losses: Sequence[Mapping], measures: Sequence[Mapping]) -> list[str]:
    if measures:
        first, last = measures[0], measures[-1]
        lines = [f"| measure | step {first['step']} | step {last['step']} |", "|---|---|---|"]
        for name in sorted(last["measures"]):
            before = first["measures"].get(name)
            lines.append(f"| {name} | {'' if before is None else f'{before:.4f}'} | {last['measures'][name]:.4f} |")
        return lines
    if not losses:
        return ["No measures were taken."]
    tail = losses[-_WINDOW:]
    names = sorted({k for line in tail for k in line["logs"]})
    means = {n: [line["logs"][n] for line in tail if n in line["logs"]] for n in names}
    return [
        f"Means over the last {len(tail)} steps: " + ", ".join(f"{k} {sum(v) / len(v):.4f}" for k, v in means.items())
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
