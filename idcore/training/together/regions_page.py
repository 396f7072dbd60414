"""The page of `regions`: two tables, their JSON, and sheets of the first seed's pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..experiments import cell, deviation, mean_of, table, write_page

NAME = "together-regions"
FIGURES = {
    "found": "face found", "style": "person in the style", "reached": "wall reached", "as alone": "wall as alone",
}  # fmt: skip
KEPT = {"layout": "layout kept", "style": "no longer a photo", "distance": "distance to the person"}
SIDES = {"left": "face on the left", "right": "face on the right"}


def report(out: Path, rows: Sequence[Mapping[str, Any]], docs: Path, settings: Sequence[str]) -> list[Path]:
    """docs/results/together-regions.json, docs/together-regions.md, and two sheets."""
    seeds = sorted({r["seed"] for r in rows})
    one, two = [r for r in rows if "styles" in r], [r for r in rows if "left" in r]
    kept = [r for r in rows if "strength" in r]
    tables = [_table(one, FIGURES, seeds), _table(two, SIDES, seeds), _table(kept, KEPT, seeds)]
    written = write_page(
        docs, NAME, {"seeds": seeds, "settings": list(settings)}, rows, _words(tables, one, len(seeds), settings)
    )
    first = out / f"seed{seeds[0]}"
    for name, sheet in (
        ("", first / one[0]["styles"].replace(", ", "_") / "pictures.png"),
        ("-two", first / "pairs.png"),
    ):
        written.append(docs / f"{NAME}{name}.jpg")
        Image.open(sheet).save(written[-1], quality=88)
    return written


def _table(rows: Sequence[Mapping[str, Any]], figures: Mapping[str, str], seeds: Sequence[int]) -> list[str]:
    names = dict.fromkeys(r["run"] for r in rows)
    return table(
        figures, [(n, [cell([mean_of(rows, n, s, k) for s in seeds], 2, deviation) for k in figures]) for n in names]
    )


def _words(
    tables: Sequence[Sequence[str]], one: Sequence[Mapping[str, Any]], seeds: int, settings: Sequence[str]
) -> str:
    ways = list(dict.fromkeys(r["way"] for r in one))
    return "\n".join([
        "# Regions, measured in small", "",
        f"On tiny-sd, four steps, means over {seeds} seed(s) with the deviation between them. "
        "`python -m idcore.training.together.regions --out runs/regions --docs docs`.", "",
        "## A person and a background with words of their own", "",
        "Multi-StyleForge, trained once per seed for each pair of styles (of people, of places; ten pictures "
        f"each; `{' '.join(settings)}`). Four prompts of a person in \"[V] style\" and four of nobody in \"[W] style\" "
        "share a picture, `--person-region center`, eight noises each.", "",
        *tables[0], "",
        "- Face found: by the embedded detector. Person in the style: a linear classifier of the project's drawings.",
        "- Wall reached: how far the colour of both sides has come from the person's prompt alone (0) to the "
        "background's alone (1).",
        "- Wall as alone: share of pictures whose sides a classifier of drawn places takes for the style that it sees "
        "in the background's prompt alone.", "",
        f"The first seed's pictures, two noises of each pair of prompts: {'; '.join(ways)}; last the background's "
        "prompt alone.", "",
        f"![a person and a background]({NAME}.jpg)", "",
        "## Two people", "",
        "Each of three drawn people on the left, known by their own word, beside the next on the right, four noises: a "
        "face is looked for on both sides. tiny-sd learned one face, always in one place.", "",
        *tables[1], "",
        f"![two people by each way]({NAME}-two.jpg)", "",
        "## Photos redrawn", "",
        "Drawn photos of six people \"in pencil\" by `idcore.sampling.stylise`, four steps, one noise per person and "
        "seed. Layout: correlation of 8x8 shades with the photo. No longer a photo: share by the judge of the six "
        "styles. Distance: of the embedded recogniser; a missing face counts 1.5.", "",
        *tables[2], "",
    ])  # fmt: skip
