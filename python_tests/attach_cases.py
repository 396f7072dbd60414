"""A tiny UNet with a system and a person, for the tests of `attach`."""

import torch

from idcore.systems.base import AttentionOptions
from idcore.testing.tiny_models import TinySystem, tiny_inputs, tiny_unet


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
