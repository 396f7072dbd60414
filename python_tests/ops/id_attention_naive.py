"""Deliberately naive float64 truth for `id_attention`: loops, concatenated zero tokens, no sharing with the package."""

import math

import torch


def _softmax_rows(logits):
    e = [math.exp(x - max(logits)) for x in logits]
    return [x / sum(e) for x in e]


def _one_attention(q, k, v, scaled=True):
    """q [D], k [L, D], v [L, D] as float64 tensors -> (value [D], probabilities list)"""
    c = 1 / math.sqrt(q.numel()) if scaled else 1.0
    p = _softmax_rows([float((q * row).sum()) * c for row in k])
    return sum(w * row for w, row in zip(p, v)), p


def naive(q, k_text, v_text, k_id, v_id, scale, mask=None, merge="add", num_zero=0, num_global=5):
    """All arguments as in the op; k_id, v_id lists; scale [n][B]; mask list of None or [Bm, Lq]. float64 result."""
    q, k_text, v_text = q.double(), k_text.double(), v_text.double()
    b, n_heads, lq, d = q.shape
    h = torch.zeros(b, n_heads, lq, d, dtype=torch.float64)
    for bi in range(b):
        row = bi * k_text.shape[0] // b
        row_v = bi * v_text.shape[0] // b
        for hi in range(n_heads):
            for s in range(lq):
                h[bi, hi, s], _ = _one_attention(q[bi, hi, s], k_text[row, hi], v_text[row_v, hi])
    out = h.clone()
    for j in range(len(k_id)):
        i, share = torch.zeros_like(h), torch.zeros(b, lq, dtype=torch.float64)
        for bi in range(b):
            row = bi * k_id[j].shape[0] // b
            for hi in range(n_heads):
                zeros = torch.zeros(num_zero, d, dtype=torch.float64)
                k = torch.cat([k_id[j][row, hi].double(), zeros])
                v = torch.cat([v_id[j][row, hi].double(), zeros])
                for s in range(lq):
                    i[bi, hi, s], _ = _one_attention(q[bi, hi, s], k, v)
                    _, p = _one_attention(q[bi, hi, s], k, v, scaled=False)
                    share[bi, s] += sum(p[:num_global]) / n_heads
        for bi in range(b):
            w = torch.ones(lq, dtype=torch.float64)
            if mask is not None and mask[j] is not None:
                w = mask[j][bi if mask[j].shape[0] == b else 0].double()
            for hi in range(n_heads):
                for c in range(d):
                    hc, ic = h[bi, hi, :, c], i[bi, hi, :, c]
                    den = float((w * hc * hc).sum())
                    alpha = float((w * hc * ic).sum()) / den if den else 0.0
                    beta = {"add": 0.0, "ortho": -1.0}.get(merge, share[bi] - 1.0)
                    out[bi, hi, :, c] += scale[j][bi] * w * (ic + beta * alpha * hc)
    return out
