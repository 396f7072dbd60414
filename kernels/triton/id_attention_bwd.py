"""Backward of `id_attention`. Weights are recomputed from q, the keys and float32 row statistics.

Three kernels: `coupling_kernel` (ortho, ortho_v2) sums over the image tokens what the ratio alpha and the
share a pass on; `rows_kernel` walks image tokens and gives dq, dscale and the gradient of h; `keys_kernel`
walks keys and gives dk, dv. The formulas are those of `idcore.backends.reference_bwd`. Sums are stored per
tile and added afterwards in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .id_attention import mean_share
from .tiles import (
    attend_known,
    channel_vector,
    identity_scale,
    identity_weight,
    known_weights,
    load_tile,
    logits,
    store_tile,
    text_tensor,
)


@triton.jit
def row_values(P, at, inside):
    """float32 row statistics, 0 outside."""
    return tl.load(P + at, mask=inside, other=0.0)


@triton.jit
def bias_rows(BIAS, sbias, b, head, rows, LQ):
    """Pointers to the rows' bias."""
    return BIAS + b * sbias[0] + head * sbias[1] + tl.where(rows < LQ, rows, 0) * sbias[2]


@triton.jit
def beta_of(SHARE, j: tl.constexpr, b, rows, LQ, MERGE: tl.constexpr):
    """-1 (ortho) or a - 1 (ortho_v2). SHARE: a, [n, B, LQ]"""
    if MERGE == 2:
        beta = row_values(SHARE, (j * tl.num_programs(2) + b) * LQ + rows, rows < LQ) - 1.0
    else:
        beta = tl.zeros_like(rows).to(tl.float32) - 1.0
    return beta


@triton.jit
def coupling_kernel(
    Q, KT, VT, STAGE, BIAS, SCALE, MASK, G, HT, LSE_T, SHARE, ALPHA, PART, DSHARE,
    sq, skt, svt, sstage, sbank, sbias, sscale, smask, sg, DIVT, LQ, LT,
    N: tl.constexpr, MERGE: tl.constexpr, BT: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr,
    ROOT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, H, B). HT: h. PART [tiles, n, B*H, D]: sum_s s w beta g h of a tile. DSHARE: da per
    head.
    """
    pid, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    bh, n_bh = b * tl.num_programs(1) + head, tl.num_programs(1) * tl.num_programs(2).to(tl.int64)
    rows = pid * BM + tl.arange(0, BM)
    inside = rows < LQ
    q = load_tile(Q + b * sq[0] + head * sq[1], rows, LQ, sq[2], sq[3], D, BD, UPCAST)
    bias = None
    s_bias = 0
    if BIAS is not None:
        bias = bias_rows(BIAS, sbias, b, head, rows, LQ)
        s_bias = sbias[3]
    lse = row_values(LSE_T, bh * LQ + rows, inside)
    kt = text_tensor(KT, skt, DIVT[0], sbank[0], STAGE, sstage, b, head)
    vt = text_tensor(VT, svt, DIVT[1], sbank[1], STAGE, sstage, b, head)
    h, _, _ = attend_known(q, kt, vt, skt, svt, LT, bias, s_bias, 0, 0, lse, lse, BT, D, BD, BM, ROOT, False, UPCAST)
    store_tile(HT + bh * LQ * D, h, rows, LQ, D, 1, D, BD)
    gh = load_tile(G + b * sg[0] + head * sg[1], rows, LQ, sg[2], sg[3], D, BD, True) * h
    cols = tl.arange(0, BD)
    for j in tl.static_range(N):
        sw = identity_scale(SCALE, sscale, j, b) * identity_weight(MASK, smask, j, b, rows, LQ)
        weight = sw * beta_of(SHARE, j, b, rows, LQ, MERGE)
        at = PART + ((pid * N + j) * n_bh + bh) * D + cols
        tl.store(at, tl.sum(weight[:, None] * gh, 0), mask=cols < D)
        if MERGE == 2:
            alpha = channel_vector(ALPHA + (j * n_bh + bh) * D, D, BD)
            da = sw * tl.sum(gh * alpha[None, :], 1)
            tl.store(DSHARE + (j * n_bh + bh) * LQ + rows, da, mask=inside)


@triton.jit
def weight_gradient(x, dp, lse, delta, lse_u, got, da, cols, NG, DTYPE: tl.constexpr, ROOT: tl.constexpr,
                    SHARE: tl.constexpr):  # fmt: skip
    """p and the gradient of the unscaled logits; da is the gradient of one head's share, `got`."""
    p = known_weights(x, lse, DTYPE)
    ds = p * (dp - delta[:, None]) / ROOT
    if SHARE:
        u = tl.exp2(x * ROOT - lse_u[:, None])
        counted = tl.where(cols[None, :] < NG, 1.0, 0.0)
        ds += u * (counted - got[:, None]) * da[:, None]
    return p, ds


