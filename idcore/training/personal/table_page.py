"""The page of `table`: a Markdown table, its JSON, and a sheet of what each system draws."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from ... import prompts
from ...metrics.drawn_attributes import drawn_photo, table_people
from ..experiments import cell, mean_of, table, write_page
from .table import CHANGES, COMMON, EDITS, GALLERY, truth

COLUMNS = {
    "distance": "distance to the person", "rank1": f"nearest of {GALLERY}", "found": "face found",
    "adherence": "asked attributes", "background": "background", "style": "style", "expression": "expression",
    "pose": "pose", "seconds": "CPU seconds to learn", "kilobytes": "KB",
}  # fmt: skip
TILE, LINE, MARGIN = 96, 14, 130


def report(out: Path, rows: Sequence[Mapping[str, Any]], docs: Path) -> list[Path]:
    """docs/results/personal.json, docs/personal.md and docs/personal.png."""
    names, seeds = list(dict.fromkeys(r["run"] for r in rows)), sorted({r["seed"] for r in rows})
    best = truth(out, sorted({r["person"] for r in rows}))
    facts = {"seeds": seeds, "changes": {k: list(v) for k, v in CHANGES.items()}, "the renderer's own drawings": best}
    cells = {"the renderer's own drawings": [cell([best.get(k)]) for k in COLUMNS]}
    cells |= {name: [cell([mean_of(rows, name, seed, k) for seed in seeds]) for k in COLUMNS] for name in names}
    page = _words(table(COLUMNS, cells.items()), seeds, len({r["person"] for r in rows}), "DreamIdentity" in names)
    written = [*write_page(docs, "personal", facts, rows, page), docs / "personal.png"]
    _sheet(out, rows, names).save(written[-1])
    return written


def _words(lines: Sequence[str], seeds: Sequence[int], people: int, dream: bool) -> str:
    page = [
        "# One photo, four systems" if dream else "# One photo, three systems", "",
        f"On tiny-sd, the embedded text-to-image model of drawn people: {people} people whom no training saw, each "
        f"learned from one 64 px photo, other people for each of {len(seeds)} seed(s). Eight prompts of the set "
        f"`{EDITS}` (background, style, expression, pose), four steps, the same noise for all. Means over the seeds, "
        "with half the range between them.", "",
        *lines, "",
        "- Distance: of the embedded recogniser to a neutral drawing of the person (0.6 is its threshold on photos); a "
        f"picture without a face counts 1.5. Nearest of {GALLERY}: share of pictures whose nearest drawing is the "
        "right person's. Asked attributes: share of those that the prompts name and the pictures have.",
        "- `a person` is the base alone: nothing is learned. `word made from the drawing` is what tiny-sd would know "
        "the person by, made from the renderer's parameters: what its word space can hold.",
        "- CPU seconds are those of all threads together, for one person. DreamBooth's class pictures, drawn once for "
        "all, and DreamIdentity's own training are not in them.",
        f"- Settings that differ from the defaults of tiny-sd: {_changed()}.", "",
        "Runs and settings: `docs/results/personal.json`. Again: `python -m idcore.training.personal.table --out "
        "runs/personal --docs docs`.", "",
        "![drawings by system](personal.png)", "",
        "Left the photo; then a column for each prompt: blue; smiling, green; surprised, yellow; left, red; right, "
        "white; pencil, pink; cartoon, orange; night, purple.", "",
    ]  # fmt: skip
    return "\n".join(page)


def _changed() -> str:
    own = {k: [c for c in v if c not in COMMON] for k, v in CHANGES.items()}
    return "; ".join(f"{name} `{' '.join(c)}`" for name, c in own.items())


def _sheet(out: Path, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Image.Image:
    """Of the first person: the photo, and what each system draws for each prompt."""
    first = rows[0]
    who = table_people(GALLERY)[0][first["person"]]
    strips = [
        Image.open(out / f"seed{first['seed']}" / f"person{first['person']}" / n.replace(" ", "-") / "drawn.png")
        for n in names
    ]
    asked = prompts.load(EDITS)
    own = Image.new("RGB", strips[0].size)
    for i, labels in enumerate(asked.labels):
        own.paste(drawn_photo(who, number=1, **labels), (64 * i, 0))
    columns = strips[0].width // 64
    sheet = Image.new("RGB", (MARGIN + (1 + columns) * TILE, (1 + len(strips)) * TILE), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (name, strip) in enumerate(zip(["drawn by the renderer", *names], [own, *strips])):
        for line, part in enumerate(_broken(name)):
            pen.text((4, row * TILE + TILE // 2 - LINE + line * LINE), part, fill="black")
        large = strip.resize((columns * TILE, TILE), Image.Resampling.NEAREST)
        sheet.paste(large, (MARGIN + TILE, row * TILE))
        sheet.paste(drawn_photo(who).resize((TILE, TILE), Image.Resampling.NEAREST), (MARGIN, row * TILE))
    return sheet


def _broken(name: str, width: int = 19) -> Iterator[str]:
    line = ""
    for word in name.split():
        if line and len(line) + len(word) >= width:
            yield line
            line = ""
        line = f"{line} {word}".strip()
    yield line
