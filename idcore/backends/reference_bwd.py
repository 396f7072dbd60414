"""Closed-form gradient of `id_attention` in plain PyTorch; used where a backend brings only its forward.

Derivation: with g the output's gradient, w the mask, s the scale, and beta = 0, -1 or a - 1 for add, ortho, ortho_v2,
    out = h + sum_j s w (i_j + beta_j alpha_j h),  alpha_j = num_j / den,  num_j = sum_s w h i_j,  den = sum_s w h h,
the product rule gives dh and di_j; then two softmax gradients (scaled for the values, unscaled for a).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference as ref
from .call import Args


def _fold(t: Tensor, batch: int) -> Tensor:
    """Sum the gradients of samples that shared one row. [B, ...] -> [batch, ...]"""
    return t if t.shape[0] == batch else t.reshape(batch, t.shape[0] // batch, *t.shape[1:]).sum(1)


def _fold_text(a: Args, t: Tensor, like: Tensor) -> Tensor:
    """The gradient of the text's keys or values from that of each sample; zero for stages that nobody picked."""
    if a.stage is None:
        return _fold(t, like.shape[0]).to(like.dtype)
    stage = a.stage.long().clamp(0, like.shape[0] - 1).expand(a.q.shape[0])
    bank = t.new_zeros(like.shape)
    return bank.index_put_((stage, ref.batch_rows(a, like.shape[1])), t, accumulate=True).to(like.dtype)


def _softmax_bwd(p: Tensor, dp: Tensor) -> Tensor:
    return p * (dp - (p * dp).sum(-1, keepdim=True))


def _merge_bwd(a: Args, j: int, g: Tensor, h: Tensor, i: Tensor, share: Tensor | None):
    """Gradients of one identity's term w.r.t. h, i, the share a, and the scale [B]."""
    w, s = ref.weight(a, j), ref.scale_of(a, j)
    wg = g if w is None else w * g
    gs = s * wg
    if a.merge == "add":
        return torch.zeros_like(h), gs, None, (wg * i).sum((1, 2, 3))
    alpha, den = ref.ratio(h, i, w)
    beta = -1.0 if share is None else share - 1.0
    dscale = (wg * (i + beta * alpha * h)).sum((1, 2, 3))
    dalpha = (gs * beta * h).sum(-2, keepdim=True)
    dshare = None if share is None else (gs * alpha * h).sum((1, 3), keepdim=True)
    safe = torch.where(den == 0, torch.ones_like(den), den)
    dnum = torch.where(den == 0, torch.zeros_like(den), dalpha / safe)
    dden = -dnum * alpha
    wh = h if w is None else w * h
    wi = i if w is None else w * i
    di = gs + wh * dnum
    dh = gs * beta * alpha + wi * dnum + 2.0 * wh * dden
    return dh, di, dshare, dscale


def _branch_bwd(a: Args, j: int, di: Tensor, dshare: Tensor | None, p: Tensor, raw: Tensor):
    """dq, dk, dv of one identity's attention."""
    b, n_heads, _, d = a.q.shape
    k, v = ref.rows(ref.wide(a.k_id[j]), b), ref.rows(ref.wide(a.v_id[j]), b)
    draw = _softmax_bwd(p, di @ v.transpose(-1, -2)) * d**-0.5
    if dshare is not None:
        _, f, u = ref.global_share(a, raw)
        counted = torch.zeros(raw.shape[-1], device=raw.device, dtype=raw.dtype)
        counted[: a.num_global] = 1.0
        draw = draw + u * (counted - f) * (dshare / n_heads)
    dk = _fold(draw.transpose(-1, -2) @ ref.wide(a.q), a.k_id[j].shape[0])
    dv = _fold(p.transpose(-1, -2) @ di, a.v_id[j].shape[0])
    return draw @ k, dk, dv


def backward(a: Args, g: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor], Tensor]:
    """Gradients w.r.t. q, k_text, v_text, k_id, v_id (in their dtypes) and the scale (float32 [n, B]).

    Args:
        g: gradient of the output. [B, H, Lq, D]
    """
    b, d = a.q.shape[0], a.q.shape[-1]
    g = ref.wide(g)
    h, p_text = ref.text_attention(a)
    dh, dq = g.clone(), torch.zeros_like(h)
    dks, dvs, dscales = [], [], []
    for j in range(len(a.k_id)):
        i, p, raw = ref.branch(a, j)
        share = ref.global_share(a, raw)[0] if a.merge == "ortho_v2" else None
        dh_j, di, dshare, dscale = _merge_bwd(a, j, g, h, i, share)
        dh = dh + dh_j
        dq_j, dk, dv = _branch_bwd(a, j, di, dshare, p, raw)
        dq = dq + dq_j
        dks.append(dk.to(a.k_id[j].dtype))
        dvs.append(dv.to(a.v_id[j].dtype))
        dscales.append(dscale.float())
    k, v = ref.wide(ref.text_rows(a, a.k_text)), ref.wide(ref.text_rows(a, a.v_text))
    dlogits = _softmax_bwd(p_text, dh @ v.transpose(-1, -2)) * d**-0.5
    dq = dq + dlogits @ k
    dk_text = _fold_text(a, dlogits.transpose(-1, -2) @ ref.wide(a.q), a.k_text)
    dv_text = _fold_text(a, p_text.transpose(-1, -2) @ dh, a.v_text)
    dscale = torch.stack(dscales) if dscales else a.q.new_zeros((0, b), dtype=torch.float32)
    return dq.to(a.q.dtype), dk_text, dv_text, dks, dvs, dscale
