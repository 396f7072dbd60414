"""A deliberately plain float64 computation of text + identity attention, for comparison."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny models run faster on one thread; import this fixture where they are many."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def close(ours, truth, tolerance=2e-5):
    error = (ours - truth).abs().max().item() / truth.abs().max().item()
    assert error < tolerance, f"relative error {error:.2e}"


def attention(q, k, v, heads, scaled=True):
    """[B, L, C] in, ([B, Lq, C], probabilities [B, H, Lq, Lk]) out; one head and one sample at a time."""
    b, lq, c = q.shape
    d = c // heads
    out = torch.zeros(b, lq, c, dtype=torch.float64)
    probs = torch.zeros(b, heads, lq, k.shape[1], dtype=torch.float64)
    for i in range(b):
        for h in range(heads):
            part = slice(h * d, (h + 1) * d)
            logits = q[i, :, part].double() @ k[i, :, part].double().T
            p = torch.softmax(logits / d**0.5 if scaled else logits, dim=-1)
            probs[i, h] = p
            out[i, :, part] = p @ v[i, :, part].double()
    return out, probs


def delta(q, h, k, v, heads, merge, num_zero, num_global, mask):
    """What one identity adds to h at scale 1. k, v [B, Li, C]; mask [B, Lq] or None"""
    zeros = torch.zeros(k.shape[0], num_zero, k.shape[2], dtype=k.dtype)
    k, v = torch.cat([k, zeros], 1), torch.cat([v, zeros], 1)
    i, _ = attention(q, k, v, heads)
    w = torch.ones(q.shape[:2], dtype=torch.float64) if mask is None else mask.double()
    w = w[:, :, None]
    if merge == "add":
        return w * i
    alpha = (w * h * i).sum(1, keepdim=True) / (w * h * h).sum(1, keepdim=True)
    alpha = torch.nan_to_num(alpha)
    if merge == "ortho":
        return w * (i - alpha * h)
    _, probs = attention(q, k, v, heads, scaled=False)
    a = probs[..., :num_global].sum(-1).mean(1)[:, :, None]
    return w * (i + (a - 1) * alpha * h)


class NaiveProcessor:
    """Text attention plus `people`, a list of (k [B, Li, C], v, scale, mask) for this layer."""

    def __init__(self, people, merge, num_zero, num_global):
        self.people, self.options = people, (merge, num_zero, num_global)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        q = attn.to_q(hidden_states)
        k, v = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        h, _ = attention(q, k, v, attn.heads)
        out = h
        for k, v, scale, mask in self.people:
            out = out + scale * delta(q, h, k, v, attn.heads, *self.options, mask)
        return attn.to_out[1](attn.to_out[0](out.to(hidden_states.dtype)))


def naive_unet(unet, system, inputs, people, rows=("cond",), masks=None):
    """Output of the UNet with naive processors. people: [(identity, {site name: scale} or number)]"""
    batch = inputs["sample"].shape[0]
    before = unet.attn_processors
    processors = dict(before)
    for site in system.sites(unet):
        layer = []
        for j, (identity, scale) in enumerate(people):
            tokens = torch.cat([_rows(identity, row, batch // len(rows)) for row in rows])
            k, v = system.project(site, tokens)
            s = scale[site.name] if isinstance(scale, dict) else scale
            mask = None if masks is None else masks(j, site)
            layer.append((k, v, s, mask))
        o = system.options
        processors[site.name] = NaiveProcessor(layer, o.merge, o.num_zero, o.num_global)
    unet.set_attn_processor(processors)
    try:
        with torch.no_grad():
            return unet(**inputs).sample
    finally:
        unet.set_attn_processor(dict(before))


def _rows(identity, row, images):
    tokens = identity.tokens if row == "cond" else identity.uncond_tokens
    if row == "uncond":
        tokens = tokens.expand(identity.tokens.shape[0], -1, -1)
    return tokens.repeat_interleave(images // tokens.shape[0], 0)
