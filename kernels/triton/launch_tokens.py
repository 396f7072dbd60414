"""Launches the kernels of `stage_tokens`."""

from __future__ import annotations

import torch
from torch import Tensor

import triton

from . import tokens as kernels
from .launch import INTERPRETED, start

BLOCK = 2048  # elements of a program (our choice; not yet tuned on a GPU)
WARPS = dict(num_warps=4)


def _tile(length: int, width: int) -> tuple[int, int]:
    """Rows and channels of a program."""
    channels = triton.next_power_of_2(width)
    if INTERPRETED:
        return triton.next_power_of_2(length), channels
    channels = min(channels, 512)
    return BLOCK // channels, channels


def _positions(positions: Tensor) -> dict:
    per_sample = positions.stride(0) if positions.shape[0] > 1 else 0
    return dict(POS=positions, sp=(per_sample, positions.stride(1)), T=positions.shape[1])


def _stage(stage: Tensor | None, count: int) -> dict:
    if stage is None:
        return dict(STAGE=None, sstage=None)
    return dict(STAGE=stage, sstage=(stage.stride(0) if stage.shape[0] > 1 else 0, count))


def forward(embeddings: Tensor, tokens: Tensor, positions: Tensor, stage: Tensor | None) -> Tensor:
    """[S, B, L, E], or [B, L, E] where a stage is picked; dtype of `embeddings`."""
    b, length, width = embeddings.shape
    stages = () if stage is not None else (tokens.shape[0],)
    out = torch.empty(*stages, b, length, width, dtype=embeddings.dtype, device=embeddings.device)
    rows, channels = _tile(length, width)
    grid = (triton.cdiv(length, rows), triton.cdiv(width, channels), out.shape[0] * b if stages else b)
    start(
        kernels.tokens_kernel, grid, WARPS, EMB=embeddings, TOK=tokens, OUT=out, se=embeddings.stride(),
        st=tokens.stride(), B=b, DIV=b // tokens.shape[1], L=length, E=width, BL=rows, BE=channels,
        **_positions(positions), **_stage(stage, tokens.shape[0]),
    )  # fmt: skip
    return out


def backward(
    g: Tensor, tokens: Tensor, positions: Tensor, stage: Tensor | None, *, embeddings: bool = True
) -> tuple[Tensor | None, Tensor]:
    """Gradients of the embeddings [B, L, E] (None if not asked for) and of the tokens, in the dtype of `tokens`.

    Args:
        g: gradient of the result of `forward`.
    """
    count, bt, _, width = tokens.shape
    b, length = g.shape[-3:-1]
    strides = (0, *g.stride()) if stage is not None else g.stride()
    dt = torch.empty(tokens.shape, dtype=tokens.dtype, device=g.device)
    channels = triton.next_power_of_2(width) if INTERPRETED else min(1024, triton.next_power_of_2(width))
    start(
        kernels.tokens_grad_kernel, (triton.cdiv(width, channels), tokens.shape[2], count * bt), WARPS, G=g, OUT=dt,
        sg=strides, BT=bt, DIV=b // bt, E=width, BE=channels, **_positions(positions), **_stage(stage, count),
    )  # fmt: skip
    if not embeddings:
        return None, dt
    de = torch.empty(b, length, width, dtype=g.dtype, device=g.device)
    rows, channels = _tile(length, width)
    start(
        kernels.embeddings_grad_kernel, (triton.cdiv(length, rows), triton.cdiv(width, channels), b), WARPS, G=g,
        OUT=de, sg=strides, S=1 if stage is not None else count, L=length, E=width, BL=rows, BE=channels,
        **_positions(positions),
    )  # fmt: skip
    return de, dt
