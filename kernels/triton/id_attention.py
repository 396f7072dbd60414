"""Forward of `id_attention`: one pass for "add", a second, elementwise pass for "ortho" and "ortho_v2".

The per-channel ratio alpha of ortho needs sums over all image tokens, hence the second pass. The first
one stores sum_j s_j w_j i_j, h beside it, per-tile sums of w h i and w h h (summed in a fixed order later, so
that the result is the same in every run), and for ortho_v2 each head's share of the first tokens. What stands
between the passes is in the call's dtype (the sum in the output itself), and in float32 for few rows, where the
terms may cancel.

Letters as in `idcore.ops.id_attention`; n identities come as tuples of pointers, so nothing
is copied or padded.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import attend, identity_scale, identity_weight, load_tile, store_tile, text_tensor

ADD, ORTHO, ORTHO_V2 = 0, 1, 2


@triton.jit
def store_sums(PART, j: tl.constexpr, N: tl.constexpr, h, i, w, pid, bh, n_bh, D: tl.constexpr, BD: tl.constexpr):
    """This tile's sum over rows of w h i and w h h, into PART [tiles, N, 2, B*H, D]."""
    cols = tl.arange(0, BD)
    wh = h * w[:, None]
    at = PART + (((pid * N + j) * 2) * n_bh + bh) * D + cols
    tl.store(at, tl.sum(wh * i, 0), mask=cols < D)
    tl.store(at + n_bh * D, tl.sum(wh * h, 0), mask=cols < D)


@triton.jit(do_not_specialize=["NZ", "NG"])
def forward_kernel(
    Q, KT, VT, KI, VI, STAGE, BIAS, SCALE, MASK, OUT, HT, SHARE, PART, LSE_T, LSE_I, LSE_U,
    sq, skt, svt, ski, svi, sstage, sbank, sbias, sscale, smask, so, sh, DIVT, DIVI, LQ, LT, LI, NZ, NG,
    N: tl.constexpr, MERGE: tl.constexpr, TT: tl.constexpr, TI: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr, ROOT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(LQ / BM), H, B). HT, SHARE, PART for the second pass of ortho; LSE_*: statistics, or None."""
    pid, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    bh, n_bh = b * tl.num_programs(1) + head, tl.num_programs(1) * tl.num_programs(2).to(tl.int64)
    rows = pid * BM + tl.arange(0, BM)
    inside = rows < LQ
    q = load_tile(Q + b * sq[0] + head * sq[1], rows, LQ, sq[2], sq[3], D, BD, UPCAST)
    bias = None
    s_bias = 0
    if BIAS is not None:
        bias = BIAS + b * sbias[0] + head * sbias[1] + tl.where(inside, rows, 0) * sbias[2]
        s_bias = sbias[3]
    kt = text_tensor(KT, skt, DIVT[0], sbank[0], STAGE, sstage, b, head)
    vt = text_tensor(VT, svt, DIVT[1], sbank[1], STAGE, sstage, b, head)
    h, lse, _, _ = attend(q, kt, vt, skt, svt, LT, bias, s_bias, 0, 0, TT[0], TT[1], TT[2], D, BD, BM, ROOT, False,
                          UPCAST)  # fmt: skip
    if LSE_T is not None:
        tl.store(LSE_T + bh * LQ + rows, lse, mask=inside)
    if HT is not None:
        store_tile(HT + b * sh[0] + head * sh[1], h, rows, LQ, sh[2], sh[3], D, BD)
    x = h
    if MERGE > 0:
        x = tl.zeros_like(h)
    for j in tl.static_range(N):
        row = b // DIVI[j]
        i, lse, lse_u, share = attend(
            q, KI[j] + row * ski[j][0] + head * ski[j][1], VI[j] + row * svi[j][0] + head * svi[j][1],
            ski[j], svi[j], LI[j], None, 0, NZ, NG, TI[j][0], TI[j][1], TI[j][2], D, BD, BM, ROOT, MERGE == 2, UPCAST,
        )  # fmt: skip
        at = (j * n_bh + bh) * LQ + rows
        if LSE_I is not None:
            tl.store(LSE_I + at, lse, mask=inside)
            if MERGE == 2:
                tl.store(LSE_U + at, lse_u, mask=inside)
        if MERGE == 2:
            tl.store(SHARE + at, share, mask=inside)
        w = identity_weight(MASK, smask, j, b, rows, LQ)
        if MERGE > 0:
            store_sums(PART, j, N, h, i, w, pid, bh, n_bh, D, BD)
        x += (identity_scale(SCALE, sscale, j, b) * w)[:, None] * i
    store_tile(OUT + b * so[0] + head * so[1], x, rows, LQ, so[2], so[3], D, BD)


@triton.jit
def ratio(PART, tiles, j: tl.constexpr, N: tl.constexpr, bh, n_bh, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr):
    """alpha of identity j (0 where the denominator is 0) and its denominator, both [BD]; a fixed order of adding."""
    cols = tl.arange(0, BD)
    num = tl.zeros([BT, BD], tl.float32)
    den = tl.zeros([BT, BD], tl.float32)
    for first in range(0, tiles, BT):
        t = first + tl.arange(0, BT)
        at = PART + (((t * N + j) * 2) * n_bh + bh)[:, None] * D + cols[None, :]
        keep = (t[:, None] < tiles) & (cols[None, :] < D)
        num += tl.load(at, mask=keep, other=0.0)
        den += tl.load(at + n_bh * D, mask=keep, other=0.0)
    top, bottom = tl.sum(num, 0), tl.sum(den, 0)
    return tl.where(bottom == 0.0, 0.0, top / tl.where(bottom == 0.0, 1.0, bottom)), bottom


@triton.jit
def mean_share(SHARE, j: tl.constexpr, b, rows, LQ, BH: tl.constexpr):
    """ortho_v2's a: the mean over heads of the shares stored by the first pass. float32 [rows]"""
    heads = tl.num_programs(1)
    total = tl.zeros_like(rows).to(tl.float32)
    for first in range(0, heads, BH):
        h = first + tl.arange(0, BH)
        at = ((j * tl.num_programs(2) + b) * heads + h)[:, None] * LQ + rows[None, :]
        keep = (h[:, None] < heads) & (rows[None, :] < LQ)
        total += tl.sum(tl.load(SHARE + at, mask=keep, other=0.0), 0)
    return total / heads


