"""Pieces shared by the attention kernels: masked loads, a softmax step, weights from a known row statistic.

Logits are kept in base 2: x = q.k * log2(e) / sqrt(D) (+ bias * log2(e)), so that exp2 gives the softmax.
ROOT is sqrt(D). The unscaled softmax of ortho_v2 is the normalised power ROOT of the scaled one: no second
q.k product.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(base, rows, count, s_row, s_col, D: tl.constexpr, BD: tl.constexpr, UPCAST: tl.constexpr):
    """Rows `rows` (0 past `count`) of a matrix as [rows, BD], columns past D are 0."""
    cols = tl.arange(0, BD)
    keep = rows[:, None] < count
    if BD != D:
        keep = keep & (cols[None, :] < D)
    t = tl.load(base + rows[:, None] * s_row + cols[None, :] * s_col, mask=keep, other=0.0)
    if UPCAST:
        t = t.to(tl.float32)
    return t


@triton.jit
def store_tile(base, value, rows, count, s_row, s_col, D: tl.constexpr, BD: tl.constexpr):
    """Store [rows, BD] cast to the pointer's dtype; rows past `count` and columns past D are left alone."""
    cols = tl.arange(0, BD)
    keep = rows[:, None] < count
    if BD != D:
        keep = keep & (cols[None, :] < D)
    at = base + rows[:, None] * s_row + cols[None, :] * s_col
    tl.store(at, value.to(base.dtype.element_ty), mask=keep)


@triton.jit
def channel_vector(base, D: tl.constexpr, BD: tl.constexpr):
    """D contiguous float32 as [BD], 0 past D."""
    cols = tl.arange(0, BD)
    return tl.load(base + cols, mask=cols < D, other=0.0)


@triton.jit
def identity_weight(MASK, smask, j: tl.constexpr, b, rows, LQ):
    """Region mask of identity j at these rows (1 without a mask), 0 past LQ. float32 [rows]"""
    inside = rows < LQ
    w = inside.to(tl.float32)
    if MASK is not None:
        w = tl.load(MASK + j * smask[0] + b * smask[1] + rows * smask[2], mask=inside, other=0.0)
    return w


@triton.jit
def identity_scale(SCALE, sscale, j: tl.constexpr, b):
    """Scale of identity j for sample b: from the tensor [n, B], or from the tuple of floats."""
    if sscale is not None:
        s = tl.load(SCALE + j * sscale[0] + b * sscale[1])
    else:
        s = SCALE[j]
    return s


@triton.jit
def kept_stage(STAGE, sstage, b):
    """(stride of the index, number of stages) = sstage: the stage of sample b, inside the bank."""
    return tl.minimum(tl.maximum(tl.load(STAGE + b * sstage[0]), 0), sstage[1] - 1)


@triton.jit
def text_tensor(T, st, div, bank, STAGE, sstage, b, head):
    """Where the text's keys or values of sample b and this head begin.

    With a stage bank, `bank` elements lie from stage to stage; the index is read here.
    """
    base = T + b // div * st[0] + head * st[1]
    if STAGE is not None:
        base += kept_stage(STAGE, sstage, b).to(tl.int64) * bank
    return base


@triton.jit
def unscaled(difference, p, D: tl.constexpr, ROOT: tl.constexpr):
    """exp2(difference * sqrt(D)) from p = exp2(difference): three multiplications for D = 64."""
    if D == 64:
        p2 = p * p
        p4 = p2 * p2
        u = p4 * p4
    else:
        u = tl.exp2(difference * ROOT)
    return u


