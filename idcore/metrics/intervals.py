"""Confidence intervals by a seeded bootstrap, of means and of paired or unpaired changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL, ROUNDS = 0.95, 2000  # our choice
_AT_ONCE = 4_000_000  # numbers drawn at once, so that thousands of pictures stay in tens of megabytes


@dataclass(frozen=True)
class Interval:
    """A mean with the percentile interval of its bootstrap; `n` values. NaN bounds where n is below 2."""

    mean: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict:
        """For JSON: None for what is not a number."""
        low, high = (None if np.isnan(v) else v for v in (self.low, self.high))
        return {"mean": None if np.isnan(self.mean) else self.mean, "low": low, "high": high, "n": self.n}


def interval(values: Sequence[float], *, seed: int = 0, rounds: int = ROUNDS) -> Interval:
    """Mean of values [n] and its interval; pictures are drawn with replacement."""
    x = np.asarray(values, np.float64)
    if x.size < 2:
        return Interval(float(x.mean()) if x.size else float("nan"), float("nan"), float("nan"), int(x.size))
    low, high = _bounds(_means(x, np.random.default_rng(seed), rounds))
    return Interval(float(x.mean()), low, high, int(x.size))


def change(before: Sequence[float], after: Sequence[float], *, paired: bool, seed: int = 0) -> Interval:
    """Mean of `after` minus mean of `before` and its interval; with `paired` row i of both is one picture."""
    b, a = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if paired:
        return interval(a - b, seed=seed)
    difference = float(a.mean() - b.mean()) if a.size and b.size else float("nan")
    if min(a.size, b.size) < 2:
        return Interval(difference, float("nan"), float("nan"), int(min(a.size, b.size)))
    rng = np.random.default_rng(seed)
    low, high = _bounds(_means(a, rng, ROUNDS) - _means(b, rng, ROUNDS))
    return Interval(difference, low, high, int(min(a.size, b.size)))


def _means(x: np.ndarray, rng: np.random.Generator, rounds: int) -> np.ndarray:
    part = max(1, _AT_ONCE // x.size)
    drawn = (x[rng.integers(0, x.size, (min(part, rounds - k), x.size))].mean(1) for k in range(0, rounds, part))
    return np.concatenate(list(drawn))


def _bounds(means: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
