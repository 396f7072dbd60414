"""Launches the kernels of `token_attention_loss`."""

from __future__ import annotations

import torch
from torch import Tensor

import triton

from . import token_loss as kernels
from . import tuning
from .launch import INTERPRETED, capability, new_out, start
from .launch_bwd import fold

TARGET_PROGRAMS = 512


def _common(name: str, q: Tensor, k: Tensor, k_ref: Tensor, weight: Tensor) -> tuple[dict, tuple[int, ...], dict]:
    """Arguments of all three kernels with the table's tile `name`, a grid over image tokens, Triton's options."""
    b, h, lq, d = q.shape
    t = tuning.tile(name, capability(q.device), q.element_size(), tuning.padded(d), INTERPRETED)
    arguments = dict(
        Q=q, K=k, KR=k_ref, W=weight,
        sq=q.stride(), sk=k.stride(), skr=k_ref.stride(), sw=weight.stride(),
        DIV=b // k.shape[0], DIVR=b // k_ref.shape[0], LQ=lq, LT=k.shape[2], D=d,
        BD=tuning.padded(d), BM=t.rows, BN=min(t.keys, tuning.padded(k.shape[2])), ROOT=float(d) ** 0.5,
        UPCAST=INTERPRETED and q.dtype == torch.bfloat16,
    )  # fmt: skip
    return arguments, (triton.cdiv(lq, t.rows), h, b), dict(num_warps=t.warps, num_stages=t.stages)


def forward(q: Tensor, k: Tensor, k_ref: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of w (p - r)^2 (float32, []) and the row statistics [3, B, H, Lq] that `backward` takes.

    Args:
        weight: float32 [B, Lt], may be expanded.
    """
    arguments, grid, options = _common("loss", q, k, k_ref, weight)
    b, h, lq, _ = q.shape
    loss = torch.empty(b, h, lq, device=q.device)
    rows = torch.empty(3, b, h, lq, device=q.device)
    given = dict(LOSS=loss, LSE=rows[0], LSE_R=rows[1], DELTA=rows[2])
    start(kernels.loss_kernel, grid, options, **arguments, **given, ONE=k.shape[2] <= arguments["BN"])
    return loss.sum(), rows


def backward(q: Tensor, k: Tensor, k_ref: Tensor, weight: Tensor, rows: Tensor, factor: Tensor):
    """dq and dk. factor: float32 [], 2 / N / sqrt(D) times the loss's gradient."""
    arguments, grid, options = _common("loss_bwd", q, k, k_ref, weight)
    b, h, lq, d = q.shape
    dq = new_out(q)
    given = dict(FACTOR=factor, LSE=rows[0], LSE_R=rows[1], DELTA=rows[2], DQ=dq, sdq=dq.stride())
    blocks, tiles = triton.cdiv(k.shape[2], arguments["BN"]), grid[0]
    if blocks > 1:
        start(kernels.loss_rows_kernel, grid, options, **arguments, **given)
        given |= dict(DQ=None, sdq=None)
    wanted = 1 if INTERPRETED else min(tiles, max(1, TARGET_PROGRAMS // (blocks * b * h)))
    per = triton.cdiv(tiles, wanted)
    chunks = triton.cdiv(tiles, per)
    dk = torch.empty(chunks, b, h, k.shape[2], d, device=q.device)
    start(kernels.loss_keys_kernel, (blocks, chunks, b * h), options, **arguments, **given, DK=dk, heads=h,
          per_chunk=per * arguments["BM"])  # fmt: skip
    return dq, fold(dk[None], (k,))[0]