@triton.jit
def merge_kernel(
    OUT, IT, HT, SHARE, PART, SCALE, MASK, MEAN, ALPHA, DEN, so, si, sh, sscale, smask, LQ, tiles,
    N: tl.constexpr, MERGE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(LQ / BM), H, B). OUT = IT + (1 + sum_j s_j w_j beta_j alpha_j) h, beta = -1 or a - 1 (ortho_v2).

    MEAN [n, B, LQ], ALPHA and DEN [n, B, H, D] receive a, alpha and its denominator, or are None.
    """
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    bh, n_bh = b * tl.num_programs(1) + head, tl.num_programs(1) * tl.num_programs(2).to(tl.int64)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    factor = tl.full([BM, BD], 1.0, tl.float32)
    for j in tl.static_range(N):
        alpha, den = ratio(PART, tiles, j, N, bh, n_bh, D, BD, BT)
        if ALPHA is not None:
            cols = tl.arange(0, BD)
            at = (j * n_bh + bh) * D + cols
            first = cols < tl.where(tl.program_id(0) == 0, D, 0)  # one program of the row stores
            tl.store(ALPHA + at, alpha, mask=first)
            tl.store(DEN + at, den, mask=first)
        weight = identity_scale(SCALE, sscale, j, b) * identity_weight(MASK, smask, j, b, rows, LQ)
        if MERGE == 2:
            share = mean_share(SHARE, j, b, rows, LQ, BH)
            if MEAN is not None:
                tl.store(MEAN + (j * tl.num_programs(2) + b) * LQ + rows, share, mask=rows < tl.where(head == 0, LQ, 0))
            weight *= share - 1.0
        else:
            weight = -weight
        factor += weight[:, None] * alpha[None, :]
    h = load_tile(HT + b * sh[0] + head * sh[1], rows, LQ, sh[2], sh[3], D, BD, True)
    i = load_tile(IT + b * si[0] + head * si[1], rows, LQ, si[2], si[3], D, BD, True)
    store_tile(OUT + b * so[0] + head * so[1], i + factor * h, rows, LQ, so[2], so[3], D, BD)
