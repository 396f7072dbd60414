"""Kernels of `token_attention_loss`: distance of two token-attention maps over the same q, no map stored.

With p and r the two softmax maps, w the tokens' weights: loss = sum w (p - r)^2 / N, and the gradient of the
logits of p is 2 / N p (w (p - r) - delta), delta = sum over tokens of w (p - r) p. The map r has no gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import load_tile, logits, store_tile

LIFT = tl.constexpr(1024.0)  # keeps small products out of float16's subnormal range; divided out in float32


@triton.jit
def add_logsum(x, m, l):
    """One block of an online log-sum: the new maximum and sum."""
    top = tl.maximum(m, tl.max(x, 1))
    return top, l * tl.exp2(m - top) + tl.sum(tl.exp2(x - top[:, None]), 1)


@triton.jit
def gradient(x, x_ref, lse, lse_ref, w, delta):
    """p (w (p - r) - delta), and w (p - r) with p."""
    p = tl.exp2(x - lse[:, None])
    difference = w[None, :] * (p - tl.exp2(x_ref - lse_ref[:, None]))
    return p * (difference - delta[:, None]), difference, p


@triton.jit
def add_distance(x, x_ref, lse, lse_ref, W, cols, sw, LT, loss, delta):
    """One block added to sum w (p - r)^2 and to sum w (p - r) p."""
    w = tl.load(W + cols * sw, mask=cols < LT, other=0.0)
    _, difference, p = gradient(x, x_ref, lse, lse_ref, w, delta)
    loss += tl.sum(difference * (p - tl.exp2(x_ref - lse_ref[:, None])), 1)
    return loss, delta + tl.sum(difference * p, 1)


@triton.jit
def loss_kernel(Q, K, KR, W, LOSS, LSE, LSE_R, DELTA, sq, sk, skr, sw, DIV, DIVR, LQ, LT, D: tl.constexpr,
                BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ROOT: tl.constexpr,
                UPCAST: tl.constexpr, ONE: tl.constexpr):  # fmt: skip
    """Grid (tiles, H, B). LOSS: sums of w (p - r)^2 and row statistics, each [B, H, LQ]. ONE: LT <= BN.

    The sums over rows are left to PyTorch: behind a product in tensor memory (sm_100) Triton 3.6 fails to compile one
    down to a single number.
    """
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    bh = b * tl.num_programs(1) + head
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = rows < LQ
    q = load_tile(Q + b * sq[0] + head * sq[1], rows, LQ, sq[2], sq[3], D, BD, UPCAST)
    k, kr = K + b // DIV * sk[0] + head * sk[1], KR + b // DIVR * skr[0] + head * skr[1]
    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    m_ref, l_ref = m, l
    loss = tl.zeros([BM], tl.float32)
    delta = tl.zeros([BM], tl.float32)
    if ONE:  # the logits stay where they are for both passes
        x, cols = logits(q, k, sk, 0, LT, None, 0, D, BD, BN, ROOT, UPCAST)
        x_ref, _ = logits(q, kr, skr, 0, LT, None, 0, D, BD, BN, ROOT, UPCAST)
        m, l = add_logsum(x, m, l)
        m_ref, l_ref = add_logsum(x_ref, m_ref, l_ref)
        lse, lse_ref = m + tl.log2(l), m_ref + tl.log2(l_ref)
        loss, delta = add_distance(x, x_ref, lse, lse_ref, W + b * sw[0], cols, sw[1], LT, loss, delta)
    else:
        for start in range(0, LT, BN):
            x, _ = logits(q, k, sk, start, LT, None, 0, D, BD, BN, ROOT, UPCAST)
            m, l = add_logsum(x, m, l)
            x, _ = logits(q, kr, skr, start, LT, None, 0, D, BD, BN, ROOT, UPCAST)
            m_ref, l_ref = add_logsum(x, m_ref, l_ref)
        lse, lse_ref = m + tl.log2(l), m_ref + tl.log2(l_ref)
        for start in range(0, LT, BN):
            x, cols = logits(q, k, sk, start, LT, None, 0, D, BD, BN, ROOT, UPCAST)
            x_ref, _ = logits(q, kr, skr, start, LT, None, 0, D, BD, BN, ROOT, UPCAST)
            loss, delta = add_distance(x, x_ref, lse, lse_ref, W + b * sw[0], cols, sw[1], LT, loss, delta)
    at = bh * LQ + rows
    tl.store(LSE + at, lse, mask=inside)
    tl.store(LSE_R + at, lse_ref, mask=inside)
    tl.store(DELTA + at, delta, mask=inside)
    tl.store(LOSS + at, loss, mask=inside)


@triton.jit
def loss_rows_kernel(Q, K, KR, W, DQ, FACTOR, LSE, LSE_R, DELTA, sq, sk, skr, sw, sdq, DIV, DIVR, LQ, LT,
                     D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                     ROOT: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """Grid (tiles, H, B): dq. FACTOR: one float32, 2 / N / sqrt(D) times the loss's gradient."""
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    q = load_tile(Q + b * sq[0] + head * sq[1], rows, LQ, sq[2], sq[3], D, BD, UPCAST)
    k, kr = K + b // DIV * sk[0] + head * sk[1], KR + b // DIVR * skr[0] + head * skr[1]
    at = (b * tl.num_programs(1) + head) * LQ + rows
    lse = tl.load(LSE + at, mask=rows < LQ, other=0.0)
    lse_ref = tl.load(LSE_R + at, mask=rows < LQ, other=0.0)
    delta = tl.load(DELTA + at, mask=rows < LQ, other=0.0)
    dq = tl.zeros([BM, BD], tl.float32)
    for start in range(0, LT, BN):
        x, cols = logits(q, k, sk, start, LT, None, 0, D, BD, BN, ROOT, UPCAST)
        x_ref, _ = logits(q, kr, skr, start, LT, None, 0, D, BD, BN, ROOT, UPCAST)
        w = tl.load(W + b * sw[0] + cols * sw[1], mask=cols < LT, other=0.0)
        ds, _, _ = gradient(x, x_ref, lse, lse_ref, w, delta)
        keys = load_tile(k, cols, LT, sk[2], sk[3], D, BD, UPCAST)
        dq = tl.dot((ds * LIFT).to(keys.dtype), keys, dq, input_precision="ieee")
    dq = dq * (tl.load(FACTOR) / LIFT)
    store_tile(DQ + b * sdq[0] + head * sdq[1], dq, rows, LQ, sdq[2], sdq[3], D, BD)


