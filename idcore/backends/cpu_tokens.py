"""`stage_tokens` on the CPU, in C++: the forward copies rows, once each; the backward adds them up in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from .cpu import _load
from .native import DTYPES

NAME = "cpu"


def why_not(device: str, dtype: torch.dtype) -> list[str]:
    """Reasons against running a call with embeddings of this dtype on this device type."""
    reasons = [] if device == "cpu" else [f"device={device} (runs on cpu)"]
    if dtype not in DTYPES:
        reasons.append(f"dtype={str(dtype).removeprefix('torch.')} (needs float32, bfloat16 or float16)")
    if _load()[0] is None:
        reasons.append(_load()[1])
    return reasons


def _strides(t: Tensor) -> tuple[int, ...]:
    """In bytes, without the last dimension's."""
    return tuple(s * t.element_size() for s in t.stride()[:-1])


def _indices(positions: Tensor, stage: Tensor | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Addresses and strides, 0 where all samples read the same."""
    per_sample = positions.stride(0) if positions.shape[0] > 1 else 0
    picked = (0, 0) if stage is None else (stage.data_ptr(), stage.stride(0) if stage.shape[0] > 1 else 0)
    return (positions.data_ptr(), per_sample, positions.stride(1)), picked


def forward(embeddings: Tensor, tokens: Tensor, positions: Tensor, stage: Tensor | None) -> Tensor:
    """As `reference_tokens.forward`."""
    b, length, e = embeddings.shape
    s, bt, count, _ = tokens.shape
    rows = embeddings if embeddings.stride(2) == 1 else embeddings.contiguous()
    bank = tokens.to(embeddings.dtype)
    bank = bank if bank.stride(3) == 1 else bank.contiguous()
    out = embeddings.new_empty(b, length, e) if stage is not None else embeddings.new_empty(s, b, length, e)
    _load()[0].stage_tokens_cpu(
        (s, b, bt, length, count, e * embeddings.element_size()),
        (rows.data_ptr(), *_strides(rows)), (bank.data_ptr(), *_strides(bank)),
        *_indices(positions, stage), out.data_ptr(),
    )  # fmt: skip
    return out


def backward(
    g: Tensor, tokens: Tensor, positions: Tensor, stage: Tensor | None, *, embeddings: bool = True
) -> tuple[Tensor | None, Tensor]:
    """As `reference_tokens.backward`; sums are float32, samples in their order."""
    g = g.contiguous()
    b, length, e = g.shape[-3:]
    s, bt, count, _ = tokens.shape
    wanted = g.new_empty(b, length, e) if embeddings else None
    bank = torch.empty(tokens.shape, dtype=torch.float32)
    _load()[0].stage_tokens_cpu_bwd(
        (DTYPES[g.dtype], s, b, bt, length, count, e), *_indices(positions, stage),
        g.data_ptr(), 0 if wanted is None else wanted.data_ptr(), bank.data_ptr(),
    )  # fmt: skip
    return wanted, bank.to(tokens.dtype)
