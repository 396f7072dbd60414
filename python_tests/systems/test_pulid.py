"""The PuLID system: encoding, unconditional tokens, sites, keys and values, and batches on a tiny SDXL UNet."""

import math

import pulid_naive as naive
import pytest
import torch

import idcore
from idcore.encoders.pulid_features import PuLIDFeatures
from idcore.errors import InputError
from idcore.identity import Identity
from idcore.systems.base import System
from idcore.systems.pulid import PRESETS, PuLID, PuLIDConfig
from idcore.systems.pulid_encoders import EncoderConfig
from idcore.testing.tiny_models import tiny_inputs, tiny_unet

TINY = dict(id_dim=12, vit_dim=10, width=16, output_dim=14, queries=6, heads=4)
T = 7


def features(b=1, n=1, seed=0, **meta):
    g = torch.Generator().manual_seed(seed)
    hidden = [torch.randn(b, n, T, 10, generator=g) for _ in range(5)]
    return PuLIDFeatures(torch.randn(b, n, 12, generator=g), hidden, meta)


def tiny(version="v1", unet=None, mode=None, seed=1):
    """A PuLID for a tiny UNet; projections large enough that the identity is seen in the result."""
    torch.manual_seed(seed)
    encoder = EncoderConfig(version, **TINY)
    config = PuLIDConfig(encoder, ((1, 8),)) if unet is None else PuLIDConfig.for_unet(unet, encoder)
    system = PuLID(config, mode=mode).eval().requires_grad_(False)
    for p in system.parameters():
        p.add_(torch.randn_like(p) * 0.3)
    return system


# -- encoding -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["v1", "v1.1"])
def test_encode_gives_tokens_and_the_encoder_on_zeros(version):
    system = tiny(version)
    one = system.encode(features(photo="x"))
    w = naive.f64({k.removeprefix("id_adapter."): v for k, v in system.state_dict().items()})
    f = features()
    given = [f.id_cond[0, 0].double()], [[h[0, 0].double() for h in f.hidden]]
    nothing = [torch.zeros(12).double()], [[torch.zeros(T, 10).double()] * 5]
    for got, (conds, hiddens) in ((one.tokens, given), (one.uncond_tokens, nothing)):
        if version == "v1":
            want = naive.id_encoder(w, conds, hiddens, 14)
        else:
            want = naive.id_former(w, conds, hiddens, 4)
        torch.testing.assert_close(got[0].double(), want, rtol=1e-4, atol=5e-5)
    assert one.system == system.name == f"pulid-{version}" and isinstance(system, System)
    assert one.meta["photo"] == "x" and one.meta["photos"] == 1 and one.meta["encoder"].startswith("sha256:")
    assert not torch.allclose(one.uncond_tokens, torch.zeros(1))  # not zero tokens


def test_uncond_is_computed_once_per_checkpoint():
    system = tiny()
    calls = []
    hook = system.id_adapter.register_forward_hook(lambda *_: calls.append(1))
    first = system.uncond_tokens(T)
    assert system.uncond_tokens(T) is first and len(calls) == 1
    system.encode(features())
    system.encode(features(seed=2))
    assert len(calls) == 3  # one per photo, none for the unconditional tokens
    system.load_state_dict({k: v * 0.5 for k, v in system.state_dict().items()})
    assert not torch.equal(system.uncond_tokens(T), first)
    hook.remove()
    half = system.to(torch.bfloat16).uncond_tokens(T)
    assert half.dtype == torch.bfloat16


def test_forward_carries_gradients_and_encode_does_not():
    system = tiny().requires_grad_(True)
    tokens = system(features(2))
    assert tokens.shape == (2, 10, 14) and tokens.requires_grad
    tokens.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in system.id_adapter.parameters())
    assert not system.encode(features(2)).tokens.requires_grad


def test_uncond_follows_weights_that_are_trained():
    system = tiny().train().requires_grad_(True)
    before, old_hash = system.uncond_tokens(T), system.weights_hash()
    with torch.no_grad():
        system.id_adapter.body[6].bias.add_(1)
    assert not torch.equal(system.uncond_tokens(T), before) and system.weights_hash() != old_hash
    assert not torch.equal(system.eval().uncond_tokens(T), before)


@pytest.mark.parametrize("id_mix", [False, True])
def test_several_photos_v1_repeat_uncond_as_they_do_cond(id_mix):
    system = tiny("v1")
    three = system.encode(features(n=3), id_mix=id_mix)
    extra = 10 if id_mix else 5
    assert three.tokens.shape == three.uncond_tokens.shape == (1, 10 + 2 * extra, 14)
    u = system.uncond_tokens(T)
    assert torch.equal(three.uncond_tokens, torch.cat([u, u[:, :extra], u[:, :extra]], 1))
    f = features(n=3)
    parts = [PuLIDFeatures(f.id_cond[:, i : i + 1], [h[:, i : i + 1] for h in f.hidden]) for i in range(3)]
    first, *rest = [system.encode(p).tokens for p in parts]
    want = torch.cat([first, *(t[:, :extra] for t in rest)], 1)
    torch.testing.assert_close(three.tokens, want)
    assert three.meta["photos"] == 3 and three.meta["id_mix"] is id_mix


def test_several_photos_v11_keep_the_number_of_tokens_and_uncond_of_one_photo():
    system = tiny("v1.1")
    one, three = system.encode(features(n=1)), system.encode(features(n=3))
    assert one.tokens.shape == three.tokens.shape == (1, 6, 14)
    assert torch.equal(one.uncond_tokens, three.uncond_tokens)
    with pytest.raises(InputError, match="option of v1 only"):
        system.encode(features(n=2), id_mix=True)


