"""`attach` on diffusers' own SDXL pipelines: text to image, image to image, inpainting, ControlNet."""

import diffusers
import pytest
import torch
from naive_attention import NaiveProcessor, one_thread  # noqa: F401

import idcore
from idcore.systems.base import AttentionOptions
from idcore.testing.tiny_models import TinySystem, tiny_pipeline, tiny_unet

V2 = AttentionOptions("ortho_v2", 4, 3)
PICTURE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
HOLE = torch.zeros(1, 1, 16, 16)
HOLE[..., 8:] = 1


def tiny_controlnet(unet):
    net = diffusers.ControlNetModel.from_unet(unet, conditioning_channels=3)
    small = type(net.controlnet_cond_embedding)(
        conditioning_embedding_channels=unet.config.block_out_channels[0],
        block_out_channels=(8, 16),  # shrinks a picture by 2, as the tiny autoencoder does
    )
    net.controlnet_cond_embedding = small
    torch.manual_seed(4)
    for weight in net.parameters():
        if not weight.any():  # zero convolutions: as trained ones, they must do something
            torch.nn.init.normal_(weight, std=0.1)
    return net.eval().requires_grad_(False)


def text():
    return tiny_pipeline("sdxl"), {}


def image():
    return tiny_pipeline("sdxl", cls=diffusers.StableDiffusionXLImg2ImgPipeline), dict(image=PICTURE, strength=0.7)


def inpaint():
    pipe = tiny_pipeline("sdxl", cls=diffusers.StableDiffusionXLInpaintPipeline)
    return pipe, dict(image=PICTURE, mask_image=HOLE, strength=0.9)


def inpaint_nine():
    unet = tiny_unet("sdxl", in_channels=9)
    pipe = tiny_pipeline("sdxl", cls=diffusers.StableDiffusionXLInpaintPipeline, unet=unet)
    return pipe, dict(image=PICTURE, mask_image=HOLE, strength=0.99)


def control():
    unet = tiny_unet("sdxl")
    cls = diffusers.StableDiffusionXLControlNetPipeline
    return tiny_pipeline("sdxl", cls=cls, unet=unet, controlnet=tiny_controlnet(unet)), dict(image=PICTURE)


def control_image():
    unet = tiny_unet("sdxl")
    cls = diffusers.StableDiffusionXLControlNetImg2ImgPipeline
    pipe = tiny_pipeline("sdxl", cls=cls, unet=unet, controlnet=tiny_controlnet(unet))
    return pipe, dict(image=PICTURE, control_image=PICTURE.flip(-1), strength=0.7)


@pytest.fixture(params=[text, image, inpaint, inpaint_nine, control, control_image], ids=lambda f: f.__name__)
def kind(request):
    pipe, given = request.param()
    size = {} if request.param is image else {"height": 16, "width": 16}

    def draw(**more):
        words = dict(prompt="a dog", num_inference_steps=4, guidance_scale=2.0, output_type="latent")
        generator = torch.Generator().manual_seed(0)
        return pipe(**(words | size | given | more), generator=generator).images

    return pipe, draw


def naive(pipe, system, person, draw, scale):
    """The whole pipeline with plain float64 processors in place of ours."""
    before = pipe.unet.attn_processors
    processors = dict(before)
    o = system.options
    for site in system.sites(pipe.unet):
        k, v = system.project(site, torch.cat([person.uncond_tokens, person.tokens]))
        processors[site.name] = NaiveProcessor([(k, v, scale, None)], o.merge, o.num_zero, o.num_global)
    pipe.unet.set_attn_processor(processors)
    try:
        return draw()
    finally:
        pipe.unet.set_attn_processor(dict(before))


def test_identities_join_and_leave_no_trace(kind):
    pipe, draw = kind
    system = TinySystem(pipe.unet, options=V2)
    person = system.identity()
    processors, plain = pipe.unet.attn_processors, draw()
    truth = naive(pipe, system, person, draw, 0.7)
    with idcore.attach(pipe, system, person, id_scale=0.7) as handle:
        joined = draw()
        handle.scale(0.0)
        assert torch.equal(draw(), plain)
    assert (joined - truth).abs().max() < 2e-4 * truth.abs().max()
    assert (joined - plain).abs().max() > 1e-2 * plain.abs().max()
    assert torch.equal(draw(), plain)
    assert all(p is processors[name] for name, p in pipe.unet.attn_processors.items())


def test_the_window_counts_the_passes_of_this_run(kind):
    pipe, draw = kind
    system = TinySystem(pipe.unet, options=V2)
    person = system.identity()
    passes = []
    draw(callback_on_step_end=lambda p, i, t, kw: passes.append(p.num_timesteps) or kw)
    assert len(passes) == passes[0]
    with idcore.attach(pipe, system, person, id_guidance_start=1 / passes[0]):
        late = draw()
    with idcore.attach(pipe, system, person, id_scale=0.0) as handle:
        by_hand = draw(callback_on_step_end=lambda p, i, t, kw: handle.scale(1.0) or kw)
    assert torch.equal(late, by_hand)


def test_two_people_in_two_halves(kind):
    pipe, draw = kind
    system = TinySystem(pipe.unet, options=V2)
    left = torch.zeros(16, 16)
    left[:, :8] = 1
    people = [system.identity(0), system.identity(1)]
    with idcore.attach(pipe, system, people, id_mask=[left, 1 - left]) as handle:
        both = draw()
        handle.identity(people[::-1])
        other = draw()
        handle.masks([1 - left, left])
        assert (draw() - both).abs().max() < 1e-4 * both.abs().max()
    assert (other - both).abs().max() > 1e-2 * both.abs().max()


def test_the_controlnet_still_counts():
    pipe, given = control()
    system = TinySystem(pipe.unet, options=V2)

    def draw(**more):
        generator = torch.Generator().manual_seed(0)
        return pipe("a dog", num_inference_steps=2, output_type="latent", generator=generator, **(given | more)).images

    with idcore.attach(pipe, system, system.identity()):
        assert (draw() - draw(image=1 - PICTURE)).abs().max() > 1e-3
        assert (draw() - draw(controlnet_conditioning_scale=0.3)).abs().max() > 1e-3
    assert not any(type(p).__name__.startswith("Id") for p in pipe.controlnet.attn_processors.values())
