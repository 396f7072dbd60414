"""Whether two pictures have one layout, whatever their colours and style: coarse shades, compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

GRID = 8  # shades a side; our choice


def coarse(pictures: Sequence[Image.Image]) -> np.ndarray:
    """Grey levels on a grid of 8x8 areas, less their mean, of length 1. float32 [N, 64]"""
    from PIL import Image

    shades = [np.asarray(p.convert("L").resize((GRID, GRID), Image.Resampling.BOX), np.float32) for p in pictures]
    flat = np.stack(shades).reshape(len(pictures), -1)
    flat = flat - flat.mean(1, keepdims=True)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-12)


def same_layout(a: Image.Image, b: Image.Image) -> float:
    """Correlation of two pictures' coarse shades, -1 to 1; 0 where one of them has a single shade."""
    first, second = coarse([a, b])
    return float(first @ second)
