"""Launches the kernels of `semantic_alignment`."""

from __future__ import annotations

import torch
from torch import Tensor

import triton

from . import semantic as kernels
from . import tuning
from .launch import INTERPRETED, capability, new_out, start
from .launch_bwd import TARGET_PROGRAMS, fold


def _tile(name: str, q: Tensor, k: Tensor) -> tuple[tuning.Tile, dict, dict]:
    """Tile of the table's entry, arguments of every kernel, Triton's options."""
    d = q.shape[3]
    t = tuning.tile(name, capability(q.device), q.element_size(), tuning.padded(d), INTERPRETED)
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
    t, shared, options = _tile("gather", q, k)
    b, h, lq, d = q.shape
    lt = k.shape[2]
    block = min(t.rows, tuning.padded(lt))
    chunks, per = _chunks(lq, t.keys, triton.cdiv(lt, block) * b * h)
    part = torch.empty(chunks, b, h, lt, d, device=q.device)
    lse = torch.empty(chunks, b, h, lt, device=q.device)
    own = dict(OUT=part, LSE=lse, heads=h, per_chunk=per, BM=block, BN=t.keys)
    start(kernels.gather_kernel, (triton.cdiv(lt, block), chunks, b * h), options, **shared, **own)
    out = torch.empty(b, h, lt, d, dtype=q.dtype, device=q.device)
    total = torch.empty(b, h, lt, device=q.device)
    rows = 256 if INTERPRETED else 16
    start(
        kernels.join_kernel, (triton.cdiv(b * h * lt, rows),), dict(num_warps=4), PART=part, LSE=lse, OUT=out,
        TOTAL=total, count=b * h * lt, chunks=chunks, D=d, BD=shared["BD"], BM=rows,
    )  # fmt: skip
    return out, total


def backward(q: Tensor, k: Tensor, g: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """dq and dk. g: gradient of the result, out and lse: of `forward`."""
    t, shared, options = _tile("text", q, k)
    b, h, lq, d = q.shape
    lt = k.shape[2]
    block = min(t.keys, tuning.padded(lt))
    blocks = triton.cdiv(lt, block)
    dq = new_out(q)
    given = dict(G=g, LSE=lse, OUT=out, sg=g.stride(), BM=t.rows, BN=block, DQ=dq, sdq=dq.stride())
    if blocks > 1:
        start(kernels.image_kernel, (triton.cdiv(lq, t.rows), h, b), options, **shared, **given)
        given |= dict(DQ=None, sdq=None)
    chunks, per = _chunks(lq, t.rows, blocks * b * h)
    dk = torch.empty(chunks, b, h, lt, d, device=q.device)
    grid = (blocks, chunks, b * h)
    start(kernels.text_kernel, grid, options, **shared, **given, DK=dk, heads=h, per_chunk=per)
    return dq, fold(dk[None], (k,))[0]
