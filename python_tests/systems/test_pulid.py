"""The PuLID system: encoding, unconditional tokens, sites, keys and values."""

import pulid_naive as naive
import pytest
import torch
from pulid_tiny import TINY, T, features, tiny

from idcore.encoders.pulid_features import PuLIDFeatures
from idcore.errors import InputError
from idcore.identity import Identity
from idcore.systems.base import System
from idcore.systems.pulid import PRESETS, PuLID, PuLIDConfig
from idcore.systems.pulid_encoders import EncoderConfig
from idcore.testing.tiny_models import tiny_unet

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
