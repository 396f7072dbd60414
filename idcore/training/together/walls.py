"""What a picture's wall says: its colour, and which style it is drawn in. Everything here is our choice."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...metrics.tiny_style import features, fit
from ..styleforge.drawn import ALL, JUDGE_SEED, SIZE, UNSEEN_SEED, place

ROWS, COLUMNS = 40, 12  # of the two strips beside a head


class WallStyles:
    """Which of the drawn styles the sides of a picture have: a linear classifier of drawn places.

    Attributes:
        right: share of right answers on places that it did not train on.
    """

    def __init__(self, places: int = 200, unseen: int = 50) -> None:
        self.names = list(ALL)
        self.weight, self.bias = fit(*self._drawn(JUDGE_SEED, places))
        x, y = self._drawn(UNSEEN_SEED, unseen)
        self.right = float((self._answers(x) == y).double().mean())

    def _drawn(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        drawn = [place(first + i, style) for i in range(count) for style in self.names]
        return _features(drawn), torch.arange(len(self.names)).repeat(count)

    def _answers(self, x: Tensor) -> Tensor:
        return (x @ self.weight.T + self.bias).argmax(1)

    def __call__(self, pictures: Sequence[Image.Image]) -> list[str]:
        return [self.names[i] for i in self._answers(_features(pictures)).tolist()]


def wall_colour(picture: Image.Image) -> np.ndarray:
    """Mean colour [3], 0..255, of both strips."""
    return _strips(picture).reshape(-1, 3).astype(float).mean(0)


def _strips(picture: Image.Image) -> np.ndarray:
    a = np.asarray(picture.convert("RGB"))
    return np.concatenate([a[:ROWS, :COLUMNS], a[:ROWS, -COLUMNS:]], 1)


def _features(pictures: Sequence[Image.Image]) -> Tensor:
    small = [Image.fromarray(_strips(p)).resize((SIZE, SIZE), Image.Resampling.BOX) for p in pictures]
    return features(torch.from_numpy(np.stack([np.asarray(p) for p in small])).permute(0, 3, 1, 2).float() / 255)