@triton.jit(do_not_specialize=["per_chunk"])
def loss_keys_kernel(Q, K, KR, W, DK, DQ, FACTOR, LSE, LSE_R, DELTA, sq, sk, skr, sw, sdq, DIV, DIVR, heads,
                     LQ, LT, per_chunk, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                     ROOT: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """Grid (key blocks, chunks of image tokens, B*H). DK: float32 [chunks, B, H, LT, D], parts of sums.

    DQ may be given where one block holds all keys.
    """
    bh = tl.program_id(2).to(tl.int64)
    b, head = bh // heads, bh % heads
    start = tl.program_id(0) * BN
    cols = start + tl.arange(0, BN)
    k, kr = K + b // DIV * sk[0] + head * sk[1], KR + b // DIVR * skr[0] + head * skr[1]
    w = tl.load(W + b * sw[0] + cols * sw[1], mask=cols < LT, other=0.0)
    dk = tl.zeros([BN, BD], tl.float32)
    factor = tl.load(FACTOR) / LIFT
    first = tl.program_id(1) * per_chunk
    for row in range(first, tl.minimum(first + per_chunk, LQ), BM):
        rows = row + tl.arange(0, BM)
        q = load_tile(Q + b * sq[0] + head * sq[1], rows, LQ, sq[2], sq[3], D, BD, UPCAST)
        at = bh * LQ + rows
        lse = tl.load(LSE + at, mask=rows < LQ, other=0.0)
        lse_ref = tl.load(LSE_R + at, mask=rows < LQ, other=0.0)
        delta = tl.load(DELTA + at, mask=rows < LQ, other=0.0)
        x, _ = logits(q, k, sk, start, LT, None, 0, D, BD, BN, ROOT, UPCAST)
        x_ref, _ = logits(q, kr, skr, start, LT, None, 0, D, BD, BN, ROOT, UPCAST)
        ds, _, _ = gradient(x, x_ref, lse, lse_ref, w, delta)  # rows past LQ meet q = 0 in the product
        lifted = (ds * LIFT).to(q.dtype)
        dk = tl.dot(tl.trans(lifted), q, dk, input_precision="ieee")
        if DQ is not None:
            keys = load_tile(k, cols, LT, sk[2], sk[3], D, BD, UPCAST)
            dq = tl.dot(lifted, keys, input_precision="ieee") * factor
            store_tile(DQ + b * sdq[0] + head * sdq[1], dq, rows, LQ, sdq[2], sdq[3], D, BD)
    dk = dk * factor
    at = DK + (tl.program_id(1) * tl.num_programs(2).to(tl.int64) + bh) * LT * D
    store_tile(at, dk, cols, LT, D, 1, D, BD)
