"""Kernels of `semantic_alignment`: what each text token gathers from the image queries.

out[t] = sum_s P[t, s] q[s] with P = softmax over image tokens s of k[t] q[s] / sqrt(D). There are few text
tokens and many image tokens, so the image tokens are cut into chunks that run side by side and are joined
afterwards. q is key and value at once: each tile of it is loaded once, forward and, where the text fits one block,
backward.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import load_tile, logits, store_tile


@triton.jit(do_not_specialize=["per_chunk"])
def gather_kernel(Q, K, OUT, LSE, sq, sk, DIV, heads, LQ, LT, per_chunk, D: tl.constexpr, BD: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr, ROOT: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """Grid (text tiles, chunks, B*H). Attention to a chunk: OUT [chunks, B*H, LT, D], LSE without D."""
    bh = tl.program_id(2).to(tl.int64)
    b, head = bh // heads, bh % heads
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    k = load_tile(K + b // DIV * sk[0] + head * sk[1], rows, LT, sk[2], sk[3], D, BD, UPCAST)
    first = tl.program_id(1) * per_chunk
    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    for start in range(first, tl.minimum(first + per_chunk, LQ), BN):
        cols = start + tl.arange(0, BN)
        q = load_tile(Q + b * sq[0] + head * sq[1], cols, LQ, sq[2], sq[3], D, BD, UPCAST)
        x = tl.dot(k, tl.trans(q), input_precision="ieee") * (1.4426950408889634 / ROOT)
        x = tl.where(cols[None, :] < LQ, x, float("-inf"))
        top = tl.maximum(m, tl.max(x, 1))
        weight = tl.exp2(x - top[:, None]).to(q.dtype)
        old = tl.exp2(m - top)
        l = l * old + tl.sum(weight.to(tl.float32), 1)
        acc = tl.dot(weight, q, acc * old[:, None], input_precision="ieee")
        m = top
    at = (tl.program_id(1) * tl.num_programs(2).to(tl.int64) + bh) * LT
    tl.store(LSE + at + rows, m + tl.log2(l), mask=rows < LT)
    store_tile(OUT + at * D, acc / l[:, None], rows, LT, D, 1, D, BD)


@triton.jit
def join_kernel(PART, LSE, OUT, TOTAL, count, chunks, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr):
    """Grid (ceil(count / BM)). Chunks of `gather_kernel` to OUT [count, D] and TOTAL [count], count = B * H * LT."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = rows < count
    m = tl.full([BM], float("-inf"), tl.float32)
    for c in range(0, chunks):
        m = tl.maximum(m, tl.load(LSE + c * count + rows, mask=inside, other=0.0))
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    part = PART
    for c in range(0, chunks):
        weight = tl.exp2(tl.load(LSE + c * count + rows, mask=inside, other=0.0) - m)
        l += weight
        acc += weight[:, None] * load_tile(part, rows, count, D, 1, D, BD, False)
        part += count.to(tl.int64) * D
    tl.store(TOTAL + rows, m + tl.log2(l), mask=inside)
    store_tile(OUT, acc / l[:, None], rows, count, D, 1, D, BD)


@triton.jit
def weights(q, K, G, OUT, LSE, sk, sg, start, LT, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
            ROOT: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """Image rows q against text block `start`: P and the logits' gradient, both [rows, BN], and dout.

    OUT: the result, contiguous [LT, D].
    """
    x, cols = logits(q, K, sk, start, LT, None, 0, D, BD, BN, ROOT, UPCAST)
    lse = tl.load(LSE + cols, mask=cols < LT, other=0.0)
    p = tl.exp2(x - lse[None, :])
    g = load_tile(G, cols, LT, sg[2], sg[3], D, BD, UPCAST)
    delta = tl.sum(g.to(tl.float32) * load_tile(OUT, cols, LT, D, 1, D, BD, True), 1)
    dp = tl.dot(q, tl.trans(g), input_precision="ieee")
    return p, p * (dp - delta[None, :]) / ROOT, g, cols


@triton.jit
def image_kernel(Q, K, G, OUT, DQ, LSE, sq, sk, sg, sdq, DIV, LQ, LT, D: tl.constexpr, BD: tl.constexpr,
                 BM: tl.constexpr, BN: tl.constexpr, ROOT: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """Grid (image tiles, H, B): dq, both as key and as value."""
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    at = (b * tl.num_programs(1) + head) * LT
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    q = load_tile(Q + b * sq[0] + head * sq[1], rows, LQ, sq[2], sq[3], D, BD, UPCAST)
    k, g = K + b // DIV * sk[0] + head * sk[1], G + b * sg[0] + head * sg[1]
    dq = tl.zeros([BM, BD], tl.float32)
    for start in range(0, LT, BN):
        p, ds, grad, cols = weights(q, k, g, OUT + at * D, LSE + at, sk, sg, start, LT, D, BD, BN, ROOT,
                                    UPCAST)  # fmt: skip
        keys = load_tile(k, cols, LT, sk[2], sk[3], D, BD, UPCAST)
        dq = tl.dot(ds.to(keys.dtype), keys, dq, input_precision="ieee")
        dq = tl.dot(p.to(keys.dtype), grad, dq, input_precision="ieee")
    store_tile(DQ + b * sdq[0] + head * sdq[1], dq, rows, LQ, sdq[2], sdq[3], D, BD)


@triton.jit(do_not_specialize=["per_chunk"])
def text_kernel(Q, K, G, OUT, DK, DQ, LSE, sq, sk, sg, sdq, DIV, heads, LQ, LT, per_chunk, D: tl.constexpr,
                BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ROOT: tl.constexpr,
                UPCAST: tl.constexpr):  # fmt: skip
    """Grid (text blocks, chunks, B*H): parts of dk, float32 [chunks, B, H, LT, D]; dq too if DQ is given.

    DQ may be given where one block holds all of the text.
    """
    bh = tl.program_id(2).to(tl.int64)
    b, head = bh // heads, bh % heads
    start = tl.program_id(0) * BN
    k, g = K + b // DIV * sk[0] + head * sk[1], G + b * sg[0] + head * sg[1]
    dk = tl.zeros([BN, BD], tl.float32)
    first = tl.program_id(1) * per_chunk
    for row in range(first, tl.minimum(first + per_chunk, LQ), BM):
        rows = row + tl.arange(0, BM)
        q = load_tile(Q + b * sq[0] + head * sq[1], rows, LQ, sq[2], sq[3], D, BD, UPCAST)
        p, ds, grad, cols = weights(q, k, g, OUT + bh * LT * D, LSE + bh * LT, sk, sg, start, LT, D, BD, BN,
                                    ROOT, UPCAST)  # fmt: skip
        if DQ is not None:
            keys = load_tile(k, cols, LT, sk[2], sk[3], D, BD, UPCAST)
            dq = tl.dot(ds.to(keys.dtype), keys, input_precision="ieee")
            dq = tl.dot(p.to(keys.dtype), grad, dq, input_precision="ieee")
            store_tile(DQ + b * sdq[0] + head * sdq[1], dq, rows, LQ, sdq[2], sdq[3], D, BD)
        dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision="ieee")  # rows past LQ meet q = 0
    at = (tl.program_id(1) * tl.num_programs(2).to(tl.int64) + bh) * LT * D
    store_tile(DK + at, dk, start + tl.arange(0, BN), LT, D, 1, D, BD)
