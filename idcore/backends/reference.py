"""`id_attention` in plain PyTorch: any device, any float dtype, refuses nothing; the truth of the tests.

Forward and backward are written out from the formulas (PuLID's published attention modes; see
docs/conventions.md). Arithmetic is float32, or float64 where q is float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .call import Args, Call

NAME = "reference"
DIFFERENTIABLE = True


def why_not(call: Call) -> list[str]:
    """Nothing is refused."""
    return []


def wide(t: Tensor) -> Tensor:
    """float32 copy of 16-bit tensors; float32 and float64 as they are."""
    return t if t.dtype in (torch.float32, torch.float64) else t.float()


def rows(t: Tensor, batch: int) -> Tensor:
    """Give every sample b its row b * Bi // B. [Bi, ...] -> [B, ...]"""
    if t.shape[0] == batch:
        return t
    return t.expand(batch, *t.shape[1:]) if t.shape[0] == 1 else t.repeat_interleave(batch // t.shape[0], 0)


def text_rows(a: Args, t: Tensor) -> Tensor:
    """The text's keys or values of every sample, of its stage where `t` is a bank. [B, H, Lt, D]"""
    b = a.q.shape[0]
    if a.stage is None:
        return rows(t, b)
    stage = a.stage.long().clamp(0, t.shape[0] - 1)
    if stage.numel() == 1:
        return rows(t.index_select(0, stage)[0], b)
    return t[stage, batch_rows(a, t.shape[1])]


def batch_rows(a: Args, count: int) -> Tensor:
    """Which of `count` rows each sample reads. int64 [B]"""
    b = a.q.shape[0]
    return torch.arange(b, device=a.q.device) * count // b


def zero_softmax(logits: Tensor, num_zero: int) -> tuple[Tensor, Tensor]:
    """Softmax over the last axis as if `num_zero` logits of 0 stood behind it, in closed form.

    Returns:
        (probabilities [..., Li] without the zero tokens' own, probability of one zero token [..., 1])
    """
    if logits.shape[-1] == 0:
        return logits, logits.new_full((*logits.shape[:-1], 1), 1.0 / num_zero)
    top = logits.amax(-1, keepdim=True)
    if num_zero:
        top = top.clamp_min(0)
    top = top.detach()
    e = (logits - top).exp()
    zero = (-top).exp()
    total = e.sum(-1, keepdim=True) + num_zero * zero
    return e / total, zero / total


def text_attention(a: Args) -> tuple[Tensor, Tensor]:
    """h = softmax(q k^T / sqrt(D) + bias) v and its probabilities. [B, H, Lq, D], [B, H, Lq, Lt]"""
    k, v = wide(text_rows(a, a.k_text)), wide(text_rows(a, a.v_text))
    logits = wide(a.q) @ k.transpose(-1, -2) * a.q.shape[-1] ** -0.5
    if a.text_bias is not None:
        logits = logits + wide(a.text_bias)
    p = logits.softmax(-1)
    return p @ v, p


def global_share(a: Args, raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ortho_v2's a: mean over heads of what the first `num_global` tokens get of the unscaled softmax.

    Args:
        raw: unscaled logits q k^T. [B, H, Lq, Li]

    Returns:
        a [B, 1, Lq, 1]; the share per head f [B, H, Lq, 1]; unscaled probabilities [B, H, Lq, Li]
    """
    p, zero = zero_softmax(raw, a.num_zero)
    li = raw.shape[-1]
    share = p[..., : a.num_global].sum(-1, keepdim=True)
    counted_zeros = min(max(a.num_global - li, 0), a.num_zero)
    if counted_zeros:
        share = share + counted_zeros * zero
    return share.mean(1, keepdim=True), share, p


def ratio(h: Tensor, i: Tensor, w: Tensor | None) -> tuple[Tensor, Tensor]:
    """alpha = sum_s w h i / sum_s w h h per sample and channel, 0 where the denominator is 0. [B, H, 1, D] twice"""
    wh = h if w is None else w * h
    den = (wh * h).sum(-2, keepdim=True)
    num = (wh * i).sum(-2, keepdim=True)
    safe = torch.where(den == 0, torch.ones_like(den), den)
    return torch.where(den == 0, torch.zeros_like(num), num / safe), den


def branch(a: Args, j: int) -> tuple[Tensor, Tensor, Tensor]:
    """Identity j: its attention i [B, H, Lq, D], probabilities and unscaled logits [B, H, Lq, Li]."""
    b = a.q.shape[0]
    k, v = rows(wide(a.k_id[j]), b), rows(wide(a.v_id[j]), b)
    raw = wide(a.q) @ k.transpose(-1, -2)
    p, _ = zero_softmax(raw * a.q.shape[-1] ** -0.5, a.num_zero)
    return p @ v, p, raw


def weight(a: Args, j: int) -> Tensor | None:
    """Region mask of identity j. [1 or B, 1, Lq, 1] or None"""
    return None if a.mask is None else a.mask[j][:, None, :, None]


def scale_of(a: Args, j: int) -> float | Tensor:
    """float, or [B, 1, 1, 1]"""
    return a.scale[j][:, None, None, None] if isinstance(a.scale, Tensor) else a.scale[j]


def combine(a: Args, h: Tensor, parts: list[tuple[Tensor, Tensor | None]]) -> Tensor:
    """Add identity branches to the text attention h by `a.merge`.

    Args:
        h: text attention. [B, H, Lq, D]
        parts: per identity (i [B, H, Lq, D], a [B, 1, Lq, 1] for ortho_v2 else None).
    """
    out = h
    for j, (i, share) in enumerate(parts):
        w = weight(a, j)
        delta = i
        if a.merge != "add":
            alpha, _ = ratio(h, i, w)
            beta = -1.0 if share is None else share - 1.0
            delta = i + beta * alpha * h
        out = out + scale_of(a, j) * (delta if w is None else w * delta)
    return out


def store(result: Tensor, q: Tensor, out: Tensor | None) -> Tensor:
    """Cast to q's dtype in memory order B, Lq, H, D, or write into `out`."""
    if out is not None:
        return out.copy_(result)
    return result.transpose(1, 2).to(q.dtype).contiguous().transpose(1, 2)


def forward(a: Args, out: Tensor | None = None) -> Tensor:
    """[B, H, Lq, D], dtype of q."""
    h, _ = text_attention(a)
    parts = []
    for j in range(len(a.k_id)):
        i, _, raw = branch(a, j)
        parts.append((i, global_share(a, raw)[0] if a.merge == "ortho_v2" else None))
    return store(combine(a, h, parts), a.q, out)
