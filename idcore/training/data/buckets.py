"""Aspect buckets: which sizes pictures are trained at, and the crop that brings a picture there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=64)
def bucket_sizes(resolution: int, multiple: int, max_aspect: float) -> tuple[tuple[int, int], ...]:
    """Sizes (width, height) in multiples of `multiple` with at most resolution^2 pixels.

    For each width the largest height that the pixels allow, and the other way round, as in SDXL's list (Podell et al.
    2023, arXiv 2307.01952, appendix I; which sizes exactly is our choice).
    """
    budget, found = resolution * resolution, set()
    for a in range(multiple, int(resolution * math.sqrt(max_aspect)) + multiple, multiple):
        b = budget // a // multiple * multiple
        if b and max(a, b) <= max_aspect * min(a, b) + 1e-9:
            found |= {(a, b), (b, a)}
    side = resolution // multiple * multiple
    return tuple(sorted(found | {(side, side)}))


def bucket_of(width: int, height: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The bucket nearest in shape; of several the one with most pixels."""
    return min(sizes, key=lambda s: (round(abs(math.log(s[0] * height / (s[1] * width))), 9), -s[0] * s[1], s))


@dataclass(frozen=True)
class Crop:
    """How a picture fills a bucket: scaled to width x height, then cut at (left, top), then mirrored or not."""

    width: int
    height: int
    left: int
    top: int
    bucket: tuple[int, int]
    flip: bool = False

    def points(self, points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Points [N, 2] of the picture of this size (width, height) in the crop; pixel centres are whole numbers."""
        scale = np.array([self.width / size[0], self.height / size[1]])
        moved = (np.asarray(points, np.float64) + 0.5) * scale - 0.5 - (self.left, self.top)
        if self.flip:
            moved[:, 0] = self.bucket[0] - 1 - moved[:, 0]
        return moved

    def landmarks(self, points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """The five points [5, 2] in the crop; mirrored, left and right change their names."""
        moved = self.points(points, size)
        return moved[[1, 0, 2, 4, 3]] if self.flip else moved

    def box(self, box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """A box [4] in the crop; may reach beyond it."""
        corners = self.points(np.asarray(box, np.float64).reshape(2, 2), size)
        return np.concatenate([corners.min(0), corners.max(0)])


def crop_for(
    size: tuple[int, int],
    bucket: tuple[int, int],
    box: Sequence[float],
    where: tuple[float, float] = (0.5, 0.5),
    *,
    mode: str = "face",
    flip: bool = False,
) -> Crop:
    """The crop of a picture of this size (width, height).

    Args:
        box: the face's box in the picture.
        where: place within what is possible, 0 (left, top) to 1, for "random" and "face".
        mode: "centre"; "random": anywhere; "face": anywhere with the face and a quarter of its size around it inside,
            or its middle in the middle where that does not fit.
        flip: mirror the crop.
    """
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    full = [max(bucket[i], round(size[i] * scale)) for i in range(2)]
    start = []
    for i in range(2):
        slack = full[i] - bucket[i]
        low, high = 0.0, float(slack)
        if mode == "centre":
            low = high = slack / 2
        elif mode == "face":
            first, last = ((box[i + 2 * k] + 0.5) * full[i] / size[i] - 0.5 for k in range(2))
            margin = (last - first) / 4
            near, far = last + margin - bucket[i], first - margin
            if near > far:  # too large for the bucket
                near = far = (first + last - bucket[i]) / 2
            low, high = (min(max(v, 0.0), float(slack)) for v in (near, far))
        start.append(min(slack, int(low + (high - low) * where[i] + 0.5)))
    return Crop(full[0], full[1], start[0], start[1], tuple(bucket), flip)
