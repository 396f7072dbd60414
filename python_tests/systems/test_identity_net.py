"""InstantID's ControlNet: the identity in place of the text, and the picture of keypoints."""

import face_adapter_naive as naive
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionXLControlNetPipeline
from naive_attention import one_thread  # noqa: F401

import idcore
from idcore.errors import InputError
from idcore.identity import Identity
from idcore.systems.identity_net import COLOURS, keypoint_picture
from idcore.testing.tiny_models import tiny_pipeline

POINTS = [[30, 40], [70, 40], [50, 60], [35, 80], [65, 80]]


def controlnet(unet, seed):
    torch.manual_seed(seed)
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8), load_weights_from_unet=False)
    for p in net.parameters():  # also the zero convolutions: a fresh ControlNet changes nothing
        torch.nn.init.normal_(p, std=0.05)
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def pipe():
    stock = tiny_pipeline("sdxl")
    stock = tiny_pipeline("sdxl", cls=StableDiffusionXLControlNetPipeline, controlnet=controlnet(stock.unet, 0))
    stock.set_progress_bar_config(disable=True)
    return stock


@pytest.fixture(scope="module")
def system(pipe):
    return naive.make("instantid", pipe.unet)


def draw(pipe, guidance=5.0, images=1, **more):
    size = 16
    more.setdefault("controlnet_conditioning_scale", 1.0)
    return pipe(
        "a portrait", image=keypoint_picture(np.array(POINTS) / 6, size, size), height=size, width=size,
        num_inference_steps=2, guidance_scale=guidance, num_images_per_prompt=images, output_type="np",
        generator=torch.Generator().manual_seed(0), **more,
    ).images  # fmt: skip


def seen(pipe, **more):
    """What the ControlNet reads as text."""
    read = []
    hook = pipe.controlnet.register_forward_hook(
        lambda m, a, k, out: read.append(k["encoder_hidden_states"]), with_kwargs=True
    )
    picture = draw(pipe, **more)
    hook.remove()
    return read[0], picture


@pytest.mark.parametrize("guidance,images,guess,rows", [
    (5.0, 1, False, "uc"), (5.0, 2, False, "uucc"), (1.0, 2, False, "cc"), (5.0, 2, True, "cc"),
])  # fmt: skip
def test_the_controlnet_reads_the_identity_in_the_order_of_the_batch(pipe, system, guidance, images, guess, rows):
    me = system.encode(torch.randn(naive.ID))
    with system.identity_net(pipe, me):
        read, _ = seen(pipe, guidance=guidance, images=images, guess_mode=guess)
    parts = {"u": me.uncond_tokens, "c": me.tokens}
    assert torch.equal(read, torch.cat([parts[r] for r in rows]))


def test_the_whole_method_acts_and_leaves_no_trace(pipe, system):
    me, you = (system.encode(torch.randn(naive.ID)) for _ in range(2))
    plain = draw(pipe)
    with idcore.attach(pipe, system, me, id_scale=0.8), system.identity_net(pipe, me) as net:
        mine = draw(pipe)
        net.identity = you
        other = draw(pipe)
    with idcore.attach(pipe, system, me, id_scale=0.8):
        adapter_alone = draw(pipe)
    assert np.array_equal(draw(pipe), plain)
    pictures = [plain, mine, other, adapter_alone]
    assert all(not np.array_equal(a, b) for i, a in enumerate(pictures) for b in pictures[:i])


def test_one_row_per_image(pipe, system):
    two = Identity.batch([system.encode(torch.randn(naive.ID)) for _ in range(2)])
    with system.identity_net(pipe, two):
        read, _ = seen(pipe, images=2)
        assert torch.equal(read[2:], two.tokens)
        with pytest.raises(InputError, match="the identity has 2 rows, got a batch of 6"):
            draw(pipe, images=3)


def test_another_pipeline_on_the_controlnet_tells_its_own_guidance(pipe, system):
    me = system.encode(torch.randn(naive.ID))
    second = StableDiffusionXLControlNetPipeline.from_pipe(pipe)
    second.set_progress_bar_config(disable=True)
    with system.identity_net(pipe, me):
        seen(pipe, guidance=5.0, images=2)
        read, _ = seen(second, guidance=1.0, images=2)
        assert torch.equal(read, torch.cat([me.tokens] * 2))
        read, _ = seen(pipe, guidance=5.0)
        assert torch.equal(read, torch.cat([me.uncond_tokens, me.tokens]))


def test_one_of_several_controlnets(pipe, system):
    from diffusers.models import MultiControlNetModel

    me = system.encode(torch.randn(naive.ID))
    nets = [pipe.controlnet, controlnet(pipe.unet, 1)]
    both = tiny_pipeline("sdxl", cls=StableDiffusionXLControlNetPipeline, controlnet=MultiControlNetModel(nets))
    read = {}
    for i, net in enumerate(nets):
        net.register_forward_hook(
            lambda m, a, k, out, i=i: read.__setitem__(i, k["encoder_hidden_states"]), with_kwargs=True
        )
    with system.identity_net(both, me, controlnet=nets[1]):
        picture = keypoint_picture(np.array(POINTS) / 6, 16, 16)
        both("a portrait", image=[picture] * 2, height=16, width=16, num_inference_steps=1, guidance_scale=1.0,
             output_type="latent", controlnet_conditioning_scale=[1.0, 1.0])  # fmt: skip
    assert torch.equal(read[1], me.tokens) and read[0].shape[1] == 77


def test_refusals(pipe, system):
    me = system.encode(torch.randn(naive.ID))
    with pytest.raises(InputError, match="StableDiffusionXLPipeline without a controlnet"):
        system.identity_net(tiny_pipeline("sdxl"), me)
    with pytest.raises(InputError, match="made by the system 'other'"):
        system.identity_net(pipe, Identity(torch.randn(1, 16, 64), None, "other"))
    with (
        system.identity_net(pipe, Identity(torch.randn(1, 16, 32), None, "instantid")),
        pytest.raises(InputError, match="reads tokens of width 64, the identity has 32"),
    ):
        draw(pipe)
    from diffusers.models import MultiControlNetModel

    several = tiny_pipeline("sdxl", cls=StableDiffusionXLControlNetPipeline,
                            controlnet=MultiControlNetModel([pipe.controlnet, pipe.controlnet]))  # fmt: skip
    with pytest.raises(InputError, match="with several; say which with controlnet="):
        system.identity_net(several, me)
    system.identity_net(several, me, controlnet=several.controlnet.nets[0]).remove()


def test_the_keypoint_picture():
    picture = np.asarray(keypoint_picture(POINTS, 100, 90))
    assert picture.shape == (90, 100, 3)
    for (x, y), colour in zip(POINTS, COLOURS):
        assert tuple(picture[y, x]) == colour and tuple(picture[y, x + 10 if x > 40 else x - 10]) == colour
    between = picture[50, 40]  # halfway from the left eye to the nose
    assert tuple(between) == (153, 0, 0)
    assert not picture[10, 50].any() and not picture[45, 50].any()
    for wrong in (POINTS[:4], [[float("nan"), 0]] * 5):
        with pytest.raises(InputError, match=r"wanted five finite points \[5, 2\]"):
            keypoint_picture(wrong, 10, 10)