@triton.jit
def dq_step(q, d_out, K, V, sk, sv, start, count, BIAS, s_bias, NG, lse, delta, lse_u, got, da, dq,
            D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr, ROOT: tl.constexpr, SHARE: tl.constexpr,
            UPCAST: tl.constexpr):  # fmt: skip
    x, cols = logits(q, K, sk, start, count, BIAS, s_bias, D, BD, BLOCK, ROOT, UPCAST)
    v = load_tile(V, cols, count, sv[2], sv[3], D, BD, UPCAST)
    dp = tl.dot(d_out, tl.trans(v), input_precision="ieee")
    _, ds = weight_gradient(x, dp, lse, delta, lse_u, got, da, cols, NG, q.dtype, ROOT, SHARE)
    k = load_tile(K, cols, count, sk[2], sk[3], D, BD, UPCAST)
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit
def add_dq(q, d_out, K, V, sk, sv, count, BIAS, s_bias, NG, lse, delta, lse_u, got, da, dq,
           BLOCK: tl.constexpr,
           D: tl.constexpr, BD: tl.constexpr, ROOT: tl.constexpr, SHARE: tl.constexpr,
           UPCAST: tl.constexpr):  # fmt: skip
    """dq plus one attention's part; d_out is the gradient of its result."""
    d_out = d_out.to(q.dtype)
    for start in range(0, count, BLOCK):
        dq = dq_step(q, d_out, K, V, sk, sv, start, count, BIAS, s_bias, NG, lse, delta, lse_u, got, da, dq,
                     D, BD, BLOCK, ROOT, SHARE, UPCAST)  # fmt: skip
    return dq


