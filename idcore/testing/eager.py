"""PuLID's identity attention as an ordinary PyTorch attention processor computes it: the yardstick of tests and times.

Zero tokens are concatenated to K and V, the sharing of ortho_v2 materialises its attention map in the model's dtype,
the merge is float32 and cast back, as in the published processor. K and V come in projected.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def _tokens(t: Tensor) -> Tensor:
    """[B, H, L, D] -> [B, L, H * D]"""
    return t.transpose(1, 2).flatten(2)


def _rows(t: Tensor, batch: int) -> Tensor:
    return t if t.shape[0] == batch else t.repeat_interleave(batch // t.shape[0], 0)


def _picked(t: Tensor, stage: Tensor | None, batch: int) -> Tensor:
    """Rows of each sample; with a stage those of its entry of the bank."""
    if stage is None:
        return _rows(t, batch)
    row = torch.arange(batch, device=t.device) * t.shape[1] // max(batch, 1)
    return t[stage.expand(batch).long(), row]


def _with_zeros(t: Tensor, count: int) -> Tensor:
    return t if count == 0 else torch.cat([t, t.new_zeros(t.shape[0], t.shape[1], count, t.shape[3])], 2)


def _share(q: Tensor, k: Tensor, num_global: int) -> Tensor:
    """a: what the first tokens get of the softmax of unscaled logits, mean over heads. [B, Lq, 1]"""
    scores = (q @ k.transpose(-1, -2)).softmax(-1)
    return scores[..., :num_global].sum(-1).mean(1).unsqueeze(-1)


def _projection(h: Tensor, i: Tensor, w: Tensor | None) -> Tensor:
    wh = h if w is None else w * h
    den = (wh * h).sum(-2, keepdim=True)
    safe = torch.where(den == 0, torch.ones_like(den), den)  # before the division, or its gradient is 0 / 0
    return torch.where(den == 0, torch.zeros_like(den), (wh * i).sum(-2, keepdim=True) / safe) * h


def eager_id_attention(
    q: Tensor, k_text: Tensor, v_text: Tensor, k_id: Sequence[Tensor], v_id: Sequence[Tensor], *,
    id_scale: Sequence[float] | Tensor, id_mask: Tensor | None = None, merge: str = "add", num_zero: int = 0,
    num_global: int = 5, text_bias: Tensor | None = None, stage: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The operator of `idcore.ops.id_attention`, unfused.

    Args:
        q: [B, H, Lq, D]; K and V as for `id_attention`, `k_id` and `v_id` as sequences.
        id_scale: n floats, or a tensor [n, B].
        id_mask: None or [n, 1 or B, Lq].
        stage: of the bank k_text, v_text [S, Bt, H, Lt, D]; int [1] or [B].

    Returns:
        [B, H, Lq, D], dtype of q.
    """
    b, heads, lq, d = q.shape
    bias = None if text_bias is None else text_bias.to(q.dtype)
    k_text, v_text = _picked(k_text, stage, b), _picked(v_text, stage, b)
    h = _tokens(F.scaled_dot_product_attention(q, k_text, v_text, attn_mask=bias))
    out = h
    for j, (k, v) in enumerate(zip(k_id, v_id, strict=True)):
        k, v = _with_zeros(_rows(k, b), num_zero), _with_zeros(_rows(v, b), num_zero)
        i = _tokens(F.scaled_dot_product_attention(q, k, v))
        s = id_scale[j][:, None, None] if isinstance(id_scale, Tensor) else id_scale[j]
        w = None if id_mask is None else id_mask[j][:, :, None]
        delta = i
        if merge != "add":
            wide_h, wide_i = h.float(), i.float()
            share = _share(q, k, num_global).float() - 1.0 if merge == "ortho_v2" else -1.0
            delta = wide_i + share * _projection(wide_h, wide_i, w)
        delta = delta if w is None else w * delta
        out = (out + s * delta).to(q.dtype)
    return out.view(b, lq, heads, d).transpose(1, 2)


def eager_semantic_alignment(q: Tensor, k: Tensor) -> Tensor:
    """softmax over image tokens of k q^T / sqrt D, times q, the map stored in the model's dtype. [B, H, Lt, D]"""
    return (_rows(k, q.shape[0]) @ q.mT * q.shape[-1] ** -0.5).softmax(-1) @ q


def eager_token_attention_loss(q: Tensor, k: Tensor, k_ref: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Mean squared distance of two attention maps, both stored in the model's dtype, the distance float32. []"""
    b, factor = q.shape[0], q.shape[-1] ** -0.5
    p = (q @ _rows(k, b).mT * factor).softmax(-1)
    with torch.no_grad():
        target = (q @ _rows(k_ref, b).mT * factor).softmax(-1)
    wide = torch.promote_types(q.dtype, torch.float32)
    square = (p.to(wide) - target.to(wide)).square()
    if tokens is None:
        return square.mean()
    w = tokens.to(wide).expand(b, k.shape[2])[:, None, None, :]
    return (w * square).sum() / (w.sum() * q.shape[1] * q.shape[2])


def eager_stage_tokens(embeddings: Tensor, tokens: Tensor, positions: Tensor, stage: Tensor | None = None) -> Tensor:
    """One copy of the embeddings per stage, then indexed assignment; `stage` picks afterwards."""
    b, count = embeddings.shape[0], tokens.shape[2]
    out = embeddings.expand(tokens.shape[0], *embeddings.shape).clone()
    own = tokens.repeat_interleave(b // tokens.shape[1], 1).to(embeddings.dtype)
    places = positions.expand(b, count).long()
    sample, which = (places >= 0).nonzero(as_tuple=True)
    out[:, sample, places[sample, which]] = own[:, sample, which]
    if stage is None:
        return out
    return out[stage.expand(b).long(), torch.arange(b, device=out.device)]
