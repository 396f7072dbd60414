"""Few-step sampling on the rectified-flow path with a model that predicts the clean picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import InputError

MAX_STEPS = 100


def noise_levels(steps: int) -> list[float]:
    """steps + 1 levels from 1 (noise) to 0 (clean), evenly spaced: four steps stand at 1, 3/4, 1/2, 1/4."""
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MAX_STEPS:
        raise InputError(f"num_inference_steps is a whole number from 1 to {MAX_STEPS}, got {steps!r}")
    return [1 - k / steps for k in range(steps + 1)]


def euler_step(x: Tensor, clean: Tensor, t: float, s: float) -> Tensor:
    """One Euler step from level t to level s.

    On the path x_t = (1 - t) x_0 + t n (rectified flow, Liu et al., arXiv 2209.03003, eq. 1) the velocity is
    n - x_0 = (x_t - x_0) / t, so that x_s = x_t + (s - t) (x_t - x_0) / t = x_0 + (s / t) (x_t - x_0).
    """
    return clean + (s / t) * (x - clean)


def sample(predict: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: int) -> Tensor:
    """Noise [B, C, H, W] to pictures; predict(x, t [B]) gives the clean picture that the model sees in x."""
    x = noise
    levels = noise_levels(steps)
    for t, s in zip(levels[:-1], levels[1:]):
        x = euler_step(x, predict(x, torch.full((len(x),), t)), t, s)
    return x


def seeded_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise [len(seeds), *shape], one generator per picture, so that a batch changes nothing."""
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(int(s))) for s in seeds]
    return torch.stack(rows)
