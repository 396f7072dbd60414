"""A tiny PuLID, and features of no photo, for its tests."""

import torch

from idcore.encoders.pulid_features import PuLIDFeatures
from idcore.systems.pulid import PuLID, PuLIDConfig
from idcore.systems.pulid_encoders import EncoderConfig

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
