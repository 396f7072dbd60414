"""What came of `idcore augment`: counts, means, and a picture of examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from textwrap import wrap

from PIL import Image, ImageDraw

from ...encoders.images import load_image
from .options import Pair

EDGE, ROWS, COLUMNS = 160, 8, 6  # of the picture of examples


@dataclass
class AugmentReport:
    """`names` given, `pairs` kept, `drops` (what, reason, detail), pictures `drawn`, `reused`: names that stood."""

    names: int
    pairs: list[Pair]
    drops: list[dict]
    drawn: int
    reused: int
    out: Path

    @property
    def used(self) -> int:
        """Names with at least one pair."""
        return len({p.name for p in self.pairs})

    def table(self) -> str:
        """Counts by reason with an example each, pairs by prompt, and the means of the two scores."""
        rows = [("names", f"{self.names:,}", f"{self.used:,} used, {self.reused:,} stood already")]
        rows += [("pictures drawn", f"{self.drawn:,}", ""), ("pairs", f"{len(self.pairs):,}", "")]
        if self.pairs:
            rows.append(("  identity, mean", f"{fmean(p.identity for p in self.pairs):.3f}", ""))
            texts = [p.text for p in self.pairs if p.text is not None]
            rows.append(("  text, mean", f"{fmean(texts):.3f}" if texts else "-", "" if texts else "not looked at"))
        for prompt, n in Counter(p.prompt for p in self.pairs).most_common(30):
            rows.append(("  with", f"{n:,}", prompt))
        reasons = Counter(d["reason"] for d in self.drops)
        for reason, n in reasons.most_common():
            example = next(d for d in self.drops if d["reason"] == reason)
            rows.append((f"dropped: {reason}", f"{n:,}", f"e.g. {example['what']}: {example['detail']}"))
        return "\n".join(f"{a:<26}{b:>9}  {c}".rstrip()[:160] for a, b, c in rows)


def contact_sheet(out: Path, pairs: Sequence[Pair]) -> Image.Image:
    """The first names, a row each: the source picture, then edited ones under their prompts with identity and text."""
    rows: dict[str, list[Pair]] = {}
    for p in pairs:
        row = rows.setdefault(p.name, [])
        if p.edited not in [q.edited for q in row]:
            row.append(p)
    shown = list(rows.values())[:ROWS]
    line = 40  # three lines of words
    width = 1 + max(min(len(r), COLUMNS) for r in shown)
    sheet = Image.new("RGB", (width * EDGE, len(shown) * (EDGE + line)), "white")
    draw = ImageDraw.Draw(sheet)
    for y, row in enumerate(shown):
        places = [(row[0].source, row[0].name, "source")]
        for p in row[:COLUMNS]:
            text = "" if p.text is None else f", text {p.text:.2f}"
            places.append((p.edited, p.prompt, f"identity {p.identity:.2f}{text}"))
        for x, (file, *words) in enumerate(places):
            picture = load_image(out / file)
            how = Image.Resampling.NEAREST if picture.width < EDGE else Image.Resampling.LANCZOS
            corner = (x * EDGE, y * (EDGE + line))
            sheet.paste(picture.resize((EDGE, EDGE), how), corner)
            told = [*wrap(words[0], EDGE // 6)[:2], words[1]]
            for i, word in enumerate(told):
                draw.text((corner[0] + 3, corner[1] + EDGE + 1 + 12 * i), word, fill="black")
    return sheet
