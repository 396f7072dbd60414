"""Launches the backward kernels of `id_attention`."""

from __future__ import annotations

import torch
from torch import Tensor

import triton

from . import fold as fold_kernels
from . import id_attention as fwd
from . import id_attention_bwd as kernels
from . import tuning
from .launch import INTERPRETED, Plan, Stats, new_out, start

FOLD_BLOCK = 1024
TARGET_PROGRAMS = 512  # so many programs keep a GPU of 108 to 148 multiprocessors busy (our choice)


def backward(a, g: Tensor, stats: Stats, *, text_kv: bool = True, id_kv: bool = True):
    """Gradients in the form of `reference_bwd.backward`; None in place of those not asked for.

    Args:
        g: gradient of the output. [B, H, Lq, D], dtype of q
        stats: of `forward_stats`.
    """
    p = Plan(a)
    if a.q.numel() == 0:
        return _nothing(p)
    s = stats
    ht, dnum, dshare = _coupling(p, g, s) if p.merge != fwd.ADD else (None, None, None)
    dq, dh, delta_t, delta_i, shares, dscale = _rows(p, g, s, ht, dnum, dshare)
    none = (None, None)
    dkt, dvt = _keys(p, g if dh is None else dh, s.lse_text, delta_t, None, None) if text_kv else none
    pairs = [none] * p.n
    if id_kv:
        side = dict(HT=ht, DNUM=dnum)
        pairs = [_keys(p, g, s.lse_id[j], delta_i[j], j, side, s, shares) for j in range(p.n)]
    return dq, dkt, dvt, [k for k, _ in pairs], [v for _, v in pairs], dscale


def _nothing(p: Plan):
    a = p.a
    zeros = [torch.zeros_like(t) for t in (a.q, a.k_text, a.v_text)]
    dk, dv = [torch.zeros_like(k) for k in a.k_id], [torch.zeros_like(v) for v in a.v_id]
    return *zeros, dk, dv, p.empty(p.n, p.b).zero_()


def _coupling(p: Plan, g: Tensor, s: Stats) -> tuple[Tensor, Tensor, Tensor | None]:
    """h, the gradient of num (of -den: times alpha) [n, B, H, D], and each head's part of that of a,
    [n, B, H, Lq].
    """
    t = p.tile("coupling")
    tiles = triton.cdiv(p.lq, t.rows)
    c = p.common() | p.key_blocks(t.keys)
    take = "Q KT VT STAGE BIAS SCALE MASK sq skt svt sstage sbank sbias sscale smask DIVT LQ LT N MERGE"
    take += " BT D BD ROOT UPCAST"
    ht = p.empty(p.b, p.h, p.lq, p.d, dtype=p.between)
    part = p.empty(tiles, p.n, p.b, p.h, p.d)
    dshare = p.empty(p.n, p.b, p.h, p.lq) if p.merge == fwd.ORTHO_V2 else None
    start(
        kernels.coupling_kernel, (tiles, p.h, p.b), dict(num_warps=t.warps, num_stages=t.stages),
        **{k: c[k] for k in take.split()}, G=g, HT=ht, LSE_T=s.lse_text, SHARE=s.share, ALPHA=s.alpha,
        PART=part,
        DSHARE=dshare, sg=g.stride(), BM=t.rows,
    )  # fmt: skip
    dnum = torch.empty_like(s.den)
    block = tuning.padded(p.d) if not INTERPRETED else triton.next_power_of_2(dnum.numel())
    start(
        fold_kernels.quotient_kernel, (triton.cdiv(dnum.numel(), block),), dict(num_warps=4), PART=part, DEN=s.den,
        OUT=dnum, tiles=tiles, count=dnum.numel(), BT=16, BLOCK=block,
    )  # fmt: skip
    return ht, dnum, dshare


def _rows(p: Plan, g: Tensor, s: Stats, ht: Tensor | None, dnum: Tensor | None, dshare: Tensor | None):
    """dq, gradient of h (None for add: it is g), deltas of text and identities, (share, its gradient), dscale."""
    t = p.tile("rows")
    tiles = triton.cdiv(p.lq, t.rows)
    two, v2 = p.merge != fwd.ADD, p.merge == fwd.ORTHO_V2
    dq, dh = new_out(p.a.q), p.empty(p.b, p.h, p.lq, p.d, dtype=p.a.q.dtype) if two else None
    delta_t = p.empty(p.b, p.h, p.lq)
    delta_i = p.empty(p.n, p.b, p.h, p.lq)
    got, da = (p.empty(p.n, p.b, p.h, p.lq) if v2 else None for _ in range(2))
    dscale = p.empty(tiles, p.n, p.b, p.h)
    start(
        kernels.rows_kernel, (tiles, p.h, p.b), dict(num_warps=t.warps, num_stages=t.stages),
        **p.common(), **p.key_blocks(t.keys), G=g, HT=ht, DQ=dq, DH=dh, LSE_T=s.lse_text, LSE_I=s.lse_id,
        LSE_U=s.lse_unscaled, SHARE=s.share, ALPHA=s.alpha, DNUM=dnum, DSHARE=dshare, DELTA_T=delta_t,
        DELTA_I=delta_i, GOT=got, DA=da, DSCALE=dscale, sg=g.stride(), sdq=dq.stride(), BM=t.rows,
    )  # fmt: skip
    return dq, dh, delta_t, delta_i, (got, da), dscale.sum((0, 3))