@pytest.mark.parametrize("version", ["v1", "v1.1"])
def test_people_in_a_batch_are_encoded_as_if_alone(version):
    system = tiny(version).double()
    people = [features(1, 2, seed=s) for s in range(3)]
    together = system.encode(PuLIDFeatures.batch(people))
    one_by_one = Identity.batch([system.encode(p) for p in people])
    torch.testing.assert_close(together.tokens, one_by_one.tokens)
    assert torch.equal(together.uncond_tokens, one_by_one.uncond_tokens) and len(together) == 3


def test_features_are_joined_along_the_right_axis():
    a, b = features(1, 2, seed=1), features(1, 2, seed=2)
    assert PuLIDFeatures.stack([a, b]).id_cond.shape == (1, 4, 12)
    assert PuLIDFeatures.batch([a, b]).id_cond.shape == (2, 2, 12)
    assert torch.equal(PuLIDFeatures.stack([a, b]).hidden[3][0, 2:], b.hidden[3][0])
    with pytest.raises(InputError, match=r"same number of photos per person, got \[1, 2\]"):
        PuLIDFeatures.batch([a, features(1, 1)])
    with pytest.raises(InputError, match=r"hidden\[1\] holds NaN"):
        PuLIDFeatures(a.id_cond, [a.hidden[0], a.hidden[1] * float("nan"), *a.hidden[2:]])


def test_photos_without_preprocessing_and_unknown_modes_are_named():
    with pytest.raises(InputError, match="photos need preprocess=PuLIDPreprocess"):
        tiny().encode(["me.jpg"])
    with pytest.raises(InputError, match="mode must be one of 'fidelity', 'style', 'v1.1', 'plain', got 'best'"):
        tiny(mode="best")


def test_presets_are_the_published_ones():
    def values(o):
        return o.merge, o.num_zero, o.num_global

    assert values(tiny("v1").options) == values(PRESETS["fidelity"]) == ("ortho_v2", 8, 5)
    assert values(tiny("v1", mode="style").options) == ("ortho", 16, 5)
    assert values(tiny("v1.1").options) == ("ortho_v2", 20, 5)


# -- sites, keys and values -----------------------------------------------------------------------------------


def sdxl_like():
    """SDXL's block layout (10 transformer layers in the deep blocks), very narrow, without values."""
    with torch.device("meta"):
        return tiny_unet(
            "sdxl",
            block_out_channels=(8, 16, 32),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(1, 2, 4),
            transformer_layers_per_block=(1, 2, 10),
            norm_num_groups=4,
        )


def test_published_indices_name_the_blocks_that_they_should():
    unet = sdxl_like()
    with torch.device("meta"):
        system = PuLID(PuLIDConfig.for_unet(unet, EncoderConfig("v1", **TINY)))
    sites = {s.index: s for s in system.sites(unet)}
    assert list(sites) == list(range(1, 140, 2))
    runs = {"down_blocks.1.attentions.0": (1, 3), "down_blocks.1.attentions.1": (5, 7),
            "down_blocks.2.attentions.0": (9, 27), "down_blocks.2.attentions.1": (29, 47),
            "up_blocks.0.attentions.0": (49, 67), "up_blocks.0.attentions.1": (69, 87),
            "up_blocks.0.attentions.2": (89, 107), "up_blocks.1.attentions.0": (109, 111),
            "up_blocks.1.attentions.1": (113, 115), "up_blocks.1.attentions.2": (117, 119),
            "mid_block.attentions.0": (121, 139)}  # fmt: skip
    for block, (first, last) in runs.items():
        for i in range(first, last + 1, 2):
            assert sites[i].name == f"{block}.transformer_blocks.{(i - first) // 2}.attn2.processor"
            assert sites[i].hidden == (16 if block.startswith(("down_blocks.1", "up_blocks.1")) else 32)


def test_published_weights_on_another_base_are_refused_with_both_layouts():
    with torch.device("meta"):
        system = PuLID()
    with pytest.raises(InputError) as e:
        system.sites(tiny_unet("sd"))
    text = str(e.value)
    assert "weights are for a UNet with 70 cross-attention layers (10 x C=640, 60 x C=1280), this one has" in text
    assert "Use an SDXL base model" in text and "more" in text
    with pytest.raises(InputError, match=r"C=16, weights have 640 and 69 more"):
        system.sites(sdxl_like())  # same places, other widths


def test_weights_of_one_tiny_base_do_not_go_on_another():
    unet = tiny_unet("sdxl")
    config = PuLIDConfig.for_unet(unet, EncoderConfig("v1", **TINY))
    fewer = PuLID(PuLIDConfig(config.encoder, config.layers[:-1]))
    with pytest.raises(InputError, match="weights have none"):
        fewer.sites(unet)
    more = PuLID(PuLIDConfig(config.encoder, (*config.layers, (999, 64))))
    with pytest.raises(InputError, match=r"index 999 \(C=64\) has weights but no layer"):
        more.sites(unet)


def test_project_is_one_product_per_layer():
    unet = tiny_unet("sdxl")
    system = tiny(unet=unet)
    tokens = torch.randn(2, 10, 14)
    for site in system.sites(unet):
        k, v = system.project(site, tokens)
        w = system.state_dict()
        for got, name in ((k, "k"), (v, "v")):
            want = tokens.double() @ w[f"id_adapter_attn_layers.{site.index}.id_to_{name}.weight"].double().T
            assert got.shape == (2, 10, site.hidden)
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match=r"tokens must be \[Bi, L, 14\], got \[2, 10, 15\]"):
        system.project(site, torch.randn(2, 10, 15))
    lost = type(site)(site.name, 998, site.hidden, site.heads, site.head_dim)
    with pytest.raises(InputError, match="no weights for .*index 998"):
        system.project(lost, tokens)


# -- on a UNet ------------------------------------------------------------------------------------------------


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
