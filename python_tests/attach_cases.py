"""A tiny UNet with a system and a person, and pictures of tiny pipelines, for the tests of `attach`."""

import torch

from idcore.systems.base import AttentionOptions
from idcore.testing.tiny_models import TinySystem, tiny_inputs, tiny_unet

# Two cross-attention layers, for tests in which compiling is what takes time.
SMALL = {
    "layers_per_block": 1,
    "block_out_channels": (16,),
    "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("UpBlock2D",),
}


def run(unet, inputs):
    with torch.no_grad():
        return unet(**inputs).sample


def same_objects(unet, before):
    now = unet.attn_processors
    return list(now) == list(before) and all(now[k] is before[k] for k in before) and not unet._forward_pre_hooks


def tiny_setup():
    """(UNet, system, identity, inputs)."""
    unet = tiny_unet("sd")
    system = TinySystem(unet, options=AttentionOptions("ortho_v2", 3, 2))
    return unet, system, system.identity(), tiny_inputs("sd")


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


def differ(a, b):
    assert (a - b).abs().max() > 1e-3 * b.abs().max()
