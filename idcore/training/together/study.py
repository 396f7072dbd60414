"""What a style takes of a person's likeness, by the system that carries the person; and two people in one picture.

    python -m idcore.training.together.study --out runs/together --docs docs [--pulid RESULT] [--dream RESULT]

On tiny-sd, four steps, one pass of the same kernels a step. For every seed a StyleForge LoRA is trained, for every
person once SeFi-IDE's words; PuLID and DreamIdentity are taken as given. Every person is drawn as a photo, in the
style by tiny-sd's own word for it, and in the style by the LoRA. Resumable: what is there is not made again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ...attention.masks import read_masks
from ...env import command_line, machine
from ...generating import GenerateRequest
from ...generating_base import Artist
from ...generating_people import grouped
from ...metrics.drawn_attributes import drawn_photo
from ...workflows import save_picture, write_text
from ..commands import Say
from ..experiments import carry_out, cell, parser_of
from .pieces import Carrier, Settings, carriers, photos, trained_style

COLOURS = ("blue", "yellow")
LAYOUT = "4 (1) 4"  # of two people, with nobody between them
PERSON, OTHER = "S*", "T*"
PLAIN, WORD, LORA = "photo", "style's word", "StyleForge"
PROMPTS = {PLAIN: "a photo of {who}, {colour} background", WORD: "a {style} drawing of {who}, {colour} background",
           LORA: "a photo of [V] style, {who}, {colour} background"}  # fmt: skip
NOBODY = "nobody"


def pictures(
    settings: Settings, out: Path, say: Any = print, *, pulid: Path | None = None, dream: Path | None = None,
    base: Any = None,
) -> tuple[list[dict[str, Any]], Any]:  # fmt: skip
    """Make what is missing; a row per picture, and the exam of the people.

    Rows say carrier, look, seed, person (their number; of two people the left one, and "right"), colour and file.
    """
    from ..bases.opening import open_text_base

    seeds, files, exam = photos(settings, out)
    base = base or open_text_base(settings.base)
    found = carriers(settings, base, seeds, files, out / "trained", say, pulid=pulid, dream=dream)
    rows = []
    for seed in settings.seeds:
        style = trained_style(settings, base, seed, out / "trained", say)
        for look in PROMPTS:
            wanted = [*_alone(settings, found, seed, look), *_pairs(settings, found, seed, look)]
            rows += [row for row, _ in wanted]
            missing = [w for w in wanted if not (out / w[0]["file"]).is_file()]
            if missing:
                _draw(settings, base, style if look == LORA else None, missing, out)
                say(f"seed {seed}, {look}: {len(missing)} pictures")
    return rows, exam


Wanted = tuple[dict[str, Any], list[tuple[Carrier, int]]]


def _row(carrier: str, look: str, seed: int, person: int, colour: str, **more: Any) -> dict[str, Any]:
    safe = "_".join(p.replace(" ", "-").replace("'", "") for p in (carrier, look))
    name = f"{safe}/{seed}_{colour}_{person}.png"
    return {"carrier": carrier, "look": look, "seed": seed, "person": person, "colour": colour,
            "file": f"pictures/{name}", **more}  # fmt: skip


def _alone(settings: Settings, found: Sequence[Carrier], seed: int, look: str) -> Iterator[Wanted]:
    for colour in COLOURS:
        for i in range(settings.people):
            yield _row(NOBODY, look, seed, i, colour), []
            for c in found:
                yield _row(c.name, look, seed, i, colour), [(c, i)]


def _pairs(settings: Settings, found: Sequence[Carrier], seed: int, look: str) -> Iterator[Wanted]:
    """Each carrier's person on the left beside another by the own word on the right, in a picture twice as wide."""
    right = found[0]
    for left in found:
        for i in range(settings.people):
            j = (i + 1) % settings.people
            row = _row(f"{left.name} + {right.name}", look, seed, i, COLOURS[0], right=j)
            yield row, [(left, i), (right, j)]


