"""`python -m idcore.bench roofline RESULTS.json --out PNG`: where each row of a report stands under the machine's roof.

The roof is what the report itself measured: the multiply-add rate in registers by dtype, and memory's copy bandwidth.
A CPU's caches hold the tensors of one layer, so a point may stand left of the slope. Prints the same rows as Markdown.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SIZE, LEFT, TOP, RIGHT, BOTTOM = (1200, 760), 90, 50, 40, 70
COLOURS = {
    "id_attention": "#1b6ca8", "semantic_alignment": "#2a9d5c", "token_attention_loss": "#c8553d",
    "align_face": "#7d5ba6", "stage_tokens": "#8a8a8a", "kv_bank": "#b8860b",
}  # fmt: skip
INK, GRID = "#222222", "#e4e4e4"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """results: reports of `bench ops`, later ones on the roof of the first."""
    parser.add_argument("results", nargs="+", type=Path, help="reports that `bench ops --json` wrote")
    parser.add_argument("--out", type=Path, default=Path("roofline.png"), help="the plot")


def points(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that multiply, with operations per byte and GFLOP/s."""
    return [
        {**row, "intensity": row["flops"] / row["bytes"], "gflops": row["flops"] / row["ms"] * 1e-6}
        for row in rows if row.get("flops") and "ms" in row
    ]  # fmt: skip


class Axes:
    """Logarithmic axes over a picture."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.x, self.y = [math.log10(v) for v in x], [math.log10(v) for v in y]

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixel of a value, inside the frame."""
        across = (math.log10(x) - self.x[0]) / (self.x[1] - self.x[0])
        up = (math.log10(y) - self.y[0]) / (self.y[1] - self.y[0])
        width, height = SIZE[0] - LEFT - RIGHT, SIZE[1] - TOP - BOTTOM
        return LEFT + min(max(across, 0), 1) * width, SIZE[1] - BOTTOM - min(max(up, 0), 1) * height


def _ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(low), math.ceil(high)
    return [m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5) if low <= math.log10(m * 10.0**e) <= high]


def _frame(draw: Any, axes: Axes, font: Any) -> None:
    for value in _ticks(*axes.x):
        x, _ = axes.at(value, 1)
        draw.line([(x, TOP), (x, SIZE[1] - BOTTOM)], fill=GRID)
        draw.text((x, SIZE[1] - BOTTOM + 8), f"{value:g}", fill=INK, font=font, anchor="ma")
    for value in _ticks(*axes.y):
        _, y = axes.at(1, value)
        draw.line([(LEFT, y), (SIZE[0] - RIGHT, y)], fill=GRID)
        draw.text((LEFT - 8, y), f"{value:g}", fill=INK, font=font, anchor="rm")
    draw.rectangle([LEFT, TOP, SIZE[0] - RIGHT, SIZE[1] - BOTTOM], outline=INK)
    draw.text((SIZE[0] / 2, SIZE[1] - 12), "floating-point operations a byte read or written", fill=INK, font=font,
              anchor="ms")  # fmt: skip
    draw.text((LEFT, TOP - 12), "GFLOP/s", fill=INK, font=font, anchor="ls")


def _roofs(draw: Any, axes: Axes, report: dict[str, Any], font: Any) -> None:
    slope, high = report["copy_gb_per_s"], 10.0 ** axes.x[1]
    peaks = {name: peak for name, peak in report["peak_gflops"].items() if peak}
    for name, peak in peaks.items():
        ridge = peak / slope
        draw.line([axes.at(ridge, peak), axes.at(high, peak)], fill=INK, width=3)
        x, y = axes.at(high, peak)
        draw.text((x - 6, y - 6), f"{name} multiply-adds: {peak:g} GFLOP/s", fill=INK, font=font, anchor="rs")
    top = max(peaks.values())
    low = max(10.0 ** axes.x[0], 10.0 ** axes.y[0] / slope)
    draw.line([axes.at(low, low * slope), axes.at(top / slope, top)], fill=INK, width=3)
    x, y = axes.at(low, low * slope)
    draw.text((x + 40, y - 10), f"copy: {slope:g} GB/s", fill=INK, font=font, anchor="lb")


def _mark(draw: Any, at: tuple[float, float], point: dict[str, Any]) -> None:
    """A disc for float32, a ring for 16 bit; a square for backward."""
    x, y = at
    colour = COLOURS.get(point["op"], INK)
    shape = draw.rectangle if point["pass"] == "bwd" else draw.ellipse
    shape([x - 6, y - 6, x + 6, y + 6], outline=colour, width=3, fill=colour if point["dtype"] == "fp32" else "white")


def _legend(draw: Any, found: list[dict[str, Any]], font: Any) -> None:
    y = SIZE[1] - BOTTOM - 20 * (1 + len({p["op"] for p in found}))
    for op in dict.fromkeys(p["op"] for p in found):
        draw.text((SIZE[0] - RIGHT - 14, y), op, fill=COLOURS.get(op, INK), font=font, anchor="rm")
        y += 20
    text = "filled: float32, hollow: 16 bit; disc: forward, square: backward"
    draw.text((SIZE[0] - RIGHT - 14, y), text, fill=INK, font=font, anchor="rm")


def plot(report: dict[str, Any], found: list[dict[str, Any]], out: Path) -> None:
    """Writes the picture."""
    from PIL import Image, ImageDraw, ImageFont

    peaks = [peak for peak in report["peak_gflops"].values() if peak]
    intensities, rates = [p["intensity"] for p in found], [p["gflops"] for p in found]
    ridge = max(peaks) / report["copy_gb_per_s"]
    x = (min([*intensities, ridge]) / 10, max([*intensities, ridge]) * 2)
    axes = Axes(x, (min(rates, default=1) / 3, max(peaks) * 1.6))
    image = Image.new("RGB", SIZE, "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(15)
    _frame(draw, axes, font)
    _roofs(draw, axes, report, font)
    for point in found:
        _mark(draw, axes.at(point["intensity"], point["gflops"]), point)
    _legend(draw, found, font)
    m = report["machine"]
    what = (
        f"{m['cpu'] if m['gpu'] is None else m['gpu']}, {m['isa']}, {report['threads']} threads, commit {m['commit']}"
    )
    draw.text((SIZE[0] - RIGHT, TOP - 12), what, fill=INK, font=font, anchor="rs")
    image.save(out, optimize=True)


def table(rows: Iterable[dict[str, Any]]) -> str:
    """The rows with floor and figure side by side, as Markdown."""
    lines = [
        "| op, pass | case | dtype | merge | backend | MB | GFLOP | floor ms | ms | of floor "
        "| eager / ours | compiled / ours |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in rows:
        if "ms" not in r:
            continue
        size, done = (f"{r[key] / unit:.2f}" if r.get(key) else "" for key, unit in (("bytes", 1e6), ("flops", 1e9)))
        cells = [
            f"{r['op']} {r['pass']}", r["case"], r["dtype"], r["merge"] or "", r["backend"], size, done,
            f"{r['floor_ms']:.2f}", f"{r['ms']:.2f}", f"{r['floor_ms'] / r['ms']:.0%}",
            r["ratio"].get("eager", ""), r["ratio"].get("compiled", ""),
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def run(options: argparse.Namespace) -> int:
    """The plot and the table of all reports."""
    reports = [json.loads(path.read_text()) for path in options.results]
    rows = [row for report in reports for row in report["rows"]]
    plot(reports[0], points(rows), options.out)
    print(table(rows))
    return 0
