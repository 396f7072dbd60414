"""A small PuLID on small SDXL-shaped UNets, for the tests of training."""

import torch

from idcore.encoders.pulid_features import PuLIDFeatures
from idcore.systems.pulid import PuLID, PuLIDConfig
from idcore.systems.pulid_encoders import EncoderConfig

SIZES = dict(id_dim=8, vit_dim=8, width=16, output_dim=24)


def small_pulid(unet, seed=0, dtype=torch.float32, version="v1"):
    """PuLID with a narrow encoder, trainable."""
    extra = {} if version == "v1" else dict(queries=8, heads=2, layers_per_scale=1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = PuLID(PuLIDConfig.for_unet(unet, EncoderConfig(version, **SIZES, **extra)))
    return made.to(dtype).train()


def small_features(batch=2, seed=1):
    """What the frozen face networks give for `batch` people."""
    g = torch.Generator().manual_seed(seed)
    hidden = [torch.randn(batch, 1, 5, 8, generator=g) for _ in range(5)]
    return PuLIDFeatures(torch.randn(batch, 1, 8, generator=g), hidden)


def gradients(module):
    """Every parameter's gradient, flat, float64; all must be there."""
    missing = [n for n, p in module.named_parameters() if p.grad is None]
    assert not missing, f"no gradient reached {missing}"
    return torch.cat([p.grad.double().flatten() for p in module.parameters()])


def distance(a, b):
    """Largest difference over the largest magnitude of b."""
    return float((a - b).abs().max() / b.abs().max())
