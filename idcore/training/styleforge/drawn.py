"""Procedural styles for trying StyleForge out: the renderer's, one that no base here has seen, and a judge of them.

The embedded bases know pencil, oil and cartoon by those words; as the look of a new word they are unseen. "duotone" no
base has seen at all. Everything here is our choice.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ...metrics.tiny_style import features, fit
from ..tiny.people import sample_person, sample_view
from ..tiny.prompts import BACKGROUNDS
from ..tiny.renderer import render
from ..tiny.styles import FILTERS

SIZE = 64
JUDGE_SEED, UNSEEN_SEED = 6_000_000, 6_500_000  # of people who are drawn for the judge, and for its test
_INKS = ((0.10, 0.10, 0.32), (0.85, 0.25, 0.45), (0.98, 0.90, 0.72))  # dark, middle, light


def duotone(x: Tensor) -> Tensor:
    """A print in three inks by shade, [N, 3, S, S] in 0..1."""
    grey = (x * x.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    light = ((grey - 0.58) * 14).sigmoid()
    middle = ((grey - 0.30) * 14).sigmoid() - light
    shares = (1 - light - middle, middle, light)
    return sum(s * x.new_tensor(ink).view(1, 3, 1, 1) for s, ink in zip(shares, _INKS, strict=True)).clamp(0, 1)


ALL = {**FILTERS, "duotone": duotone}


def person(seed: int, styles: Sequence[str], background: str | None = None) -> list[Image.Image]:
    """A drawn person in each style before a plain wall, 64 pixels. The style is put on the person over grey, so that
    the wall keeps its colour; `background` None: the seed's."""
    rng = np.random.default_rng(seed)
    drawn = torch.from_numpy(render(sample_person(rng), sample_view(rng), 96)).permute(2, 0, 1)[None].float() / 255
    names = list(BACKGROUNDS)
    wall = torch.tensor(BACKGROUNDS[background or names[int(rng.integers(len(names)))]]).view(1, 3, 1, 1) / 255
    cover = drawn[:, 3:]
    parts = torch.cat([drawn[:, :3] * cover + 0.5 * (1 - cover), cover], 1)
    parts = F.interpolate(parts, size=(SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)
    cover = parts[:, 3:]
    return [_picture(ALL[style](parts[:, :3]) * cover + wall * (1 - cover)) for style in styles]


def place(seed: int, style: str) -> Image.Image:
    """A wall of some colour with soft light and stripes, in a style, 64 pixels: nobody is there."""
    rng = np.random.default_rng(seed)
    g = torch.Generator().manual_seed(seed)
    colour = torch.from_numpy(rng.uniform(0.15, 0.9, (1, 3, 1, 1)).astype(np.float32))
    light = F.interpolate(torch.randn(1, 1, 3, 3, generator=g), size=(SIZE, SIZE), mode="bicubic")
    along = torch.linspace(0, float(rng.uniform(6, 30)), SIZE).sin()
    stripes = along.view(1, 1, 1, SIZE) if rng.random() < 0.5 else along.view(1, 1, SIZE, 1)
    return _picture(ALL[style]((colour * (1 + 0.2 * light + 0.12 * stripes)).clamp(0, 1)))


def _picture(x: Tensor) -> Image.Image:
    return Image.fromarray((x[0].permute(1, 2, 0).clamp(0, 1) * 255 + 0.5).to(torch.uint8).numpy())


class Styles:
    """Which of `ALL` a picture has: a linear classifier of `metrics.tiny_style`'s features.

    Attributes:
        right: share of right answers on drawings of people that it did not train on.
        spread: of each feature between drawings in one style.
    """

    def __init__(self, people: int = 250, unseen: int = 60) -> None:
        self.names, self.unseen = list(ALL), unseen
        x, y = self._drawn(JUDGE_SEED, people)
        self.weight, self.bias = fit(x, y)
        within = torch.stack([x[y == k].var(0) for k in range(len(self.names))])
        self.spread = within.mean(0).sqrt().clamp_min(1e-6)
        x, y = self._drawn(UNSEEN_SEED, unseen)
        self.right = float(((x @ self.weight.T + self.bias).argmax(1) == y).double().mean())

    def _drawn(self, first: int, people: int) -> tuple[Tensor, Tensor]:
        pictures = [p for i in range(people) for p in person(first + i, self.names)]
        return _features(pictures), torch.arange(len(self.names)).repeat(people)

    def __call__(self, pictures: Sequence[Image.Image]) -> list[str]:
        return [self.names[i] for i in (_features(pictures) @ self.weight.T + self.bias).argmax(1).tolist()]

    def way(self, before: Sequence[Image.Image], now: Sequence[Image.Image], style: str, walls: Sequence[str]) -> float:
        """How much of the way from photos to a style pictures have gone since `before`; 0: none, 1: all of it.

        (m(now) - m(before)) . v / v . v with mean features m over `spread`, and v = m(style) - m(photo) of drawings of
        unseen people before `walls`: what a model paints otherwise than drawings are (softer) counts neither way.
        """
        drawn = [person(UNSEEN_SEED + i, ["photo", style], walls[i % len(walls)]) for i in range(self.unseen)]
        photo, wanted, first, last = (
            _features(p).mean(0) / self.spread for p in (*zip(*drawn, strict=True), before, now)
        )
        return float((last - first) @ (wanted - photo) / (wanted - photo).square().sum())


def _features(pictures: Sequence[Image.Image]) -> Tensor:
    x = torch.from_numpy(np.stack([np.asarray(p.convert("RGB")) for p in pictures]))
    return features(x.permute(0, 3, 1, 2).float() / 255)