@triton.jit
def merge_gradient(g, h, i, dh, s, w, beta, ALPHA, DNUM, at, MERGE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Gradient of i, of h (added to dh), and the tile's part of dscale."""
    sw = s * w
    di = g * sw[:, None]
    term = i
    if MERGE > 0:
        alpha, dnum = channel_vector(ALPHA + at, D, BD)[None, :], channel_vector(DNUM + at, D, BD)[None, :]
        wh = h * w[:, None]
        mixed = beta[:, None] * alpha
        term += mixed * h
        dh += di * mixed + ((i - alpha * h) * w[:, None] - wh * alpha) * dnum
        di += wh * dnum
    return di, dh, tl.sum(tl.sum(g * w[:, None] * term, 1), 0)


@triton.jit(do_not_specialize=["NZ", "NG"])
def rows_kernel(
    Q, KT, VT, KI, VI, STAGE, BIAS, SCALE, MASK, G, HT, DQ, DH, LSE_T, LSE_I, LSE_U, SHARE, ALPHA, DNUM, DSHARE,
    DELTA_T, DELTA_I, GOT, DA, DSCALE,
    sq, skt, svt, ski, svi, sstage, sbank, sbias, sscale, smask, sg, sdq, DIVT, DIVI, LQ, LT, LI, NZ, NG,
    N: tl.constexpr, MERGE: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr, ROOT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, H, B). DSHARE: of `coupling_kernel`. Fills DQ, DH, deltas, DSCALE, and
    GOT and DA: each head's share and its gradient.
    """
    pid, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    bh, n_bh = b * heads + head, heads * tl.num_programs(2).to(tl.int64)
    rows = pid * BM + tl.arange(0, BM)
    inside = rows < LQ
    q = load_tile(Q + b * sq[0] + head * sq[1], rows, LQ, sq[2], sq[3], D, BD, UPCAST)
    g = load_tile(G + b * sg[0] + head * sg[1], rows, LQ, sg[2], sg[3], D, BD, True)
    bias = None
    s_bias = 0
    if BIAS is not None:
        bias = bias_rows(BIAS, sbias, b, head, rows, LQ)
        s_bias = sbias[3]
    lse_t = row_values(LSE_T, bh * LQ + rows, inside)
    kt = text_tensor(KT, skt, DIVT[0], sbank[0], STAGE, sstage, b, head)
    vt = text_tensor(VT, svt, DIVT[1], sbank[1], STAGE, sstage, b, head)
    if MERGE > 0:
        h = load_tile(HT + bh * LQ * D, rows, LQ, D, 1, D, BD, True)
    else:
        h, _, _ = attend_known(q, kt, vt, skt, svt, LT, bias, s_bias, 0, 0, lse_t, lse_t, BT, D, BD, BM, ROOT,
                            False, UPCAST)  # fmt: skip
    dh = g
    dq = tl.zeros([BM, BD], tl.float32)
    for j in tl.static_range(N):
        row = b // DIVI[j]
        k, v = KI[j] + row * ski[j][0] + head * ski[j][1], VI[j] + row * svi[j][0] + head * svi[j][1]
        at = (j * n_bh + bh) * LQ + rows
        lse = row_values(LSE_I, at, inside)
        lse_u = lse
        da = lse
        if MERGE == 2:
            lse_u = row_values(LSE_U, at, inside)
            da = mean_share(DSHARE, j, b, rows, LQ, 4)  # of the sum over heads, since a is the mean of the shares
        i, got, lu = attend_known(q, k, v, ski[j], svi[j], LI[j], None, 0, NZ, NG, lse, lse_u, BI[j], D, BD, BM,
                              ROOT,
                              MERGE == 2, UPCAST)  # fmt: skip
        s, w = identity_scale(SCALE, sscale, j, b), identity_weight(MASK, smask, j, b, rows, LQ)
        beta = w
        if MERGE > 0:
            beta = beta_of(SHARE, j, b, rows, LQ, MERGE)
        di, dh, ds = merge_gradient(g, h, i, dh, s, w, beta, ALPHA, DNUM, (j * n_bh + bh) * D, MERGE, D, BD)
        tl.store(DSCALE + (pid * N + j) * n_bh + bh, ds)
        di = di.to(q.dtype).to(tl.float32)  # as the products take it: delta must match them
        delta = tl.sum(di * i, 1)
        tl.store(DELTA_I + at, delta, mask=inside)
        if MERGE == 2:
            da = da / lu
            tl.store(GOT + at, got, mask=inside)
            tl.store(DA + at, da, mask=inside)
        dq = add_dq(q, di, k, v, ski[j], svi[j], LI[j], None, 0, NG, lse, delta, lse_u, got, da, dq, BI[j],
                    D, BD,
                    ROOT, MERGE == 2, UPCAST)  # fmt: skip
    dh = dh.to(q.dtype).to(tl.float32)
    delta = tl.sum(dh * h, 1)
    tl.store(DELTA_T + bh * LQ + rows, delta, mask=inside)
    if MERGE > 0:
        store_tile(DH + bh * LQ * D, dh, rows, LQ, D, 1, D, BD)
    dq = add_dq(q, dh, kt, vt, skt, svt, LT, bias, s_bias, 0, lse_t, delta, lse_t, delta, delta, dq, BT, D,
                BD, ROOT,
                False, UPCAST)  # fmt: skip
    store_tile(DQ + b * sdq[0] + head * sdq[1], dq, rows, LQ, sdq[2], sdq[3], D, BD)


@triton.jit
def branch_gradient(G, HT, SCALE, MASK, DNUM, sg, sscale, smask, j: tl.constexpr, b, head, heads, bh, n_bh,
                    rows, LQ,
                    IDENTITY: tl.constexpr, MERGE: tl.constexpr, D: tl.constexpr,
                    BD: tl.constexpr):  # fmt: skip
    """Gradient of the attention's result at these rows: G for text, s w g + w h dnum for an identity."""
    d_out = load_tile(G + b * sg[0] + head * sg[1], rows, LQ, sg[2], sg[3], D, BD, True)
    if IDENTITY:
        w = identity_weight(MASK, smask, j, b, rows, LQ)
        d_out *= (identity_scale(SCALE, sscale, j, b) * w)[:, None]
        if MERGE > 0:
            h = load_tile(HT + bh * LQ * D, rows, LQ, D, 1, D, BD, True)
            d_out += h * w[:, None] * channel_vector(DNUM + (j * n_bh + bh) * D, D, BD)[None, :]
    return d_out


@triton.jit(do_not_specialize=["NG", "per_chunk"])
def keys_kernel(
    Q, K, V, STAGE, BIAS, SCALE, MASK, G, HT, LSE, LSE_U, DNUM, DA, DELTA, GOT, DK, DV,
    sq, sk, sv, sstage, sbank, sbias, sscale, smask, sg, DIVK, DIVV, heads, batch, LQ, count, NG, per_chunk,
    J: tl.constexpr, IDENTITY: tl.constexpr, MERGE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr, ROOT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (key blocks, chunks of image tokens, B*H). DK, DV: float32 [chunks, B, H, count, D], parts of
    sums.
    """
    bh = tl.program_id(2).to(tl.int64)
    b, head = bh // heads, bh % heads
    n_bh = tl.num_programs(2).to(tl.int64)
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    at_k = text_tensor(K, sk, DIVK, sbank[0], STAGE, sstage, b, head)  # an identity has no stages
    at_v = text_tensor(V, sv, DIVV, sbank[1], STAGE, sstage, b, head)
    k = load_tile(at_k, cols, count, sk[2], sk[3], D, BD, UPCAST)
    v = load_tile(at_v, cols, count, sv[2], sv[3], D, BD, UPCAST)
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BD], tl.float32)
    first = tl.program_id(1) * per_chunk
    for start in range(first, tl.minimum(first + per_chunk, LQ), BM):
        rows = start + tl.arange(0, BM)
        inside = rows < LQ
        q = load_tile(Q + b * sq[0] + head * sq[1], rows, LQ, sq[2], sq[3], D, BD, UPCAST)
        d_out = branch_gradient(G, HT, SCALE, MASK, DNUM, sg, sscale, smask, J, b, head, heads, bh, n_bh,
                                rows, LQ,
                                IDENTITY, MERGE, D, BD).to(q.dtype)  # fmt: skip
        x = tl.dot(q, tl.trans(k), input_precision="ieee") * (1.4426950408889634 / ROOT)
        keep = cols[None, :] < count
        if BIAS is not None:
            at_bias = bias_rows(BIAS, sbias, b, head, rows, LQ)[:, None] + cols[None, :] * sbias[3]
            x += tl.load(at_bias, mask=keep, other=0.0).to(tl.float32) * 1.4426950408889634
        x = tl.where(keep, x, float("-inf"))
        at = bh * LQ + rows
        lse, delta = row_values(LSE, at, inside), row_values(DELTA, at, inside)
        lse_u, got, da = lse, lse, lse
        if IDENTITY and MERGE == 2:
            lse_u, got = row_values(LSE_U, at, inside), row_values(GOT, at, inside)
            da = row_values(DA, at, inside)
        dp = tl.dot(d_out, tl.trans(v), input_precision="ieee")
        p, ds = weight_gradient(x, dp, lse, delta, lse_u, got, da, cols, NG, q.dtype, ROOT, IDENTITY and MERGE == 2)
        dv = tl.dot(tl.trans(p.to(q.dtype)), d_out, dv, input_precision="ieee")
        dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision="ieee")
    base = (tl.program_id(1) * n_bh + bh) * count * D
    store_tile(DK + base, dk, cols, count, D, 1, D, BD)
    store_tile(DV + base, dv, cols, count, D, 1, D, BD)
