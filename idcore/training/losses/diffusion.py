"""L_diff: how far the prediction is from its target (PuLID, arXiv 2404.16022, equation 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import InputError

NORMS = ("mse", "norm")


def diffusion_loss(
    prediction: Tensor,
    target: Tensor,
    *,
    norm: str = "mse",
    snr: Tensor | None = None,
    min_snr: float | None = None,
    parametrisation: str = "epsilon",
    where: Tensor | None = None,
) -> Tensor:
    """The mean over the samples of each one's weighted distance, a float32 number (float64 for float64).

    Args:
        prediction, target: [B, ...].
        norm: "mse", the mean square, as diffusion models are trained (our choice); or "norm", the Euclidean norm that
            the paper writes, not squared.
        snr: signal-to-noise ratio [B] of the samples' noise levels, needed with `min_snr`.
        min_snr: gamma of min-SNR weighting (Hang et al., arXiv 2303.09556; 5 there), for "mse" only; None: no weights.
        where: weights [B, 1, h, w] of the places, mean 1 in each sample. None: all alike.
        parametrisation: what is predicted: "epsilon", "v_prediction" or "sample" (the clean picture).

    Raises:
        InputError: unknown names, or options that do not go together.
    """
    if norm not in NORMS:
        raise InputError(f"L_diff: norm must be one of {', '.join(NORMS)}, got {norm!r}")
    if prediction.shape != target.shape:
        raise InputError(f"L_diff: prediction is {list(prediction.shape)}, its target {list(target.shape)}")
    wide = torch.promote_types(prediction.dtype, torch.float32)
    square = (prediction.to(wide) - target.to(wide)) ** 2
    square = (square if where is None else square * where.to(square)).flatten(1)
    if norm == "norm":
        if min_snr is not None:
            raise InputError('L_diff: min_snr weighs mean squares; take norm="mse" with it, or leave it out')
        return safe_sqrt(square.sum(1)).mean()
    each = square.mean(1)
    if min_snr is not None:
        each = each * min_snr_weights(snr, min_snr, parametrisation).to(each)
    return each.mean()


def min_snr_weights(snr: Tensor | None, gamma: float, parametrisation: str) -> Tensor:
    """min(SNR, gamma) as a weight of the clean picture's error, turned to what is predicted (arXiv 2303.09556, 3.4)."""
    if snr is None or not gamma > 0:
        raise InputError(f"L_diff: min_snr needs snr= and a positive gamma, got gamma {gamma!r}")
    least = snr.clamp(max=gamma)
    if parametrisation == "sample":
        return least
    if parametrisation == "epsilon":
        return torch.where(snr > gamma, gamma / snr.clamp_min(1e-20), torch.ones_like(snr))
    if parametrisation == "v_prediction":
        return least / (snr + 1)
    raise InputError(f"L_diff: parametrisation must be epsilon, v_prediction or sample, got {parametrisation!r}")


def safe_sqrt(x: Tensor) -> Tensor:
    """The square root, with gradient 0 where x is 0."""
    zero = x <= 0
    return torch.where(zero, torch.zeros_like(x), torch.where(zero, torch.ones_like(x), x).sqrt())
