"""`stage_tokens` in Triton: forward and backward. Triton and the kernels are imported by the first call."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from .triton import unusable

NAME = "triton"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(device: str, dtype: torch.dtype) -> list[str]:
    """Reasons against running a call with embeddings of this dtype on this device type."""
    reasons = unusable(device)
    if dtype not in DTYPES:
        reasons.append(f"dtype={str(dtype).removeprefix('torch.')} (needs float32, bfloat16 or float16)")
    return reasons


def _launch():
    return importlib.import_module("idcore.kernels.launch_tokens")


def forward(embeddings: Tensor, tokens: Tensor, positions: Tensor, stage: Tensor | None) -> Tensor:
    """As `reference_tokens.forward`."""
    return _launch().forward(embeddings, tokens, positions, stage)


def backward(
    g: Tensor, tokens: Tensor, positions: Tensor, stage: Tensor | None, *, embeddings: bool = True
) -> tuple[Tensor | None, Tensor]:
    """As `reference_tokens.backward`; sums are float32."""
    return _launch().backward(g, tokens, positions, stage, embeddings=embeddings)