def _chunks(p: Plan, blocks: int, rows: int) -> tuple[int, int]:
    """(chunks of image tokens, tokens per chunk): enough programs for the GPU, whole tiles each."""
    tiles = triton.cdiv(p.lq, rows)
    wanted = 1 if INTERPRETED else max(1, TARGET_PROGRAMS // (blocks * p.b * p.h))
    per = triton.cdiv(tiles, min(wanted, tiles))
    return triton.cdiv(tiles, per), per * rows


def _keys(p: Plan, g, lse, delta, j, side, s=None, shares=None) -> tuple[Tensor, Tensor]:
    """dk, dv of the text (j None; g is the gradient of h) or of identity j."""
    a, t = p.a, p.tile("keys")
    k, v = (a.k_text, a.v_text) if j is None else (a.k_id[j], a.v_id[j])
    count = k.shape[-2]
    if count == 0:
        return torch.zeros_like(k), torch.zeros_like(v)
    block = min(t.keys, tuning.padded(count))
    blocks = triton.cdiv(count, block)
    chunks, per = _chunks(p, blocks, t.rows)
    part = p.empty(2, chunks, p.b, p.h, count, p.d)
    c = p.common()
    v2 = j is not None and p.merge == fwd.ORTHO_V2
    only_text = "STAGE BIAS sstage sbank sbias".split()
    only_ids = "SCALE MASK sscale smask".split()
    ident = {name: None for name in only_text} | {name: c[name] for name in only_ids} | dict(sbank=(0, 0))
    text = {name: c[name] for name in only_text} | {name: None for name in only_ids}
    start(
        kernels.keys_kernel, (blocks, chunks, p.b * p.h), dict(num_warps=t.warps, num_stages=t.stages),
        **(text if j is None else ident), **(side or dict(HT=None, DNUM=None)),
        Q=a.q, K=k, V=v, G=g, LSE=lse, LSE_U=s.lse_unscaled[j] if v2 else None,
        DA=shares[1][j] if v2 else None, DELTA=delta, GOT=shares[0][j] if v2 else None, DK=part[0], DV=part[1],
        sq=a.q.stride(), sk=k.stride()[-4:], sv=v.stride()[-4:], sg=g.stride(), DIVK=p.b // k.shape[-4],
        DIVV=p.b // v.shape[-4], heads=p.h, batch=p.b, LQ=p.lq, count=count, NG=a.num_global, per_chunk=per,
        J=j or 0, IDENTITY=j is not None, MERGE=p.merge, D=p.d, BD=p.bd, BM=t.rows, BN=block,
        ROOT=float(p.d) ** 0.5, UPCAST=p.upcast,
    )  # fmt: skip
    stage = text if j is None else ident
    if k.shape == v.shape:
        return fold(part, (k, v), stage["STAGE"], stage["sstage"])
    return tuple(fold(x[None], (t,), stage["STAGE"], stage["sstage"])[0] for x, t in zip(part, (k, v)))


def fold(
    part: Tensor, likes: tuple[Tensor, ...], stage: Tensor | None = None, sstage: tuple[int, int] | None = None
) -> tuple[Tensor, ...]:
    """Sum over chunks and over the samples that shared a row, in the dtype of `likes`, by one kernel.

    Args:
        part: float32 [1 or 2, chunks, B, H, L, D], one for each of `likes`.
        likes: one or two of the shape [Bi, H, L, D], or banks [S, Bi, H, L, D].
        stage: which entry of the bank each sample read. int32; the rest of the bank becomes 0.
        sstage: stride of `stage` (0: one for all) and S.
    """
    _, chunks, b = part.shape[:3]
    size, rows = part[0, 0, 0].numel(), likes[0].shape[-4]
    outs = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in likes]
    block = FOLD_BLOCK if not INTERPRETED else triton.next_power_of_2(size)
    start(
        fold_kernels.fold_kernel, (triton.cdiv(size, block), outs[0].numel() // size, len(outs)), dict(num_warps=4),
        PART=part, OUT=outs[0], OUT2=outs[1] if len(outs) > 1 else None, STAGE=stage, sstage=sstage, size=size,
        chunks=chunks, batch=b, DIV=b // rows, ROWS=rows, BLOCK=block,
    )  # fmt: skip
    return tuple(outs)
