"""The JSON of an evaluation, and its figures in words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..env import command_line, machine
from .probes import recogniser_key

if TYPE_CHECKING:
    from .evaluate import Job, Judges

FORMAT, VERSION = "idcore-evaluation", 1


def result_of(job: Job, pictures: Path) -> dict[str, Any]:
    """See docs/evaluation.md."""
    figures = {k: s.figure() for k, s in job.scores.items()} | job.single
    recognisers = {
        name: {
            "recogniser": a.measure.recogniser, "measure": a.measure.name, "threshold": a.measure.threshold,
            "threshold_from": a.measure.source, "key": recogniser_key(a), "circular": job.judges.circular(name),
            "matrix": _plain(job.faces[name].matrix),
            **{k.split(".", 1)[1]: v for k, v in job.faces[name].whole.items()},
        }
        for name, a in job.judges.faces.items()
    }  # fmt: skip
    rows = []
    for i, r in enumerate(job.rows):
        values = {k: round(float(s.values[i]), 5) for k, s in job.scores.items() if not np.isnan(s.values[i])}
        row = {"file": r.file, "prompt": r.prompt, "person": r.person, "seed": r.seed, "without": r.without}
        said = job.seen.get("attributes", {i: None})[i] if "attributes" in job.seen else None
        rows.append(row | {"labels": r.labels, "scores": values} | ({"seen": said} if said else {}))
    counts = {
        "pictures": len(rows), "people": len(job.people), "prompts": len({r.prompt for r in job.rows if r.prompt}),
        "unreadable": job.unreadable,
    }  # fmt: skip
    return {
        "format": FORMAT, "version": VERSION, "machine": machine(), "command": command_line(), "folder": str(pictures),
        "counts": counts, "figures": figures, "recognisers": recognisers, "people": [p.name for p in job.people],
        "networks": {k: n.key for k, n in (("clip", job.judges.clip), ("features", job.judges.features)) if n},
        "caveats": caveats(job.judges, figures), "rows": rows,
    }  # fmt: skip


def caveats(judges: Judges, figures: dict[str, dict]) -> list[str]:
    """What the figures cannot show, in words."""
    said = []
    for name in judges.faces:
        circular = judges.circular(name)
        if circular == "yes":
            said.append(
                f"{name}: circular. It conditions the pictures that it judges: no independent proof of likeness."
            )
        elif circular == "unknown":
            said.append(
                f"{name}: it is not known whether it conditioned these pictures; if so, its scores are circular."
            )
    if all(judges.circular(n) != "no" for n in judges.faces):
        said.append("No independent recogniser looked: name a second one with --second-faces.")
    if judges.attributes:
        from .tiny_style import StyleJudge

        right = StyleJudge.from_package().right
        said.append(
            f"Styles are judged by a small classifier, right for {right:.1%} of drawn pictures of unseen people."
        )
    said += [f"{k}: {f['note']}." for k, f in figures.items() if f.get("note")]
    said.append("Intervals: 95 % by a seeded bootstrap over pictures; they do not speak for other people or prompts.")
    return said


def _plain(matrix: np.ndarray) -> list[list[float | None]]:
    return [[None if np.isnan(v) else round(float(v), 4) for v in line] for line in matrix]


def summary(result: dict[str, Any]) -> str:
    """The figures as lines of text."""
    c = result["counts"]
    lines = [
        f"{c['pictures']} pictures, {c['people']} people, {c['prompts']} prompts, {len(c['unreadable'])} unreadable"
    ]
    for key, f in result["figures"].items():
        between = "" if f.get("low") is None else f" [{f['low']:.4g}, {f['high']:.4g}]"
        lines.append(f"{key:28} {f['mean']:9.4f}{between:24} {f['words']}")
    lines += result["caveats"]
    if "changes" in result:
        lines += ["", *(c["words"] for c in result["changes"])]
        worse = [c["key"] for c in result["changes"] if c["verdict"] == "worse"]
        lines.append(f"worse beyond the interval: {', '.join(worse)}" if worse else "nothing worse beyond its interval")
    return "\n".join(lines)
