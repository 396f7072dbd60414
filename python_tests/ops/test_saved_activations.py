"""What training keeps of `id_attention` beyond q, k and v: row statistics, and never a map or a copy of activations."""

import pytest
import torch

from idcore.backends import cpu
from idcore.testing import SDXL_LAYERS
from idcore.testing.parity import recorded

LAYERS = (10, 60)  # cross-attention layers of SDXL's UNet at 1024 px with 640 and with 1280 channels
# Megabytes of the 70 layers, batch 1, bf16: (ours at most, eager at least)
BOUNDS = {"none": (7, 200), "add": (14, 400), "ortho": (15, 1200), "ortho_v2": (25, 1700)}


def kept_bytes(call, leaves):
    """Bytes that autograd keeps for backward, each storage once, the leaves' own left out."""
    sizes = {}

    def see(t):
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(see, lambda t: t):
        out = call()
    own = {t.untyped_storage().data_ptr() for t in leaves.values()}
    assert out.requires_grad and leaves["q"].untyped_storage().data_ptr() in sizes, "the hooks must have seen q"
    return sum(size for pointer, size in sizes.items() if pointer not in own)


def of_unet(merge, call):
    """Megabytes that the 70 layers keep."""
    total = 0
    for layer, count in zip(SDXL_LAYERS, LAYERS, strict=True):
        case = layer.with_(dtype="bf16", merge=merge, num_zero=0 if merge == "none" else 8)
        given, leaves = recorded(case.inputs(), case.gradients)
        total += count * kept_bytes(lambda c=case, g=given: call(c, g), leaves)
    return total / 1e6


@pytest.mark.parametrize("merge", BOUNDS)
def test_seventy_layers_of_sdxl_keep_statistics_alone(merge):
    if cpu._load()[0] is None:
        pytest.skip(cpu._load()[1])
    ours, eager = of_unet(merge, lambda c, g: c.run(g, "cpu")), of_unet(merge, lambda c, g: c.eager(g))
    at_most, at_least = BOUNDS[merge]
    assert 0 < ours <= at_most, f"{ours:.1f} MB"
    assert eager >= at_least, f"eager keeps {eager:.0f} MB: the count misses something"
