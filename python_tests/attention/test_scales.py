import pytest
import torch
from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales

from idcore.attention.scales import expand
from idcore.attention.sites import find_sites
from idcore.errors import InputError
from idcore.testing.tiny_models import tiny_unet

UNET = tiny_unet("sdxl")  # blocks with layers: down 1 (2 transformers), up 0 (3), mid
SITES = find_sites(UNET)


@pytest.mark.parametrize(
    "scale",
    [
        {"up": {"block_0": [0.0, 1.0, 0.0]}},
        {"down": {"block_1": [0.25, 1.5]}, "up": {"block_0": [0.0, 1.0, 0.5]}},
        {"down": 0.5, "mid": 2.0, "up": {"block_0": 0.75}},
        {"mid": 1.0},
        {"down": {"block_1": [0.3]}},
    ],
)
def test_mappings_mean_what_they_mean_in_diffusers(scale):
    theirs = _maybe_expand_lora_scales(UNET, [scale], default_scale=0.0)[0]
    ours = expand(scale, SITES, 1)
    for site in SITES:
        assert ours[site.name] == (next(v for k, v in theirs.items() if site.name.startswith(k)),)


def test_numbers_lists_and_tensors():
    assert set(expand(0.8, SITES, 2).values()) == {(0.8, 0.8)}
    assert set(expand([0.8, 0], SITES, 2).values()) == {(0.8, 0.0)}
    mixed = expand([1.0, {"mid": 0.5}], SITES, 2)
    assert mixed[SITES[-1].name] == (1.0, 0.5) and mixed[SITES[0].name] == (1.0, 0.0)
    tensor = torch.tensor([0.1, 0.2])
    assert expand(tensor, SITES, 2) is tensor


@pytest.mark.parametrize(
    ("scale", "text"),
    [
        ([1.0], "2 identities need 2 values, got 1"),
        ("0.5", "must be a finite number, got '0.5'"),
        (float("nan"), "must be a finite number, got nan"),
        (True, "must be a finite number, got True"),
        ({"middle": 1.0}, "unknown key 'middle'"),
        ({"down": {"block_0": 1.0}}, "'down' has no conditioned 'block_0'; known are block_1"),
        ({"up": {"block_0": [1.0, 2.0]}}, "up.block_0 has 3 transformers, got 2 values"),
        ({"mid": None}, "mid must be a finite number, got None"),
        (torch.ones(3), r"a tensor must be floating point with shape \[\], \[2\] or \[2, images\], got .* \[3\]"),
        (torch.ones(3, 2), r"got torch.float32 \[3, 2\]"),
        (torch.ones(2, dtype=torch.int64), "got torch.int64"),
    ],
)
def test_wrong_scales(scale, text):
    with pytest.raises(InputError, match=text):
        expand(scale, SITES, 2)
