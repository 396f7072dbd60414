"""PuLID on a tiny SDXL UNet: batches, halves and people, against a naive computation."""

import math

import pytest
import torch
from pulid_tiny import features, tiny

import idcore
from idcore.errors import InputError
from idcore.identity import Identity
from idcore.systems.pulid import PuLID
from idcore.testing.tiny_models import tiny_inputs, tiny_unet


def naive_processor(system, site, tokens, scale, merge, num_zero):
    """The published attention with the zero tokens really appended, in float64, loops over heads."""

    def run(attn, hidden_states, encoder_hidden_states=None, **_):
        x = hidden_states.double()
        q, k, v = (
            torch.nn.functional.linear(t.double(), m.weight.double())
            for t, m in ((x, attn.to_q), (encoder_hidden_states, attn.to_k), (encoder_hidden_states, attn.to_v))
        )
        layer = system.id_adapter_attn_layers[str(site.index)]
        zeros = torch.zeros(tokens.shape[0], num_zero, tokens.shape[2]).double()
        padded = torch.cat([tokens.double(), zeros], 1)
        ki, vi = (padded @ m.weight.double().T for m in (layer.id_to_k, layer.id_to_v))
        out = torch.empty_like(q)
        for b in range(q.shape[0]):
            h, i, a = torch.empty_like(q[b]), torch.empty_like(q[b]), 0
            for head in range(site.heads):
                c = slice(head * site.head_dim, (head + 1) * site.head_dim)
                root = math.sqrt(site.head_dim)
                h[:, c] = torch.softmax(q[b, :, c] @ k[b, :, c].T / root, -1) @ v[b, :, c]
                logits = q[b, :, c] @ ki[b, :, c].T
                i[:, c] = torch.softmax(logits / root, -1) @ vi[b, :, c]
                a = a + torch.softmax(logits, -1)[:, :5].sum(-1, keepdim=True) / site.heads
            alpha = (h * i).sum(0, keepdim=True) / (h * h).sum(0, keepdim=True)
            added = {"add": i, "ortho": i - alpha * h, "ortho_v2": i + (a - 1) * alpha * h}[merge]
            out[b] = h + scale * added
        y = torch.nn.functional.linear(out.float(), attn.to_out[0].weight, attn.to_out[0].bias)
        return y / attn.rescale_output_factor

    return run


def with_naive(unet, system, tokens, **kw):
    """Run the UNet with naive processors on its cross-attention, then put the old ones back."""
    from idcore.attention.sites import attention_of

    class Naive:
        def __init__(self, site):
            self.run = naive_processor(system, site, tokens, **kw)

        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
            return self.run(attn, hidden_states, encoder_hidden_states)

    before = {}
    for site in system.sites(unet):
        attn = attention_of(unet, site)
        before[site.name], attn.processor = attn.processor, Naive(site)
    return before


def run_naive(unet, system, tokens, inputs, **kw):
    before = with_naive(unet, system, tokens, **kw)
    try:
        return unet(**inputs).sample
    finally:
        for name, p in before.items():
            unet.get_submodule(name.removesuffix(".processor")).processor = p


@pytest.mark.parametrize("version,options", [
    ("v1", {}), ("v1", dict(merge="ortho", num_zero=16)), ("v1", dict(merge="add", num_zero=0)), ("v1.1", {}),
])  # fmt: skip
@torch.no_grad()
def test_unet_with_attach_equals_the_naive_one_also_at_four_with_cfg_halves(version, options):
    """B=4 = 2 uncond + 2 cond images, one person: each row gets its own half's tokens, whole."""
    unet = tiny_unet("sdxl")
    system = tiny(version, unet)
    me = system.encode(features(seed=3))
    merge, num_zero = options.get("merge", system.options.merge), options.get("num_zero", system.options.num_zero)
    inputs = tiny_inputs("sdxl", batch=4)
    rows = torch.cat([me.uncond_tokens] * 2 + [me.tokens] * 2)
    want = run_naive(unet, system, rows, inputs, scale=0.8, merge=merge, num_zero=num_zero)
    plain = unet(**inputs).sample
    with idcore.attach(unet, system, me, id_scale=0.8, cfg=True, **options):
        got = unet(**inputs).sample
    torch.testing.assert_close(got, want, rtol=1e-3, atol=2e-4)
    assert (want - plain).abs().max() > 0.05  # the identity is seen at all
    assert torch.equal(unet(**inputs).sample, plain)


@torch.no_grad()
def test_two_people_one_per_sample_with_cfg_halves():
    unet = tiny_unet("sdxl")
    system = tiny("v1", unet)
    a, b = system.encode(features(seed=3)), system.encode(features(seed=4))
    inputs = tiny_inputs("sdxl", batch=4)
    rows = torch.cat([a.uncond_tokens, b.uncond_tokens, a.tokens, b.tokens])
    want = run_naive(unet, system, rows, inputs, scale=1.0, merge="ortho_v2", num_zero=8)
    with idcore.attach(unet, system, Identity.batch([a, b]), cfg=True):
        got = unet(**inputs).sample
    torch.testing.assert_close(got, want, rtol=1e-3, atol=2e-4)
    with idcore.attach(unet, system, Identity.batch([b, a]), cfg=True):
        assert (unet(**inputs).sample[2:] - want[2:]).abs().max() > 0.01


@torch.no_grad()
def test_without_guidance_the_uncond_tokens_play_no_part():
    unet = tiny_unet("sdxl")
    system = tiny("v1", unet)
    me = system.encode(features(seed=3))
    inputs = tiny_inputs("sdxl", batch=1)
    want = run_naive(unet, system, me.tokens, inputs, scale=1.0, merge="ortho_v2", num_zero=8)
    with idcore.attach(unet, system, me, cfg=False):
        torch.testing.assert_close(unet(**inputs).sample, want, rtol=1e-3, atol=2e-4)


def test_an_identity_of_the_other_version_is_refused():
    unet = tiny_unet("sdxl")
    other = tiny("v1.1", unet).encode(features())
    with pytest.raises(InputError, match="made by system 'pulid-v1.1', this system is 'pulid-v1'"):
        idcore.attach(unet, tiny("v1", unet), other)


def test_saved_identity_and_weights_give_the_same_picture(tmp_path):
    unet = tiny_unet("sdxl")
    system = tiny("v1", unet)
    me = system.encode(features(seed=3))
    me.save(tmp_path / "me.safetensors")
    system.save(tmp_path / "pulid.safetensors", layout="community")
    loaded = PuLID.from_weights(tmp_path / "pulid.safetensors")
    inputs = tiny_inputs("sdxl", batch=2)
    with idcore.attach(unet, system, me, cfg=True):
        want = unet(**inputs).sample
    with idcore.attach(unet, loaded, Identity.load(tmp_path / "me.safetensors"), cfg=True):
        assert torch.equal(unet(**inputs).sample, want)
    assert me.meta["encoder"] == loaded.weights_hash()
