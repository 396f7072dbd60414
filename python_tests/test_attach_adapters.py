"""Whole pipelines with IP-Adapter and LoRA beside the identity; copies of UNets."""

import copy

import pytest
import torch
from attach_cases import differ, generate
from naive_attention import close, naive_unet, one_thread  # noqa: F401

import idcore
from idcore.attention.sites import find_sites
from idcore.systems.base import AttentionOptions
from idcore.testing.tiny_models import TinySystem, tiny_ip_adapter, tiny_pipeline

V2 = AttentionOptions("ortho_v2", 4, 3)


@pytest.fixture(params=["sd", "sdxl"])
def pipe(request):
    return tiny_pipeline(request.param)


# -- IP-Adapter ---------------------------------------------------------------------------------


def load_ip(pipe, seed=5):
    pipe.load_ip_adapter(tiny_ip_adapter(pipe.unet, seed), subfolder="", weight_name="", image_encoder_folder=None)


EMBEDS = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(8))


def generate_ip(pipe, **more):
    return generate(pipe, ip_adapter_image_embeds=[EMBEDS], **more)


@pytest.mark.parametrize("merge", ["add", "ortho", "ortho_v2"])
def test_ip_adapter_before_or_after_is_the_same(pipe, merge):
    system = TinySystem(pipe.unet, options=AttentionOptions(merge, 4, 3))
    person = system.identity()
    with idcore.attach(pipe, system, person):
        id_only = generate(pipe)
        load_ip(pipe)
        after = generate_ip(pipe)
        ip_processors = {k: v.id_binding.found for k, v in pipe.unet.attn_processors.items() if "attn2" in k}
    now = {k: v for k, v in pipe.unet.attn_processors.items() if "attn2" in k}
    assert {type(v).__name__ for v in now.values()} == {"IPAdapterAttnProcessor2_0"}
    assert all(now[k] is ip_processors[k] for k in now) and not pipe.unet._forward_pre_hooks
    ip_only = generate_ip(pipe)
    with idcore.attach(pipe, system, person) as handle:
        assert "over IPAdapterAttnProcessor2_0 (its branches added)" in handle.explain()
        before = generate_ip(pipe)
        assert torch.equal(before, after)
        handle.scale(0.0)
        assert torch.equal(generate_ip(pipe), ip_only)
        handle.scale(1.0)
        pipe.set_ip_adapter_scale(0.0)
        close(generate_ip(pipe), id_only)
        pipe.set_ip_adapter_scale(1.0)
        assert torch.equal(generate_ip(pipe), before)
    differ(before, ip_only)
    differ(before, id_only)
    assert torch.equal(generate_ip(pipe), ip_only)
    assert all(v is now[k] for k, v in pipe.unet.attn_processors.items() if "attn2" in k)


def test_one_layer_is_text_plus_ip_plus_identity(pipe):
    unet = pipe.unet
    site = find_sites(unet)[0]
    attn = unet.get_submodule(site.path)
    system = TinySystem(unet, options=V2)
    x = torch.randn(2, 9, attn.to_q.in_features)
    text, image = torch.randn(2, 7, attn.to_k.in_features), torch.randn(2, 4, attn.to_k.in_features)

    def layer(states):
        return attn(x, encoder_hidden_states=states) - attn.to_out[0].bias

    text_only = layer(text)
    with idcore.attach(unet, system, system.identity()):
        text_id = layer(text)
    load_ip(pipe)
    pipe.set_ip_adapter_scale(0.6)
    text_ip = layer((text, [image]))
    with idcore.attach(unet, system, system.identity()):
        close(layer((text, [image])), text_id + text_ip - text_only, 1e-5)
        # The old form, image tokens behind the text tokens.
        close(layer(torch.cat([text, image], 1)), text_id + text_ip - text_only, 1e-5)


def test_ip_adapter_masks_and_weights_while_attached():
    pipe = tiny_pipeline("sd")
    load_ip(pipe)
    system = TinySystem(pipe.unet)
    keys = list(pipe.unet.state_dict())
    half = torch.zeros(1, 1, 16, 16)
    half[..., 8:] = 1
    masked = {"cross_attention_kwargs": {"ip_adapter_masks": [half]}}
    ip_only = generate_ip(pipe, **masked)
    with idcore.attach(pipe, system, system.identity()) as handle:
        assert list(pipe.unet.state_dict()) == keys
        differ(generate_ip(pipe, **masked), generate_ip(pipe))
        handle.scale(0.0)
        assert torch.equal(generate_ip(pipe, **masked), ip_only)
        pipe.unet.to(torch.float64)
        site = find_sites(pipe.unet)[0]
        processor = pipe.unet.get_submodule(site.path).processor
        assert processor.to_k_ip[0].weight.dtype == torch.float64
        processor.scale = [0.25]
    assert pipe.unet.attn_processors[site.name].scale == [0.25]
    assert pipe.unet.attn_processors[site.name].to_k_ip[0].weight.dtype == torch.float64


