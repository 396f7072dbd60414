"""PuLID's question: how far does an identity change the picture that the prompt alone gives, seed by seed?

CLIP-I of the paper (section 4.2) is `cosine` of CLIP image embeddings; the other measures need no CLIP.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..errors import InputError

WINDOW = 7  # SSIM, Wang et al. 2004, with the uniform window of its common implementations


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines [N] of rows of [N, D] and [N, D] (or [1, D]), float64; 0 for a row of zeros."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return (a * b).sum(-1) / np.where(lengths > 0, lengths, 1)


def pixel_distance(with_id: Image.Image, without: Image.Image) -> float:
    """Root mean square difference of RGB in 0..1: 0 for equal pictures, 1 for black against white."""
    a, b = _same_size(with_id, without)
    return float((a - b).square().mean().sqrt())


def structure_similarity(with_id: Image.Image, without: Image.Image) -> float:
    """Mean SSIM of the luma in 0..1 (K1 0.01, K2 0.03, 7x7 uniform window, sample covariance); 1 for equal pictures."""
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64).view(3, 1, 1)
    a, b = ((p * weights).sum(0)[None, None] for p in _same_size(with_id, without))
    if min(a.shape[-2:]) < WINDOW:
        raise InputError(f"SSIM: pictures must be at least {WINDOW} pixels wide and high, got {list(a.shape[-2:])}")

    def mean(x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(x, WINDOW, 1)

    n = WINDOW**2
    sample = n / (n - 1)
    ma, mb = mean(a), mean(b)
    va, vb, cov = (sample * (mean(x) - m) for x, m in ((a * a, ma * ma), (b * b, mb * mb), (a * b, ma * mb)))
    c1, c2 = 0.01**2, 0.03**2
    ssim = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma * ma + mb * mb + c1) * (va + vb + c2))
    return float(ssim.mean())


def _same_size(a: Image.Image, b: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
    if a.size != b.size:
        raise InputError(
            f"a pair of pictures with and without identity must have one size, got {a.size[0]}x{a.size[1]} and "
            f"{b.size[0]}x{b.size[1]}; make both with one width, height and seed"
        )
    x, y = (torch.from_numpy(np.asarray(p.convert("RGB"), np.float64) / 255).permute(2, 0, 1) for p in (a, b))
    return x, y