def _draw(settings: Settings, base: Any, style: Path | None, wanted: Sequence[Wanted], out: Path) -> None:
    """Pictures of one look; the base's pipeline is left as it was."""
    look = GenerateRequest("", out, base=settings.base, styles=() if style is None else (style,), guidance=1.0)
    # one system acts in the attention at a time; diffusers' own pipeline takes each by `attach`
    artist = Artist(look, None, lambda r, system: base.pipe)
    try:
        for row, people in wanted:
            save_picture(_picture(settings, artist, row, people), out / _folder(out, row["file"]))
    finally:
        artist.drop_styles()


def _folder(out: Path, file: str) -> str:
    (out / file).parent.mkdir(parents=True, exist_ok=True)
    return file


def _picture(
    settings: Settings, artist: Artist, row: dict[str, Any], people: Sequence[tuple[Carrier, int]]
) -> Image.Image:
    identities = [c.of(i) for c, i in people]
    inside = [c.system for c, _ in people if not c.by_prompt]
    parties = grouped(identities, inside[0] if inside else None)
    names = [n for (c, _), n in zip(people, (PERSON, OTHER)) if c.by_prompt]
    who = " and ".join(n if c.by_prompt else "a person" for (c, _), n in zip(people, (PERSON, OTHER))) or "a person"
    asked, said = PROMPTS[row["look"]], {"colour": row["colour"], "style": settings.style}
    changes: dict[str, Any] = {"placeholder": names or None, "width": None, "height": None, "background": None}
    masks: tuple[Any, ...] = ()
    if len(people) == 2:
        side = artist.pipe.unet.config.sample_size * artist.pipe.vae_scale_factor
        masks = read_masks(LAYOUT, 2)
        changes |= {"width": 2 * side, "height": side, "background": asked.format(who="an empty scene", **said)}
    artist.request = replace(artist.request, **changes)
    number = 1000 * row["seed"] + 10 * row["person"] + COLOURS.index(row["colour"])
    with artist.scene(asked.format(who=who, **said), parties, masks) as draw:
        return draw(number)


# -- judging ----------------------------------------------------------------------------------------------


def judged(rows: Sequence[dict[str, Any]], exam: Any, out: Path, style: str) -> list[dict[str, Any]]:
    """One line per carrier, look and seed: the exam's means; of two people both sides count."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for r in rows:
        groups.setdefault((r["carrier"], r["look"], r["seed"]), []).append(r)
    lines = []
    for (carrier, look, seed), part in groups.items():
        shown, people, labels = [], [], []
        for r in part:
            picture = Image.open(out / r["file"]).convert("RGB")
            sides = [picture] if "right" not in r else _sides(picture)
            shown += sides
            people += [r["person"], r.get("right", r["person"])][: len(sides)]
            asked = {"style": "photo" if look == PLAIN else style, "background": r["colour"]}
            labels += [asked] * len(sides)
        lines.append({"carrier": carrier, "look": look, "seed": seed, **exam.score(shown, people, labels)})
    return lines


def _sides(picture: Image.Image) -> list[Image.Image]:
    w, h = picture.size
    return [picture.crop((0, 0, w // 2, h)), picture.crop((w // 2, 0, w, h))]


def floor_of(settings: Settings, seeds: Sequence[int], exam: Any) -> dict[str, float]:
    """What the renderer's own drawings of the people in the style come to: no system can be asked for more."""
    shown = [drawn_photo(s, style=settings.style, background=c, number=1) for s in seeds for c in COLOURS]
    people = [i for i in range(len(seeds)) for _ in COLOURS]
    return exam.score(shown, people, [{"style": settings.style}] * len(shown))


