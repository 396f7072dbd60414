"""Batches for the embedded model: reference, prompt and target made from a pool, with heavy augmentation.

What changes a person's looks (geometry, colour, light, texture) is applied alike to the reference and to
the target, so that the looks can only be got by reading the reference. All probabilities are our choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .pool import Pool
from .prompts import BACKGROUNDS, COLOURS, STYLES, labels_to_names, write_prompt
from .styles import stylise
from .textures import texture_bank

STYLE_SHARE = (0.4, 0.14, 0.12, 0.12, 0.1, 0.12)


@dataclass
class Batch:
    """ref [B, 3, 96, 96] and target [B, 3, 64, 64] in 0..1; face [B, 1, 64, 64]: where the person is."""

    ref: Tensor
    target: Tensor
    prompts: list[str]
    face: Tensor


def _field(g: torch.Generator, n: int, channels: int, cells: int, size: int) -> Tensor:
    x = torch.randn(n, channels, cells, cells, generator=g)
    if size > 32:  # bicubic is dear: smooth at a quarter of the size, then linear
        x = F.interpolate(x, size=(size // 4, size // 4), mode="bicubic", align_corners=False)
        return F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
    return F.interpolate(x, size=(size, size), mode="bicubic", align_corners=False)


def _chance(g: torch.Generator, n: int, p: float) -> Tensor:
    return (torch.rand(n, 1, 1, 1, generator=g) < p).float()


def _uniform(g: torch.Generator, n: int, low: float, high: float) -> Tensor:
    return torch.rand(n, 1, 1, 1, generator=g) * (high - low) + low


class TinyData:
    """`data.batch(step, size)` is a pure function of (seed, step, pool): resuming needs no state."""

    def __init__(self, pool_folder: Path, seed: int = 0, textures: int = 1024) -> None:
        self.pool = Pool(pool_folder)
        self.seed = seed
        self.size = self.pool.size
        cache = Path(pool_folder) / f"textures_{textures}_{self.size}.npy"
        if not cache.exists():
            np.save(cache, texture_bank(textures, self.size))
        self.textures = np.load(cache, mmap_mode="r")

    def batch(self, step: int, size: int) -> Batch:
        rng = np.random.default_rng([self.seed, step])
        g = torch.Generator().manual_seed(int(rng.integers(1 << 62)))
        pictures, labels = self.pool.get(rng.integers(0, len(self.pool), size))
        plans = [self._plan(rng, labels[k]) for k in range(size)]
        rows = np.arange(size)
        ref = pictures[rows, [p["from"] for p in plans]]
        tgt = pictures[rows, [p["to"] for p in plans]]
        same = torch.tensor([p["from"] == p["to"] for p in plans]).float().view(-1, 1, 1, 1)
        pair = torch.from_numpy(np.concatenate([ref, tgt], -1)).permute(0, 3, 1, 2).float() / 255
        pair = self._geometry(g, pair)
        a, alpha_a, b, alpha_b = pair[:, :3], pair[:, 3:4], pair[:, 4:7], pair[:, 7:]
        a, b = self._looks(rng, g, a, b, same)
        return self._compose(rng, g, plans, (a, alpha_a), (b, alpha_b))

    def _plan(self, rng: np.random.Generator, labels: np.ndarray) -> dict:
        """Which view is reference and which target, and what the prompt says."""
        first = int(rng.integers(2))
        change = rng.random() < 0.38
        second = 1 - first if change else first
        expression, pose = labels_to_names(*labels[second])
        if change:
            differ = labels[0] != labels[1]
            said = (
                expression if differ[0] or rng.random() < 0.7 else None,
                pose if differ[1] or rng.random() < 0.7 else None,
            )
        else:
            said = (expression if rng.random() < 0.3 else None, pose if rng.random() < 0.3 else None)
        style = STYLES[rng.choice(len(STYLES), p=STYLE_SHARE)]
        background = COLOURS[int(rng.integers(len(COLOURS)))] if rng.random() < 0.85 else None
        prompt = write_prompt(rng, style, background, *said)
        return {"from": first, "to": second, "style": style, "background": background, "prompt": prompt}

    def _geometry(self, g: torch.Generator, x: Tensor) -> Tensor:
        """One smooth displacement and one small similarity per person, for reference and target alike."""
        n, s = len(x), self.size
        angle = torch.randn(n, generator=g) * 0.06
        zoom = 1 + torch.randn(n, generator=g) * 0.05
        shift = torch.randn(n, 2, generator=g) * 0.03
        cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
        theta = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).view(n, 2, 3)
        grid = F.affine_grid(theta, (n, 1, s, s), align_corners=False)
        warp = _field(g, n, 2, 5, s) * _uniform(g, n, 0, 0.07) + _field(g, n, 2, 10, s) * _uniform(g, n, 0, 0.018)
        return F.grid_sample(x, grid + warp.permute(0, 2, 3, 1), padding_mode="border", align_corners=False)

    def _texture(self, rng: np.random.Generator, n: int) -> Tensor:
        pick = self.textures[np.sort(rng.integers(0, len(self.textures), n))]
        pick = pick[rng.permutation(n)]
        flip = rng.integers(0, 2, n).astype(bool)
        pick[flip] = pick[flip, :, ::-1]
        return torch.from_numpy(pick).permute(0, 3, 1, 2).float() / 255

    def _looks(self, rng, g: torch.Generator, a: Tensor, b: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
        """Colour, light and texture of the person; texture only where both views have one geometry."""
        n = len(a)
        mix = torch.eye(3) + torch.randn(n, 3, 3, generator=g) * 0.16 * _chance(g, n, 0.6).view(n, 1, 1)
        mix = mix / mix.sum(2, keepdim=True).clamp_min(0.5)
        gain, lift = _uniform(g, n, 0.6, 1.35), _uniform(g, n, -0.12, 0.12)
        gamma = _uniform(g, n, 0.65, 1.5)
        light = 1 + _field(g, n, 1, 3, self.size) * _uniform(g, n, 0, 0.3)
        tint = 1 + _field(g, n, 3, 3, self.size) * _uniform(g, n, 0, 0.12)
        tex = self._texture(rng, n)
        m = (
            same
            * _chance(g, n, 0.4)
            * _uniform(g, n, 0.05, 0.6)
            * (_field(g, n, 1, 4, self.size) * 0.8 + 0.5).clamp(0, 1)
        )

        def one(x: Tensor) -> Tensor:
            x = torch.einsum("nij,njhw->nihw", mix, x).clamp(0.001, 1) ** gamma
            x = x * (1 - m) + tex * m
            return (((x - 0.5) * gain + 0.5 + lift) * light * tint).clamp(0, 1)

        return one(a), one(b)

    def _compose(self, rng, g: torch.Generator, plans: list[dict], a: tuple, b: tuple) -> Batch:
        n = len(plans)
        back = self._texture(rng, n)
        flat = _chance(g, n, 0.3)
        back = (
            flat * torch.rand(n, 3, 1, 1, generator=g) * (1 + 0.1 * _field(g, n, 1, 2, self.size)) + (1 - flat) * back
        )
        ref = a[0] * a[1] + back * (1 - a[1])
        tgt = b[0] * b[1] + back * (1 - b[1])
        pure = _chance(g, n, 0.08) * torch.tensor(
            [p["from"] == p["to"] and not p["background"] for p in plans]
        ).float().view(-1, 1, 1, 1)
        tex = self._texture(rng, n)
        ref, tgt = ref * (1 - pure) + tex * pure, tgt * (1 - pure) + tex * pure
        ref, tgt = self._camera(g, ref.clamp(0, 1), tgt.clamp(0, 1))
        return self._finish(rng, g, plans, ref, tgt, b[1])

    def _camera(self, g: torch.Generator, ref: Tensor, tgt: Tensor) -> tuple[Tensor, Tensor]:
        """Blur of both; noise of the reference alone."""
        n = len(ref)
        soft = _chance(g, n, 0.2) * _uniform(g, n, 0, 1)
        box = lambda x: F.avg_pool2d(F.pad(x, (1,) * 4, mode="replicate"), 3, 1)  # noqa: E731
        ref, tgt = ref + soft * (box(ref) - ref), tgt + soft * (box(tgt) - tgt)
        sharp = _chance(g, n, 0.25) * _uniform(g, n, 0, 1.2)
        ref, tgt = ref + sharp * (ref - box(ref)), tgt + sharp * (tgt - box(tgt))
        noise = _chance(g, n, 0.4) * _uniform(g, n, 0, 0.04)
        return (ref + noise * torch.randn(ref.shape, generator=g)).clamp(0, 1), tgt.clamp(0, 1)

    def _finish(self, rng, g: torch.Generator, plans: list[dict], ref: Tensor, tgt: Tensor, alpha: Tensor) -> Batch:
        """Target to 64 pixels, style on the person (or on all), then the prompted background."""
        n = len(plans)
        small = F.interpolate(tgt, size=(64, 64), mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)
        cover = F.interpolate(alpha, size=(64, 64), mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)
        small = small * (
            1 + 0.10 * _chance(g, n, 0.5) * _field(g, n, 1, 2, 64)
        )  # light of its own: what the seed decides
        small = stylise(small.clamp(0, 1), [p["style"] for p in plans])
        named = torch.tensor([p["background"] is not None for p in plans]).float().view(-1, 1, 1, 1)
        colour = torch.tensor([BACKGROUNDS[p["background"] or "gray"] for p in plans]).float().view(n, 3, 1, 1) / 255
        wall = colour * (1 + 0.05 * _field(g, n, 1, 2, 64))
        m = named * (1 - cover)
        target = (small * (1 - m) + wall * m).clamp(0, 1)
        return Batch(ref, target, [p["prompt"] for p in plans], cover)
