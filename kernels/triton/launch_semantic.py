"""Launches the kernels of `semantic_alignment`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import triton

from . import semantic as kernels
from . import tuning
from .launch import INTERPRETED, capability, new_out, start
from .launch_bwd import TARGET_PROGRAMS, fold


def _tile(q: Tensor, k: Tensor) -> tuple[tuning.Tile, dict, dict]:
    """Tile, arguments of every kernel, Triton's options."""
    t = tuning.tile("keys", capability(q.device), q.element_size(), tuning.padded(q.shape[3]), INTERPRETED)
    d = q.shape[3]
    shared = dict(
        Q=q, K=k, sq=q.stride(), sk=k.stride(), DIV=q.shape[0] // k.shape[0], LQ=q.shape[2], LT=k.shape[2],
        D=d, BD=tuning.padded(d), ROOT=float(d) ** 0.5, UPCAST=INTERPRETED and q.dtype == torch.bfloat16,
    )  # fmt: skip
    return t, shared, dict(num_warps=t.warps, num_stages=t.stages)


def _chunks(lq: int, rows: int, programs: int) -> tuple[int, int]:
    """(chunks, image tokens per chunk): enough programs for the GPU; two under the interpreter, for tests."""
    tiles = triton.cdiv(lq, rows)
    wanted = 2 if INTERPRETED else max(1, TARGET_PROGRAMS // programs)
    per = triton.cdiv(tiles, min(wanted, tiles))
    return triton.cdiv(tiles, per), per * rows


def forward(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Result [B, H, Lt, D] in q's dtype, and the log2 of the softmax sums, float32 [B, H, Lt]."""
    t, shared, options = _tile(q, k)
    b, h, lq, d = q.shape
    lt = k.shape[2]
    chunks, per = _chunks(lq, t.keys, triton.cdiv(lt, t.rows) * b * h)
    out = torch.empty(chunks, b, h, lt, d, device=q.device)
    lse = torch.empty(chunks, b, h, lt, device=q.device)
    grid = (triton.cdiv(lt, t.rows), chunks, b * h)
    own = dict(OUT=out, LSE=lse, heads=h, per_chunk=per, BM=t.rows, BN=t.keys)
    start(kernels.gather_kernel, grid, options, **shared, **own)
    total = torch.logsumexp(lse * math.log(2.0), 0) / math.log(2.0)
    return (out * torch.exp2(lse - total).unsqueeze(-1)).sum(0).to(q.dtype), total


def backward(q: Tensor, k: Tensor, g: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """dq and dk. g: gradient of the result, out and lse: of `forward`."""
    t, shared, options = _tile(q, k)
    b, h, lq, d = q.shape
    lt = k.shape[2]
    delta = (g.float() * out.float()).sum(-1)
    block = min(t.keys, tuning.padded(lt))
    given = dict(G=g, LSE=lse, DELTA=delta, sg=g.stride(), BM=t.rows, BN=block)
    dq = new_out(q)
    grid = (triton.cdiv(lq, t.rows), h, b)
    start(kernels.image_kernel, grid, options, **shared, **given, DQ=dq, sdq=dq.stride())
    blocks = triton.cdiv(lt, block)
    chunks, per = _chunks(lq, t.rows, blocks * b * h)
    dk = torch.empty(chunks, b, h, lt, d, device=q.device)
    grid = (blocks, chunks, b * h)
    start(kernels.text_kernel, grid, options, **shared, **given, DK=dk, heads=h, per_chunk=per)
    return dq, fold(dk, k)