# -- telling ----------------------------------------------------------------------------------------------


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown: mean and spread over the seeds of each carrier's figures by look, and what the styles take."""
    head = "| person by | look | distance | style takes | right person | face found | style seen | background |"
    out = [head, "|---" * 8 + "|"]
    for carrier in dict.fromkeys(line["carrier"] for line in lines):
        by = {k: [x for x in lines if (x["carrier"], x["look"]) == (carrier, k)] for k in PROMPTS}
        for look, some in by.items():
            taken = "" if look == PLAIN else _cell([a["distance"] - b["distance"] for a, b in zip(some, by[PLAIN])])
            cells = [_cell([x[k] for x in some]) for k in ("distance", "rank1", "found", "style", "background")]
            out.append(f"| {carrier} | {look} | {cells[0]} | {taken} | {' | '.join(cells[1:])} |")
    return "\n".join(out)


def _cell(values: Sequence[float]) -> str:
    return cell(values, 3, partial(np.std, ddof=1))


def montage(rows: Sequence[dict[str, Any]], out: Path, seed: int, edge: int = 96) -> Image.Image:
    """A line per carrier: photos of the first two people, then both of them in each look."""
    chosen = [r for r in rows if (r["seed"], r["colour"]) == (seed, COLOURS[0]) and r["person"] < 2]
    names = list(dict.fromkeys(r["carrier"] for r in chosen))
    sheet = Image.new("RGB", (2 * edge * (1 + len(PROMPTS)), edge * len(names)), "white")
    draw = ImageDraw.Draw(sheet)
    for y, name in enumerate(names):
        for i in range(2):
            sheet.paste(_high(out / "people" / f"p{i}.png", edge), (i * edge, y * edge))
        for x, look in enumerate(PROMPTS, 1):
            for r in chosen:
                if (r["carrier"], r["look"]) == (name, look) and not ("right" in r and r["person"]):
                    sheet.paste(_high(out / r["file"], edge), ((2 * x + r["person"]) * edge, y * edge))
            if not y:
                draw.text((2 * x * edge + 3, 2), look, fill="white")
        draw.text((3, y * edge + 2), name, fill="black")
    return sheet


def _high(path: Path, edge: int) -> Image.Image:
    picture = Image.open(path).convert("RGB")
    return picture.resize((picture.width * edge // picture.height, edge), Image.Resampling.BICUBIC)


def report(settings: Settings, rows: Sequence[dict[str, Any]], exam: Any, seeds: Sequence[int], out: Path) -> dict:
    """Everything that is told, as one object."""
    lines = judged(rows, exam, out, settings.style)
    return {
        "machine": machine(), "command": command_line(), "settings": {k: str(v) for k, v in vars(settings).items()},
        "pictures": len(rows), "floor": floor_of(settings, seeds, exam), "lines": lines,
    }  # fmt: skip


def write(out: Path, found: dict[str, Any], rows: Sequence[dict[str, Any]], docs: Path) -> list[Path]:
    """docs/results/together.json and together-table.md, and docs/together.jpg."""
    (docs / "results").mkdir(parents=True, exist_ok=True)
    written = [docs / "results" / "together.json", docs / "results" / "together-table.md", docs / "together.jpg"]
    write_text(written[0], json.dumps(found, indent=1))
    write_text(written[1], table(found["lines"]))
    montage(rows, out, found["lines"][0]["seed"]).save(written[2], quality=88)
    return written


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = parser_of("together.study", __doc__, "runs/together")
    parser.add_argument("--pulid", type=Path, help="result folder of `idcore train pulid --base tiny-sd`")
    parser.add_argument("--dream", type=Path, help="result folder or weights of `idcore train dreamidentity`")
    parser.add_argument("--people", type=int, default=Settings.people)
    parser.add_argument("--style", default=Settings.style, choices=("pencil", "oil", "cartoon", "sepia", "night"))
    found: dict[str, Any] = {}

    def run(o: argparse.Namespace, say: Say) -> list[dict[str, Any]]:
        settings = Settings(people=o.people, seeds=tuple(o.seeds), style=o.style)
        rows, exam = pictures(settings, o.out, say, pulid=o.pulid, dream=o.dream)
        found.update(report(settings, rows, exam, photos(settings, o.out)[0], o.out))
        return rows

    return carry_out(parser, run, lambda out, rows, docs: write(out, found, rows, docs), argv)


if __name__ == "__main__":
    sys.exit(main())
