"""Whole pipelines: guidance, IP-Adapter, LoRA, other pipeline classes."""

import copy

import pytest
import torch
from naive_attention import naive_unet, one_thread  # noqa: F401

import idcore
from idcore.attention.sites import find_sites
from idcore.errors import InputError
from idcore.identity import Identity
from idcore.systems.base import AttentionOptions
from idcore.testing.tiny_models import TinySystem, tiny_ip_adapter, tiny_pipeline

V2 = AttentionOptions("ortho_v2", 4, 3)


def generate(pipe, n=1, guidance=3.0, seeds=(0,), prompt="a dog", **more):
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    return pipe(
        prompt,
        num_inference_steps=2,
        guidance_scale=guidance,
        num_images_per_prompt=n,
        height=16,
        width=16,
        generator=generators if len(seeds) > 1 else generators[0],
        output_type="latent",
        **more,
    ).images


@pytest.fixture(params=["sd", "sdxl"])
def pipe(request):
    return tiny_pipeline(request.param)


def close(a, b, tolerance=2e-5):
    error = (a - b).abs().max().item() / b.abs().max().item()
    assert error < tolerance, f"relative error {error:.2e}"


def differ(a, b):
    assert (a - b).abs().max() > 1e-3 * b.abs().max()


def test_guidance_is_read_at_each_call(pipe):
    system = TinySystem(pipe.unet, options=V2)
    person = system.identity()
    plain = {g: generate(pipe, guidance=g) for g in (3.0, 1.0)}
    seen = []
    with idcore.attach(pipe, system, person) as handle:
        project = handle._conditioning.rows
        handle._conditioning.rows = lambda: seen.append(project()) or seen[-1]
        guided = generate(pipe, guidance=3.0)
        assert set(seen) == {("uncond", "cond")}
        seen.clear()
        unguided = generate(pipe, guidance=1.0)
        assert set(seen) == {("cond",)}
    differ(guided, plain[3.0])
    differ(unguided, plain[1.0])
    # Without guidance the unconditional tokens must not matter; with it they must.
    other = Identity(person.tokens, person.uncond_tokens + 1, person.system)
    with idcore.attach(pipe, system, other):
        assert torch.equal(generate(pipe, guidance=1.0), unguided)
        differ(generate(pipe, guidance=3.0), guided)


def test_every_picture_of_a_batch_equals_its_single_picture(pipe):
    system = TinySystem(pipe.unet, options=V2)
    people = [system.identity(i) for i in range(2)]
    single = []
    for i in (0, 1):
        with idcore.attach(pipe, system, people[i]):
            single.append([generate(pipe, seeds=(10 + 2 * i + j,)) for j in range(2)])
    both = Identity(torch.cat([p.tokens for p in people]), torch.cat([p.uncond_tokens for p in people]), system.name)
    with idcore.attach(pipe, system, both):
        batch = generate(pipe, n=2, seeds=(10, 11, 12, 13), prompt=["a dog", "a dog"])
    for i in range(4):
        close(batch[i : i + 1], single[i // 2][i % 2], 1e-4)


def test_guidance_cut_off_in_the_middle():
    from diffusers.callbacks import SDXLCFGCutoffCallback

    pipe = tiny_pipeline("sdxl")
    system = TinySystem(pipe.unet, options=V2)
    with idcore.attach(pipe, system, system.identity()) as handle:
        rows = []
        project = handle._conditioning.rows
        handle._conditioning.rows = lambda: rows.append(project()) or rows[-1]
        pipe("a dog", num_inference_steps=4, height=16, width=16, output_type="latent",
             callback_on_step_end=SDXLCFGCutoffCallback(cutoff_step_ratio=0.5))  # fmt: skip
    assert rows[0] == ("uncond", "cond") and rows[-1] == ("cond",)


def test_an_exception_in_the_pipeline(pipe):
    system = TinySystem(pipe.unet)
    before = pipe.unet.attn_processors

    def stop(*args):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        with idcore.attach(pipe, system, system.identity()):
            generate(pipe, callback_on_step_end=stop)
    now = pipe.unet.attn_processors
    assert all(now[k] is before[k] for k in before) and not pipe.unet._forward_pre_hooks


def test_the_number_zero_is_bit_equal(pipe):
    system = TinySystem(pipe.unet, options=V2)
    plain = generate(pipe, n=2, seeds=(1, 2))
    with idcore.attach(pipe, system, system.identity(), id_scale=0.0):
        assert torch.equal(generate(pipe, n=2, seeds=(1, 2)), plain)


def test_image_to_image_shares_the_unet():
    from diffusers import StableDiffusionXLImg2ImgPipeline

    pipe = tiny_pipeline("sdxl")
    other = StableDiffusionXLImg2ImgPipeline(
        **{k: v for k, v in pipe.components.items() if k not in ("image_encoder", "feature_extractor")},
        add_watermarker=False,
    )
    other.set_progress_bar_config(disable=True)
    system = TinySystem(pipe.unet, options=V2)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def paint():
        return other("a dog", image=image, strength=0.9, num_inference_steps=3, output_type="latent",
                     generator=torch.Generator().manual_seed(0)).images  # fmt: skip

    plain = paint()
    with idcore.attach(other, system, system.identity()):
        differ(paint(), plain)
    assert torch.equal(paint(), plain)


@pytest.mark.parametrize("first, then", [(1.0, 5.0), (5.0, 1.0)])
def test_a_second_pipeline_on_the_same_unet_tells_its_own_guidance(first, then):
    from diffusers import StableDiffusionImg2ImgPipeline

    pipe = tiny_pipeline("sd")
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    system = TinySystem(pipe.unet, options=V2)
    person = system.identity(uncond=False)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def paint():
        return other(["a dog"] * 2, image=image, strength=0.5, num_inference_steps=4, guidance_scale=then,
                     output_type="latent", generator=torch.Generator().manual_seed(0)).images  # fmt: skip

    for more in ({}, {"id_guidance_end": 0.5}):
        with idcore.attach(other, system, person, **more):
            want = paint()
        with idcore.attach(pipe, system, person, **more):
            mine = generate(pipe, guidance=first)
            assert torch.equal(paint(), want)
            assert torch.equal(generate(pipe, guidance=first), mine)


def test_pipelines_that_do_not_tell_their_batches():
    from diffusers import StableDiffusionInstructPix2PixPipeline

    pipe = tiny_pipeline("sd", cls=StableDiffusionInstructPix2PixPipeline)
    system = TinySystem(pipe.unet)
    with pytest.raises(InputError, match="InstructPix2PixPipeline does not tell how its batches are made"):
        idcore.attach(pipe, system, system.identity())
    idcore.attach(pipe, system, system.identity(), cfg=("cond", "uncond", "uncond")).detach()


def test_perturbed_attention_guidance():
    from diffusers import StableDiffusionXLPAGPipeline

    pipe = tiny_pipeline("sdxl", cls=StableDiffusionXLPAGPipeline, pag_applied_layers=["mid"])
    system = TinySystem(pipe.unet, options=V2)
    rows = set()
    before = pipe.unet.attn_processors
    with idcore.attach(pipe, system, system.identity()) as handle:
        project = handle._conditioning.rows
        handle._conditioning.rows = lambda: rows.add(project()) or project()
        generate(pipe, pag_scale=2.0)
        generate(pipe, pag_scale=2.0, guidance=1.0)
    assert rows == {("uncond", "cond", "cond"), ("cond", "cond")}
    assert all(p is before[k] for k, p in pipe.unet.attn_processors.items() if "attn2" in k)


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