def test_unloading_the_ip_adapter_while_attached(pipe):
    system = TinySystem(pipe.unet, options=V2)
    plain = generate(pipe)
    handle = idcore.attach(pipe, system, system.identity())
    id_only = generate(pipe)
    load_ip(pipe)
    generate_ip(pipe)
    pipe.unload_ip_adapter()
    assert torch.equal(generate(pipe), id_only)
    pipe.unload_ip_adapter()  # nothing loaded: diffusers remakes every processor without arguments
    assert torch.equal(generate(pipe), id_only)
    handle.detach()
    assert {type(v).__name__ for v in pipe.unet.attn_processors.values()} == {"AttnProcessor2_0"}
    assert torch.equal(generate(pipe), plain)


# -- LoRA ---------------------------------------------------------------------------------------


def add_lora(pipe, name="style"):
    from peft import LoraConfig

    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    torch.manual_seed(11)
    pipe.unet.add_adapter(config, adapter_name=name)


def test_lora_before_and_after(pipe):
    system = TinySystem(pipe.unet, options=V2)
    person = system.identity()
    plain = generate(pipe)
    with idcore.attach(pipe, system, person):
        id_only = generate(pipe)
        add_lora(pipe)
        after = generate(pipe)
    lora_only = generate(pipe)
    with idcore.attach(pipe, system, person):
        before = generate(pipe)
        pipe.unet.disable_adapters()
        assert torch.equal(generate(pipe), id_only)
        pipe.unet.enable_adapters()
    assert torch.equal(before, after)
    differ(lora_only, plain)
    differ(before, lora_only)
    pipe.unet.delete_adapters("style")
    assert torch.equal(generate(pipe), plain)


def test_lora_reaches_the_queries_of_the_identity():
    pipe = tiny_pipeline("sd")
    add_lora(pipe)
    system = TinySystem(pipe.unet, options=V2)
    person = system.identity()
    g = torch.Generator().manual_seed(0)
    inputs = {
        "sample": torch.randn(2, 4, 8, 8, generator=g),
        "timestep": torch.tensor(3),
        "encoder_hidden_states": torch.randn(2, 77, 32, generator=g),
    }
    truth = naive_unet(pipe.unet, system, inputs, [(person, 1.0)])
    with idcore.attach(pipe.unet, system, person), torch.no_grad():
        close(pipe.unet(**inputs).sample, truth)


def test_lora_and_ip_adapter_and_identity_in_six_orders():
    steps = {
        "lora": lambda p, s: add_lora(p),
        "ip": lambda p, s: load_ip(p),
        "id": lambda p, s: idcore.attach(p, s, s.identity(), id_scale=0.8),
    }
    base = tiny_pipeline("sd")
    system = TinySystem(base.unet, options=V2)
    results = []
    orders = [("lora", "ip", "id"), ("lora", "id", "ip"), ("ip", "lora", "id")]
    for order in [*orders, *(o[::-1] for o in orders)]:
        pipe = tiny_pipeline("sd")
        handles = [h for h in (steps[name](pipe, system) for name in order) if h is not None]
        results.append(generate_ip(pipe))
        handles[0].detach()
        pipe.unload_ip_adapter()
        pipe.unet.delete_adapters("style")
        assert torch.equal(generate(pipe), generate(base))
    for r in results[1:]:
        close(r, results[0], 1e-5)


def test_a_copied_unet_keeps_its_own_identity():
    pipe = tiny_pipeline("sd")
    system = TinySystem(pipe.unet)
    inputs = {"sample": torch.randn(1, 4, 8, 8), "timestep": 3, "encoder_hidden_states": torch.randn(1, 77, 32)}
    with torch.no_grad():
        plain = pipe.unet(**inputs).sample
        with idcore.attach(pipe.unet, system, system.identity()):
            twin = copy.deepcopy(pipe.unet)
            with_id = pipe.unet(**inputs).sample
        assert torch.equal(pipe.unet(**inputs).sample, plain)
        assert torch.equal(twin(**inputs).sample, with_id)
