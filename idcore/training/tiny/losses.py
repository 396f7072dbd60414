"""Losses of the embedded model: picture, edges, the reference's look, and (late) the recogniser's features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...systems.tiny import CHIP, TIGHT_PADDING, WIDE_PADDING


def face_weight(size: int) -> Tensor:
    """[1, 1, size, size]: 1 at the border, 2.5 in the middle of the face; our choice."""
    unit = (torch.arange(size) + 0.5) / size * (1 + 2 * WIDE_PADDING) - WIDE_PADDING
    d = ((unit[None] - 0.49) / 0.45) ** 2 + ((unit[:, None] - 0.5) / 0.5) ** 2
    return (1 + 1.5 * torch.exp(-d))[None, None]


def picture_loss(pred: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Weighted squared error + 0.25 absolute error + 0.5 absolute error of the differences of neighbours."""
    d = (pred - target).float()
    out = (weight * (d * d + 0.25 * d.abs())).mean()
    dx, dy = d[..., :, 1:] - d[..., :, :-1], d[..., 1:, :] - d[..., :-1, :]
    return out + 0.25 * ((weight[..., :, 1:] * dx.abs()).mean() + (weight[..., 1:, :] * dy.abs()).mean())


def tight_chips(pictures: Tensor, shift: Tensor | None = None) -> Tensor:
    """The recogniser's chips [N, 3, 150, 150] of canonical pictures [N, 3, S, S] (the wide framing), differentiable.

    shift: [N, 2] in face units, to imitate an imperfect alignment.
    """
    n = len(pictures)
    half = (1 + 2 * TIGHT_PADDING) / (1 + 2 * WIDE_PADDING)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = half
    if shift is not None:
        theta[:, :, 2] = shift * 2 / (1 + 2 * WIDE_PADDING)
    grid = F.affine_grid(theta, (n, 3, CHIP, CHIP), align_corners=False)
    return F.grid_sample(pictures, grid, mode="bicubic", padding_mode="border", align_corners=False).clamp(0, 1)


class RecogniserLoss(nn.Module):
    """Distance of two pictures in the frozen recogniser: features (perceptual) and embedding (identity).

    The identity loss is PuLID's (arXiv 2404.16022, eq. 8) with the squared Euclidean distance that this
    recogniser was trained for in place of the cosine.
    """

    def __init__(self, recogniser: nn.Module) -> None:
        super().__init__()
        self.recogniser = recogniser

    def features(self, pictures: Tensor, shift: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        out = self.recogniser(tight_chips(pictures, shift))
        return list(out.feats), out.embedding

    def perceptual(self, a: list[Tensor], b: list[Tensor]) -> Tensor:
        """Mean over the first four stages of |a - b| over the mean of b."""
        return sum((x.float() - y.float()).abs().mean() / y.float().mean() for x, y in zip(a[:4], b[:4])) / 4
