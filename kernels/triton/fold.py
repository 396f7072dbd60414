"""Sums of partial gradients in a fixed order: over chunks and samples, over tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import kept_stage


@triton.jit
def fold_kernel(PART, OUT, OUT2, STAGE, sstage, size, chunks, batch, DIV, ROWS, BLOCK: tl.constexpr):
    """Grid (ceil(size / BLOCK), rows of OUT, 1 or 2). OUT [S * ROWS, size]: sums of PART [chunks, batch, size].

    Row s * ROWS + t takes the samples t * DIV.. t * DIV + DIV - 1, with STAGE only those in stage s. OUT2 receives
    another such sum, of what stands behind PART.
    """
    row = tl.program_id(1)
    stage, first = row // ROWS, (row % ROWS).to(tl.int64) * DIV
    first += tl.program_id(2).to(tl.int64) * chunks * batch
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < size
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(0, DIV):
        b = first + i
        keep = inside
        if STAGE is not None:
            keep = cols < tl.where(kept_stage(STAGE, sstage, row % ROWS * DIV + i) == stage, size, 0)
        for c in range(0, chunks):
            at = (b + c * batch) * size
            total += tl.load(PART + at + cols, mask=keep, other=0.0)
    at = row.to(tl.int64) * size + cols
    if OUT2 is not None:
        if tl.program_id(2) == 1:
            tl.store(OUT2 + at, total.to(OUT2.dtype.element_ty), mask=inside)
        else:
            tl.store(OUT + at, total.to(OUT.dtype.element_ty), mask=inside)
    else:
        tl.store(OUT + at, total.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def quotient_kernel(PART, DEN, OUT, tiles, count, BT: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (ceil(count / BLOCK)). OUT [count]: sum over tiles of PART [tiles, count] over DEN, 0 where DEN is 0."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < count
    total = tl.zeros([BT, BLOCK], tl.float32)
    for first in range(0, tiles, BT):
        t = first + tl.arange(0, BT)
        at = PART + t[:, None].to(tl.int64) * count + cols[None, :]
        total += tl.load(at, mask=(t[:, None] < tiles) & inside[None, :], other=0.0)
    den = tl.load(DEN + cols, mask=inside, other=0.0)
    result = tl.where(den == 0.0, 0.0, tl.sum(total, 0) / tl.where(den == 0.0, 1.0, den))
    tl.store(OUT + cols, result, mask=inside)
