"""Whole pipelines: guidance, batches, other pipeline classes."""

import pytest
import torch
from attach_cases import differ, generate
from naive_attention import close, naive_unet, one_thread  # noqa: F401

import idcore
from idcore.errors import InputError
from idcore.identity import Identity
from idcore.systems.base import AttentionOptions
from idcore.testing.tiny_models import TinySystem, tiny_pipeline

V2 = AttentionOptions("ortho_v2", 4, 3)


@pytest.fixture(params=["sd", "sdxl"])
def pipe(request):
    return tiny_pipeline(request.param)


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


def test_a_bare_unet_follows_the_pipeline_that_runs_it(pipe):
    system = TinySystem(pipe.unet, options=V2)
    person = system.identity()
    for guidance in (1.0, 5.0):
        with idcore.attach(pipe, system, person):
            want = generate(pipe, guidance=guidance, n=2)
        with idcore.attach(pipe.unet, system, person) as handle:
            assert "batch parts now: cond" in handle.explain()
            assert torch.equal(generate(pipe, guidance=guidance, n=2), want)


def test_pipelines_that_do_not_tell_their_batches():
    from diffusers import StableDiffusionInstructPix2PixPipeline

    pipe = tiny_pipeline("sd", cls=StableDiffusionInstructPix2PixPipeline)
    system = TinySystem(pipe.unet)
    with pytest.raises(InputError, match="InstructPix2PixPipeline does not tell how its batches are made"):
        idcore.attach(pipe, system, system.identity())
    idcore.attach(pipe, system, system.identity(), cfg=("cond", "uncond", "uncond")).detach()


def test_a_pipeline_that_does_not_tell_the_truth():
    from diffusers import DDIMScheduler, StableDiffusionPanoramaPipeline

    pipe = tiny_pipeline("sd", cls=StableDiffusionPanoramaPipeline, scheduler=DDIMScheduler())
    system = TinySystem(pipe.unet)
    person = system.identity(uncond=False)

    def draw(width):
        return pipe("a dog", height=128, width=width, num_inference_steps=1, guidance_scale=4.0, output_type="latent",
                    generator=torch.Generator().manual_seed(0)).images  # fmt: skip

    with pytest.raises(InputError, match="PanoramaPipeline does not tell how its batches are made; give cfg=True"):
        idcore.attach(pipe, system, person)
    with idcore.attach(pipe, system, person, cfg=True):
        joined = draw(128)
    with idcore.attach(pipe, system, person, cfg=False):
        differ(joined, draw(128))


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
