"""Kernels of `stage_tokens`: learned tokens over placeholder rows of the word embeddings, forward and backward.

Copies, no arithmetic: every element is read and written once. Sums of gradients are float32, in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import kept_stage


@triton.jit
def tokens_kernel(EMB, TOK, POS, STAGE, OUT, se, st, sp, sstage, B, DIV, L, E, T,
                  BL: tl.constexpr, BE: tl.constexpr):  # fmt: skip
    """Grid (row tiles, channel tiles, stages * B), with STAGE (.., .., B). OUT [.., B, L, E], contiguous."""
    b = (tl.program_id(2) % B).to(tl.int64)
    s = (tl.program_id(2) // B).to(tl.int64)
    if STAGE is not None:
        s = kept_stage(STAGE, sstage, b).to(tl.int64)
    rows = tl.program_id(0) * BL + tl.arange(0, BL)
    cols = tl.program_id(1) * BE + tl.arange(0, BE)
    keep = (rows[:, None] < L) & (cols[None, :] < E)
    x = tl.load(EMB + b * se[0] + rows[:, None] * se[1] + cols[None, :] * se[2], mask=keep, other=0.0)
    token = TOK + s * st[0] + b // DIV * st[1] + cols * st[3]
    for t in range(0, T):
        at = tl.load(POS + b * sp[0] + t * sp[1])  # -1: no row is that one
        y = tl.load(token + t * st[2], mask=cols < E, other=0.0).to(x.dtype)
        x = tl.where((rows == at)[:, None], y[None, :], x)
    tl.store(OUT + (tl.program_id(2).to(tl.int64) * L + rows[:, None]) * E + cols[None, :], x, mask=keep)


@triton.jit
def tokens_grad_kernel(G, OUT, POS, STAGE, sg, sp, sstage, BT, DIV, E, T, BE: tl.constexpr):
    """Grid (channel tiles, T, S * BT). OUT [S, BT, T, E]: gradient of the tokens. sg[0] is 0 with STAGE."""
    t = tl.program_id(1)
    s, row = tl.program_id(2) // BT, tl.program_id(2) % BT
    cols = tl.program_id(0) * BE + tl.arange(0, BE)
    total = tl.zeros([BE], tl.float32)
    first = row.to(tl.int64) * DIV
    for i in range(0, DIV):
        b = first + i
        at = tl.load(POS + b * sp[0] + t * sp[1])
        picked = s
        if STAGE is not None:
            picked = kept_stage(STAGE, sstage, b)
        width = tl.where((at >= 0) & (picked == s), E, 0)
        base = G + s.to(tl.int64) * sg[0] + b * sg[1] + at * sg[2]
        total += tl.load(base + cols * sg[3], mask=cols < width, other=0.0).to(tl.float32)
    out = OUT + (tl.program_id(2).to(tl.int64) * T + t) * E
    tl.store(out + cols, total.to(OUT.dtype.element_ty), mask=cols < E)


@triton.jit
def embeddings_grad_kernel(G, OUT, POS, sg, sp, S, L, E, T, BL: tl.constexpr, BE: tl.constexpr):
    """Grid (row tiles, channel tiles, B). OUT [B, L, E]: sum over the S stages of G, 0 where a token stands."""
    b = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * BL + tl.arange(0, BL)
    cols = tl.program_id(1) * BE + tl.arange(0, BE)
    end = tl.zeros([BL], tl.int32) + E  # columns that count: none in a replaced row
    for t in range(0, T):
        end = tl.where(rows == tl.load(POS + b * sp[0] + t * sp[1]), 0, end)
    inside = rows[:, None] < L
    total = tl.zeros([BL, BE], tl.float32)
    at = G + b * sg[1] + rows[:, None] * sg[2] + cols[None, :] * sg[3]
    for _ in range(0, S):
        total += tl.load(at, mask=inside & (cols[None, :] < end[:, None]), other=0.0).to(tl.float32)
        at += sg[0]
    out = OUT + (b * L + rows[:, None]) * E + cols[None, :]
    tl.store(out, total.to(OUT.dtype.element_ty), mask=inside & (cols[None, :] < E))
