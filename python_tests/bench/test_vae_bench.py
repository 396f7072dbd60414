"""The benchmark of the decode: what is compared agrees, and a wrong decoder gets no time."""

from __future__ import annotations

import argparse

import pytest
import torch

from idcore.bench import vae
from idcore.sampling.vae import LatentDecoder
from idcore.testing.tiny_models import tiny_vae


def row(monkeypatch, *words):
    monkeypatch.setattr(vae, "sdxl_vae", lambda dtype, device: loud())
    parser = argparse.ArgumentParser()
    vae.add_arguments(parser)
    options = parser.parse_args(["--size", "64", "--rounds", "2", *words])
    with torch.no_grad():
        (found,) = vae.run(options)["rows"]
    return found


def loud():
    model = tiny_vae()
    model.register_to_config(force_upcast=True)
    return model


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_variants_agree_and_are_timed(monkeypatch, dtype):
    found = row(monkeypatch, "--dtype", dtype, "--variants", "diffusers,contiguous,channels_last,graph")
    assert found["parity"] and set(found["ms"]) == {"diffusers", "contiguous", "channels_last"}  # a graph needs a GPU
    assert found["diffusers_over"]["channels_last"] == pytest.approx(
        found["ms"]["diffusers"] / found["ms"]["channels_last"], rel=0.05, abs=0.05
    )
    low, high = (1e-8, 1e-5) if dtype == "fp32" else (1e-4, 0.05)
    assert low < found["errors"]["eager"] < high


def test_a_wrong_decoder_gets_no_time(monkeypatch):
    right = LatentDecoder._whole
    monkeypatch.setattr(LatentDecoder, "_whole", lambda self, x: 1.01 * right(self, x))
    found = row(monkeypatch, "--dtype", "fp32", "--variants", "diffusers,channels_last")
    assert not found["parity"] and "ms" not in found


def test_diffusers_decode_leaves_float16_weights_as_they_were():
    model = loud().half()
    picture = vae.stock_decode(model)(torch.zeros(1, 4, 8, 8, dtype=torch.float16))
    assert picture.dtype == torch.float32 and model.dtype == torch.float16
