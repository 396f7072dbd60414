"""Regions of people in a picture: from a layout in words or numbers, or from boxes, to masks for `attach`.

A layout is a line of text, our own form:

    "left, right"              one area per person, in words: left, right, top, bottom, center, all, and their cuts
                               ("top-left"); areas may overlap
    "1 1"                      columns, one per person, by their widths
    "2: 1 1 / 1: 1"            rows from top to bottom, each with a height before ":" (1 if none)
    "1 (1) 1"                  a cell in parentheses belongs to nobody

Cells are counted row by row, left to right.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError

Box = tuple[float, float, float, float]

_WORDS: dict[str, Box] = {
    "all": (0.0, 0.0, 1.0, 1.0),
    "left": (0.0, 0.0, 0.5, 1.0),
    "right": (0.5, 0.0, 1.0, 1.0),
    "top": (0.0, 0.0, 1.0, 0.5),
    "bottom": (0.0, 0.5, 1.0, 1.0),
    "center": (0.25, 0.0, 0.75, 1.0),
}
_CELL = re.compile(r"\s*(?:\(\s*(\d+(?:\.\d+)?)\s*\)|(\d+(?:\.\d+)?)(?=[\s(]|$))")
_SIDE = 512  # of masks of layouts that no size was given for


def layout_boxes(layout: str, height: float = 1.0, width: float = 1.0) -> list[Box]:
    """Boxes x0, y0, x1, y1 of a layout, one per person.

    Args:
        layout: See the module's text.
        height, width: Of the picture, pixels; 1 and 1 give fractions.

    Raises:
        InputError: not a layout; the text names the part that is none.
    """
    if not isinstance(layout, str) or not layout.strip():
        raise InputError(f"layout: wanted a text such as 'left, right' or '1 1 / 1', got {layout!r}")
    boxes = _words(layout) if re.search("[A-Za-z]", layout) else _grid(layout)
    if not boxes:
        raise InputError(f"layout {layout!r} has no cell for a person; only cells without parentheses are")
    return [(x0 * width, y0 * height, x1 * width, y1 * height) for x0, y0, x1, y1 in boxes]


def _words(layout: str) -> list[Box]:
    boxes = []
    for area in layout.split(","):
        x0, y0, x1, y1 = _WORDS["all"]
        for word in area.strip().lower().split("-"):
            if word not in _WORDS:
                raise InputError(f"layout: {area.strip()!r} is no area; words are {', '.join(_WORDS)}, joined by '-'")
            a0, b0, a1, b1 = _WORDS[word]
            x0, y0, x1, y1 = max(x0, a0), max(y0, b0), min(x1, a1), min(y1, b1)
        if x1 <= x0 or y1 <= y0:
            raise InputError(f"layout: the parts of {area.strip()!r} have nothing in common")
        boxes.append((x0, y0, x1, y1))
    return boxes


def _grid(layout: str) -> list[Box]:
    rows = [_row(text, layout) for text in layout.split("/")]
    total, y, boxes = sum(height for height, _ in rows), 0.0, []
    for height, cells in rows:
        bottom, x, wide = y + height, 0.0, sum(w for w, _ in cells)
        for w, somebody in cells:
            if somebody:
                boxes.append((x / wide, y / total, (x + w) / wide, bottom / total))
            x += w
        y = bottom
    return boxes


def _row(text: str, layout: str) -> tuple[float, list[tuple[float, bool]]]:
    """Height, and (width, whether it is a person's) of each cell."""
    head, colon, rest = text.rpartition(":")
    try:
        height = float(head) if colon else 1.0
    except ValueError:
        raise InputError(f"layout {layout!r}: {head!r} before ':' is no height") from None
    cells, at = [], 0
    while rest[at:].strip():
        found = _CELL.match(rest, at)
        if found is None:
            raise InputError(f"layout {layout!r}: wanted widths such as '1 2' or '1 (1) 1', got {rest[at:].strip()!r}")
        cells.append((float(found[1] or found[2]), found[1] is None))
        at = found.end()
    if not cells or height <= 0 or any(w <= 0 for w, _ in cells):
        raise InputError(f"layout {layout!r}: every row needs a cell, every height and width must be above 0")
    return height, cells


def box_masks(boxes: Sequence[Sequence[float]], height: int, width: int, *, feather: float = 0.0) -> list[Tensor]:
    """Masks float32 [height, width], 0..1, one per box: the share of each pixel that the box covers.

    Args:
        boxes: x0, y0, x1, y1 in pixels of a picture of this size; what lies outside of the picture is cut off.
        height, width: Of the masks. Masks are stretched over the picture, so that they may be smaller than it.
        feather: Pixels over which a mask rises from 0 at the box's edge to 1 inside; edges of the picture stay hard.

    Raises:
        InputError: a box that is none, or that lies outside of the picture.
    """
    if height < 1 or width < 1 or feather < 0:
        raise InputError(f"box_masks: wanted a size of at least 1x1 and feather >= 0, got {width}x{height}, {feather}")
    return [_box_mask(box, j, height, width, feather) for j, box in enumerate(boxes)]


def _box_mask(box: Sequence[float], j: int, height: int, width: int, feather: float) -> Tensor:
    values = [float(v) for v in box] if len(box) == 4 else []
    if len(values) != 4 or not all(map(_finite, values)) or values[2] <= values[0] or values[3] <= values[1]:
        raise InputError(f"box {j}: wanted x0 < x1 and y0 < y1 as x0, y0, x1, y1, got {list(box)}")
    x0, y0, x1, y1 = values
    if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
        raise InputError(f"box {j} {list(box)} lies outside of the picture of {width}x{height}")
    across, down = _profile(x0, x1, width, feather), _profile(y0, y1, height, feather)
    return torch.outer(down, across).float()


def _finite(v: float) -> bool:
    return v - v == 0


def _profile(start: float, end: float, size: int, feather: float) -> Tensor:
    """Along one side: how much of each pixel lies in [start, end], times the ramp at edges inside of the picture."""
    at = torch.arange(size, dtype=torch.float64)
    covered = (torch.clamp(at + 1, max=end) - torch.clamp(at, min=start)).clamp(0, 1)
    if feather == 0:
        return covered
    left = (at + 0.5 - start) / feather if start > 0 else torch.ones(size, dtype=torch.float64)
    right = (end - at - 0.5) / feather if end < size else torch.ones(size, dtype=torch.float64)
    return covered * torch.minimum(left, right).clamp(0, 1)


def layout_masks(layout: str, height: int = _SIDE, width: int = _SIDE, *, feather: float = 0.0) -> list[Tensor]:
    """Masks of a layout for `attach(..., id_mask=...)`, float32 [height, width], one per person.

    Raises:
        InputError: as in :func:`layout_boxes` and :func:`box_masks`.
    """
    return box_masks(layout_boxes(layout, height, width), height, width, feather=feather)
