"""Parts of an evaluation's page: style sheet, histograms as inline SVG, tables of who looks like whom."""

from __future__ import annotations

import html
from collections.abc import Sequence

PEOPLE = 40  # most people of whom the table is drawn
BARS = 24
STYLE = """
body{margin:0;background:#fafafa;color:#1c1c1e;font:15px/1.45 system-ui,sans-serif}
main{max-width:1180px;margin:0 auto;padding:24px}
h1{font-size:22px;overflow-wrap:anywhere}h2{font-size:18px;margin:28px 0 8px}h3{font-size:16px;margin:22px 0 6px}
table{border-collapse:collapse;background:#fff;margin:6px 0}td,th{border:1px solid #ddd;padding:3px 9px;text-align:left}
th{background:#f0f0f2}.small{color:#555;font-size:13px;overflow-wrap:anywhere}
.mark{background:#b3261e;color:#fff;border-radius:3px;padding:0 5px;font-size:12px}
.flow{display:flex;flex-wrap:wrap;gap:10px}.person{display:flex;gap:18px;align-items:flex-start}
.card{margin:0;background:#fff;border:1px solid #ddd;border-radius:4px;padding:5px;font-size:12px;max-width:140px}
.bad{border-color:#b3261e;background:#fff1f0}.card img,.person>img{display:block;border-radius:2px}
figcaption{overflow-wrap:anywhere;margin-top:3px}.prompt{margin:6px 0 4px;font-style:italic;overflow-wrap:anywhere}
.prompt{max-width:290px;min-height:2.9em}
.none{width:128px;height:128px;background:#eee;color:#b3261e;overflow:hidden}
.matrix td{text-align:right;font-size:12px;padding:2px 5px}.hist{background:#fff;border:1px solid #ddd;padding:6px}
"""


def columns(values: Sequence[float], count: int) -> list[int]:
    """How many values lie in each of `count` equal parts of their range."""
    low, high = min(values), max(values)
    width = (high - low) / count or 1.0
    found = [0] * count
    for v in values:
        found[min(count - 1, int((v - low) / width))] += 1
    return found


def histogram(name: str, values: Sequence[float], threshold: float | None = None) -> str:
    """Bars of how often values occur; a red line at the threshold where it lies among them."""
    w, h = 250, 90
    low, high = min(values), max(values)
    counts = columns(values, BARS)
    bar, top = w / BARS, max(counts)
    bars = "".join(
        f'<rect x="{i * bar:.1f}" y="{h - h * c / top:.1f}" width="{bar - 1:.1f}" height="{h * c / top:.1f}"/>'
        for i, c in enumerate(counts)
    )
    line = ""
    if threshold is not None and low < threshold < high:
        x = (threshold - low) / (high - low) * w
        line = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{h}" stroke="#b3261e" stroke-width="2"/>'
    ends = f'<text x="0" y="{h + 14}">{low:.3g}</text><text x="{w}" y="{h + 14}" text-anchor="end">{high:.3g}</text>'
    words = f"{html.escape(name)}, {len(values)} values" + (", red: threshold" if line else "")
    drawn = f'<g fill="#3b6fb6">{bars}</g>{line}<g font-size="11">{ends}</g>'
    return f'<div class="hist"><div class="small">{words}</div><svg width="{w}" height="{h + 18}">{drawn}</svg></div>'


def matrix_table(matrix: Sequence[Sequence[float | None]], names: Sequence[str], *, nearer_is_small: bool) -> str:
    """Pictures meant for the person of the line against the photos of the person of the column; nearer is darker."""
    known = [v for line in matrix for v in line if v is not None]
    if len(names) < 2 or not known:
        return ""
    if len(names) > PEOPLE:
        return f"<p>{len(names)} people: the table of who looks like whom is in the JSON.</p>"
    low, high = min(known), max(known)

    def cell(v: float | None) -> str:
        if v is None:
            return "<td></td>"
        near = (v - low) / (high - low or 1.0)
        near = 1 - near if nearer_is_small else near
        return f'<td style="background:rgba(59,111,182,{0.75 * near:.2f})">{v:.2f}</td>'

    head = "".join(f"<th>{html.escape(n)}</th>" for n in names)
    lines = "".join(f"<tr><th>{html.escape(n)}</th>{''.join(map(cell, line))}</tr>" for n, line in zip(names, matrix))
    said = "Pictures of the person of the line against photos of the person of the column."
    return f'<p class="small">{said}</p><table class="matrix"><tr><th></th>{head}</tr>{lines}</table>'
