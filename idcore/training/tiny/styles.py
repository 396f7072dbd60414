"""The six picture styles as batched, differentiable-free filters on RGB in 0..1, [N, 3, S, S]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _grey(x: Tensor) -> Tensor:
    return (x * x.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)


def _blur(x: Tensor, radius: int) -> Tensor:
    for _ in range(2):  # two box filters, close to a Gaussian
        x = F.avg_pool2d(F.pad(x, (radius,) * 4, mode="replicate"), 2 * radius + 1, 1)
    return x


def _kuwahara(x: Tensor, radius: int = 1) -> Tensor:
    """Edge-keeping smoothing: of four neighbouring windows the mean of the calmest one."""
    k = 2 * radius + 1
    pad = F.pad(x, (2 * radius,) * 4, mode="replicate")
    mean = F.avg_pool2d(pad, k, 1)
    var = (F.avg_pool2d(pad * pad, k, 1) - mean * mean).sum(1, keepdim=True)
    s, e = x.shape[-1], 2 * radius
    corners = [(i, j) for i in (0, e) for j in (0, e)]
    means = torch.stack([mean[..., i : i + s, j : j + s] for i, j in corners])
    pick = torch.stack([var[..., i : i + s, j : j + s] for i, j in corners]).argmin(0, keepdim=True)
    return means.gather(0, pick.expand(1, *x.shape))[0]


def pencil(x: Tensor) -> Tensor:
    g = _grey(x)
    dodge = (g / (1.03 - _blur(1 - g, 3)).clamp_min(0.05)).clamp(0, 1)
    return (0.62 * dodge + 0.38 * g).expand(-1, 3, -1, -1)


def oil(x: Tensor) -> Tensor:
    y = 0.6 * _kuwahara(x) + 0.4 * x
    g = _grey(y)
    return (g + (y - g) * 1.45 + 0.02).clamp(0, 1)


def cartoon(x: Tensor) -> Tensor:
    y = 0.5 * _kuwahara(x) + 0.5 * x
    g = _grey(y)
    levels = 0.7 * torch.round(g * 7) / 7 + 0.3 * g
    flat = (y * ((levels + 0.08) / (g + 0.08))).clamp(0, 1)
    flat = (_grey(flat) + (flat - _grey(flat)) * 1.35).clamp(0, 1)
    d = _blur(g, 2) - g
    return flat * (1 - 0.6 * ((d - 0.04) * 10).clamp(0, 1))


def sepia(x: Tensor) -> Tensor:
    return _grey(x) * x.new_tensor([1.0, 0.86, 0.66]).view(1, 3, 1, 1)


def night(x: Tensor) -> Tensor:
    return x.clamp_min(0) ** 1.2 * x.new_tensor([0.5, 0.64, 1.0]).view(1, 3, 1, 1)


FILTERS = {"photo": lambda x: x, "pencil": pencil, "oil": oil, "cartoon": cartoon, "sepia": sepia, "night": night}


def stylise(x: Tensor, names: list[str]) -> Tensor:
    """Apply to each picture [N, 3, S, S] the filter of its name (keys of `FILTERS`)."""
    out = x.clone()
    for name in set(names) - {"photo"}:
        rows = torch.tensor([i for i, n in enumerate(names) if n == name])
        out[rows] = FILTERS[name](x[rows])
    return out
