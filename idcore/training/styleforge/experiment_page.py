"""The page of StyleForge's experiment: tables over seeds, and a sheet of pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ...env import command_line, machine
from ...workflows import write_text
from ..experiments import cell, deviation
from .exam import BY_WORD, CONTENTS, EMPTY, MEASURES, SEEDS

BLOCKS = ((len(CONTENTS), "with the word"), (len(EMPTY), "nobody asked for"), (len(CONTENTS), "without the word"))


def report(out: Path, found: Mapping[str, Any], settings: Sequence[str], docs: Path) -> list[Path]:
    """docs/results/styleforge.json, docs/styleforge-results.md and .jpg of what `experiment.run` found."""
    rows = found["rows"]
    (docs / "results").mkdir(parents=True, exist_ok=True)
    written = [docs / "results" / "styleforge.json", docs / "styleforge-results.md", docs / "styleforge-results.jpg"]
    told_all = {"command": command_line(), "machine": machine(), "settings": list(settings), **found}
    write_text(written[0], json.dumps(told_all, indent=1))
    write_text(written[1], _page(found, settings))
    _sheet(out, rows).save(written[2], quality=92)
    return written


def _page(found: Mapping[str, Any], settings: Sequence[str]) -> str:
    rows = found["rows"]
    seeds, targets = sorted({r["seed"] for r in rows}), list(dict.fromkeys(r["target"] for r in rows))
    count, methods = len(CONTENTS) * len(SEEDS), list(dict.fromkeys(r["method"] for r in rows))
    return "\n".join([
        "# StyleForge on drawn styles", "", _base(found["base"]), "",
        "LoRA; 10 pictures of people and 6 of places in the style; 16 Aux images of people in other painted styles by "
        "turns, which the base does not know either; all drawn by the project. DreamBooth without Aux has the StyleRef "
        "term alone, with as many StyleRef samples in a step and as many steps; the last weights count, a moving "
        f"average. Means over {len(seeds)} seeds ({len(targets)} styles each; people, first weights and noise differ) "
        f"with the spread between the seeds; {count} pictures of people, {len(EMPTY) * len(SEEDS)} of nobody and "
        f"{count} without the style's word a run. Guidance is away from the empty prompt; 1: none.",
        *(line for g in dict.fromkeys(r["guidance"] for r in rows) for line in _drawn_at(g, rows, seeds)),
        "", "## What the columns say", "", *_said_of_columns(found["judge"]), "",
        f"Settings: {', '.join(f'`{s}`' for s in settings)}. Runs: `docs/results/styleforge.json`. Again: "
        "`python -m idcore.training.styleforge.experiment`.", "",
        f"First seed. From left to right: {', '.join(said for _, said in BLOCKS)}. For each style the rows are "
        f"{', '.join(methods)}:", "", "![pictures](styleforge-results.jpg)", "",
    ])  # fmt: skip


def _drawn_at(guidance: float, rows: Sequence[Mapping], seeds: Sequence[int]) -> list[str]:
    mine = [r for r in rows if r["guidance"] == guidance]
    parts = ("style", "Share of pictures in the target style"), ("way", "Way to the style"), ("face", "Face found"), (
        "plain", "Photo without the word",
    )  # fmt: skip
    return [
        "", f"## Drawn with guidance {guidance:g}", "", *_table(mine, seeds),
        *(line for key, said in parts for line in ("", f"{said}, by style:", "", *_by_style(mine, key))),
    ]  # fmt: skip


def _base(base: Mapping[str, Any]) -> str:
    asked = _asked(base["by word"], "style")
    if "training" not in base:
        return f"Base: the shipped tiny-sd, which knows the styles by their names; asked so it draws them: {asked}."
    training = base["training"] or {}
    return (
        f"Base: one of `idcore train tiny-sd --set without_styles={','.join(BY_WORD)}`, {training.get('steps')} steps, "
        f"{training.get('samples')} samples, from nothing. It never saw these styles, nor their names. Share of "
        f"pictures in a style that is asked for by its name: {asked}."
    )


def _asked(known: Mapping[str, Mapping[str, float]], key: str) -> str:
    return ", ".join(f"{style} {found[key]:.2f}" for style, found in known.items())


def _said_of_columns(judge: Mapping[str, Any]) -> list[str]:
    known = judge["shipped base by word"]
    return [
        f"- Target style: by a linear classifier that is right for {judge['right']:.1%} of drawings of unseen people. "
        "It learned from drawings alone, which are sharper than what so small a model paints: of pictures of the "
        "shipped tiny-sd, which trained on all these styles, asked for them by name, it takes for the style: "
        f"{_asked(known, 'style')}. Where that is 0, it cannot be reached here.",
        "- Way to the style: of what sets drawings in the style apart from the same as photos, how much the pictures "
        "have taken on since the base's own; mean features that the classifier sees. The shipped tiny-sd, by name: "
        f"{_asked(known, 'way')}.",
        "- All three: in the style, before the wall that was asked for, with a face that the detector finds.",
        "- Nobody where asked: prompts of an empty scene; Multi-StyleForge draws them by its second word.",
        "- Photo without the word: prompts that do not say the style; less than 1: the style leaks.",
    ]


def _table(rows: Sequence[Mapping], seeds: Sequence[int]) -> list[str]:
    lines = ["| | " + " | ".join(MEASURES.values()) + " |", "|---" * (len(MEASURES) + 1) + "|"]
    for method in dict.fromkeys(r["method"] for r in rows):
        mine = [r for r in rows if r["method"] == method]
        cells = [_cell([[r[k] for r in mine if r["seed"] == s] for s in seeds]) for k in MEASURES]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return lines


def _by_style(rows: Sequence[Mapping], key: str) -> list[str]:
    targets, seeds = list(dict.fromkeys(r["target"] for r in rows)), sorted({r["seed"] for r in rows})
    lines = ["| | " + " | ".join(targets) + " |", "|---" * (len(targets) + 1) + "|"]
    for method in dict.fromkeys(r["method"] for r in rows):
        mine = [r for r in rows if r["method"] == method]
        cells = [[[r[key] for r in mine if r["seed"] == s and r["target"] == t] for s in seeds] for t in targets]
        lines.append(f"| {method} | " + " | ".join(_cell(c) for c in cells) + " |")
    return lines


def _cell(by_seed: Sequence[Sequence[float]]) -> str:
    """The mean over the seeds' means, and their deviation."""
    return cell([float(np.mean(v)) for v in by_seed if v], 2, deviation)


def _sheet(out: Path, rows: Sequence[Mapping]) -> Image.Image:
    """Pictures of the first seed: a block for each style and guidance, a row for each method."""
    first = [r for r in rows if r["seed"] == min(r["seed"] for r in rows)]
    found: dict[str, list[Image.Image]] = {}
    for r in first:
        name = f"measures-{r['guidance']:g}.png"
        file = out / f"seed{r['seed']}" / r["target"] / r["method"].replace(" ", "-") / name
        found.setdefault(f"{r['target']}, guidance {r['guidance']:g}", []).append(Image.open(file))
    width, line, edge = max(p.width for some in found.values() for p in some), 14, 64
    height = sum(line + edge * len(some) for some in found.values())
    sheet = Image.new("RGB", (width, height), "white")
    pen, y = ImageDraw.Draw(sheet), 0
    for said, some in found.items():
        pen.text((2, y + 1), said, fill="black")
        y += line
        for row in some:
            sheet.paste(row, (0, y))
            y += edge
    return sheet