@triton.jit
def logits(q, K, sk, start, count, BIAS, s_bias, D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr,
           ROOT: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """Base-2 logits of q against keys start..start+BLOCK, -inf past `count`; and the key indices."""
    cols = start + tl.arange(0, BLOCK)
    k = load_tile(K, cols, count, sk[2], sk[3], D, BD, UPCAST)
    x = tl.dot(q, tl.trans(k), input_precision="ieee") * (1.4426950408889634 / ROOT)
    inside = cols[None, :] < count
    if BIAS is not None:
        bias = tl.load(BIAS[:, None] + cols[None, :] * s_bias, mask=inside, other=0.0)
        x += bias.to(tl.float32) * 1.4426950408889634
    return tl.where(inside, x, float("-inf")), cols


@triton.jit
def online_step(q, K, V, sk, sv, start, count, BIAS, s_bias, NG, m, l, acc, lu, got,
                D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr, ROOT: tl.constexpr,
                SHARE: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """One key block of the online softmax. lu, got: the unscaled sum and the part of the first NG tokens.

    For 16-bit weights the running maximum is rounded up to an integer: they then round alike whatever the maximum is,
    and backward, which knows only the final sum, meets the very weights of forward. The sum is that of the rounded
    weights, so that a single key gets exactly 1.
    """
    # early: hides its latency
    v = load_tile(V, start + tl.arange(0, BLOCK), count, sv[2], sv[3], D, BD, UPCAST)
    x, cols = logits(q, K, sk, start, count, BIAS, s_bias, D, BD, BLOCK, ROOT, UPCAST)
    top = tl.max(x, 1)
    if q.dtype != tl.float32:
        top = tl.ceil(top)
    top = tl.maximum(m, top)
    base = top
    if BIAS is not None:  # a row may have met only -inf so far
        base = tl.where(top == float("-inf"), 0.0, top)
    difference = x - base[:, None]
    p = tl.exp2(difference)
    old = tl.exp2(m - base)
    weight = p.to(v.dtype)
    l = l * old + tl.sum(weight.to(tl.float32), 1)
    acc = tl.dot(weight, v, acc * old[:, None], input_precision="ieee")
    if SHARE:
        u = unscaled(difference, p, D, ROOT)
        old_u = unscaled(m - base, old, D, ROOT)
        lu = lu * old_u + tl.sum(u, 1)
        got = got * old_u + tl.sum(tl.where(cols[None, :] < NG, u, 0.0), 1)
    return top, l, acc, lu, got


@triton.jit
def attend(q, K, V, sk, sv, count, BIAS, s_bias, NZ, NG, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
           LAST: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, ROOT: tl.constexpr,
           SHARE: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """Softmax attention over `count` keys and NZ zero tokens (logit 0, value 0).

    BLOCK keys at a time, of which whole blocks cover WHOLE, and a block of LAST keys (0: none) behind them, unrolled
    by the compiler; or WHOLE -1 and LAST 0 for a loop left to run time, which needs fewer registers. Three numbers,
    since Triton before 3.7 hands no tuple out of a tuple of constants on to a function.
    Returns the result [BM, BD], log2 of the sum [BM], that of the unscaled sum, the share of the first NG
    tokens.
    """
    has_zero = tl.full([BM], NZ, tl.int32) > 0
    m = tl.where(has_zero, 0.0, float("-inf"))
    l = tl.zeros([BM], tl.float32) + NZ
    lu = l
    counted = tl.minimum(tl.maximum(NG - count, 0), NZ)
    got = tl.zeros([BM], tl.float32) + counted
    acc = tl.zeros([BM, BD], tl.float32)
    if WHOLE < 0:
        for start in range(0, count, BLOCK):
            m, l, acc, lu, got = online_step(q, K, V, sk, sv, start, count, BIAS, s_bias, NG, m, l, acc, lu,
                                             got,
                                             D, BD, BLOCK, ROOT, SHARE, UPCAST)  # fmt: skip
    else:
        for start in range(0, WHOLE, BLOCK):
            m, l, acc, lu, got = online_step(q, K, V, sk, sv, start, count, BIAS, s_bias, NG, m, l, acc, lu,
                                             got,
                                             D, BD, BLOCK, ROOT, SHARE, UPCAST)  # fmt: skip
    if LAST > 0:
        m, l, acc, lu, got = online_step(q, K, V, sk, sv, WHOLE, count, BIAS, s_bias, NG, m, l, acc, lu,
                                         got,
                                         D, BD, LAST, ROOT, SHARE, UPCAST)  # fmt: skip
    return acc / l[:, None], m + tl.log2(l), m * ROOT + tl.log2(lu), got / lu


@triton.jit
def known_weights(x, lse, DTYPE: tl.constexpr):
    """The softmax weights of forward, float32, from the logits and log2 of their sum.

    Forward multiplied weights of DTYPE that stand to an integer base (`online_step`): so do these.
    """
    if DTYPE == tl.float32:
        p = tl.exp2(x - lse[:, None])
    else:
        base = tl.floor(lse)
        p = tl.exp2(x - base[:, None]).to(DTYPE).to(tl.float32) * tl.exp2(base - lse)[:, None]
    return p


@triton.jit
def known_step(q, K, V, sk, sv, start, count, BIAS, s_bias, NG, base, lse_u, acc, lu, got,
               D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr, ROOT: tl.constexpr,
               SHARE: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    x, cols = logits(q, K, sk, start, count, BIAS, s_bias, D, BD, BLOCK, ROOT, UPCAST)
    p = tl.exp2(x - base[:, None])
    v = load_tile(V, cols, count, sv[2], sv[3], D, BD, UPCAST)
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    if SHARE:
        u = tl.exp2(x * ROOT - lse_u[:, None])
        lu += tl.sum(u, 1)
        got += tl.sum(tl.where(cols[None, :] < NG, u, 0.0), 1)
    return acc, lu, got


@triton.jit
def attend_known(q, K, V, sk, sv, count, BIAS, s_bias, NZ, NG, lse, lse_u, BLOCK: tl.constexpr,
                 D: tl.constexpr,
                 BD: tl.constexpr, BM: tl.constexpr, ROOT: tl.constexpr, SHARE: tl.constexpr,
                 UPCAST: tl.constexpr):  # fmt: skip
    """`attend` with known log2 sums: the result [BM, BD], the share of the first NG tokens [BM], and what is left of
    the unscaled weights' sum, near 1: lse_u is a large number and its rounding is felt.

    The loop is left to run time: unrolled, the compiler keeps key tiles in registers for later, and spills.
    """
    counted = tl.minimum(tl.maximum(NG - count, 0), NZ)
    lu = tl.zeros([BM], tl.float32)
    got = lu
    if SHARE:
        zero = tl.exp2(-lse_u)
        lu += NZ * zero
        got += counted * zero
    acc = tl.zeros([BM, BD], tl.float32)
    base = lse
    if q.dtype != tl.float32:
        base = tl.floor(lse)  # an integer, as in `online_step`
    for start in range(0, count, BLOCK):
        acc, lu, got = known_step(q, K, V, sk, sv, start, count, BIAS, s_bias, NG, base, lse_u, acc, lu, got,
                              D, BD, BLOCK, ROOT, SHARE, UPCAST)  # fmt: skip
    if SHARE:
        got = got / lu
    return acc * tl.exp2(base - lse)[:, None], got, lu
