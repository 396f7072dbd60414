"""The whole-UNet benchmark on the tiny base: what is compared is what it says, and the figures add up."""

from __future__ import annotations

import argparse

import pytest
import torch

from idcore.attention.sites import find_sites
from idcore.bench import e2e
from idcore.bench.unets import SDXL_PARAMETERS, base_model, sdxl_inputs, sdxl_shapes
from idcore.errors import InputError


@pytest.fixture(scope="module")
def row():
    parser = argparse.ArgumentParser()
    e2e.add_arguments(parser)
    options = parser.parse_args(["--base", "tiny", "--size", "64", "--rounds", "2", "--threads-list", "1"])
    with torch.no_grad():
        (row,) = e2e.run(options)["rows"]
    return row


def test_identity_by_our_op_and_by_the_eager_processor_give_the_same_picture(row):
    assert row["distance_to_eager"] < 2e-6 < 1e-3 < row["distance_of_identity"]


def test_overheads_are_the_layers_differences_over_the_stock_unet(row):
    assert set(row["unet_s"]) == set(row["processors_s"]) == {"stock", "own_text_only", "id", "id_eager"}
    own, stock = row["processors_s"], row["unet_s"]["stock"]
    for name, a, b in (("overhead", "id", "stock"), ("overhead_own", "id", "own_text_only")):
        assert row[name] == pytest.approx((own[a] - own[b]) / stock, abs=2e-2)
    assert all(0 < own[v] < row["unet_s"][v] for v in own)


def test_launches_per_layer(row):
    launches = row["launches_per_layer"]
    # queries, keys, values, attention, output, the division by rescale_output_factor
    assert launches["stock"] == 6
    # queries, attention, its second pass over the image tokens, output; nothing is divided by 1
    assert (launches["own_text_only"], launches["id"]) == (3, 4)
    assert launches["id_eager"] >= launches["stock"] + 20


def test_the_full_size_unet_is_sdxls():
    unet = sdxl_shapes()
    assert sum(p.numel() for p in unet.parameters()) == SDXL_PARAMETERS
    sites = find_sites(unet)
    assert len(sites) == 70 and {(s.hidden, s.head_dim) for s in sites} == {(640, 64), (1280, 64)}


def test_wrong_sizes_and_bases_are_refused():
    with pytest.raises(InputError, match="multiple of 64 pixels, got 500"):
        sdxl_inputs(500, 1, torch.float32)
    with pytest.raises(InputError, match="base must be one of sdxl-random, tiny, got 'sd15'"):
        base_model("sd15", 512, 1, torch.float32, "cpu")
