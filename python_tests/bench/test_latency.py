"""The latency benchmark: parts add up, cold stands apart from warm, a plot on request; models at full size by shape."""

from __future__ import annotations

import argparse
import time

import pytest
import torch
from PIL import Image

from idcore.bench import latency, unets
from idcore.errors import InputError
from idcore.testing.tiny_models import tiny_pipeline


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    latency.add_arguments(parser)
    return parser.parse_args(list(words))


def test_parts_of_the_tiny_base_add_up(tmp_path):
    plot = tmp_path / "latency.png"
    with torch.no_grad():
        report = latency.run(options("--batches", "1,2", "--rounds", "2", "--steps", "2", "--plot", str(plot)))
    assert [r["batch"] for r in report["rows"]] == [1, 2]
    for r in report["rows"]:
        parts = r["encode_s"] + r["sample_s"] + r["decode_s"] + r["other_s"]
        assert parts == pytest.approx(r["p50_s"], rel=1e-3, abs=1e-4)
        assert 0 < r["encode_s"] < r["sample_s"] < r["p50_s"] <= r["p90_s"]
        assert r["images_per_s"] == pytest.approx(r["batch"] / r["p50_s"], rel=1e-2)
    enrolment = report["enrolment"]
    assert 0 < enrolment["embed_s"] < enrolment["photo_to_tokens_s"]
    assert Image.open(plot).size == (1080, 420)


def test_parts_of_sdxl_add_up(monkeypatch):
    monkeypatch.setattr(unets, "sdxl_pipeline", lambda dtype, device: tiny_pipeline("sdxl"))
    with torch.no_grad():
        report = latency.run(
            options("--base", "sdxl-random", "--size", "16", "--batches", "1", "--rounds", "2", "--steps", "2")
        )
    (r,) = report["rows"]
    assert min(r["encode_s"], r["sample_s"], r["decode_s"], r["other_s"]) > 0 and report["enrolment"] is None
    assert r["encode_s"] + r["sample_s"] + r["decode_s"] < r["p50_s"]


def test_a_stopwatch_counts_modules_and_calls():
    class Slow(torch.nn.Module):
        def forward(self, x):
            time.sleep(0.01)
            return x

    watch, module = latency.Stopwatch("cpu"), Slow()
    watch.watch("encode", module, None)
    decode = watch.timed("decode", module.forward)
    module(module(1))
    assert decode(5) == 5
    assert 0.02 <= watch.seconds["encode"] < 1 and 0.01 <= watch.seconds["decode"] < 1
    watch.reset()
    assert watch.seconds == {}


def test_the_tiny_base_says_that_it_runs_on_the_cpu():
    with pytest.raises(InputError, match="tiny base runs on the CPU; take --base sdxl-random"):
        latency.run(options("--device", "cuda"))


def test_the_random_pipeline_has_sdxls_sizes(monkeypatch):
    monkeypatch.setattr(unets, "_filled", lambda module, *_, **__: module)  # shapes only, no memory
    pipe = unets.sdxl_pipeline()
    names = ("vae", "text_encoder", "text_encoder_2", "unet")
    count = [sum(p.numel() for p in getattr(pipe, name).parameters()) for name in names]
    assert count == [83_653_863, 123_060_480, 694_659_840, unets.SDXL_PARAMETERS]


def test_random_weights_leave_nothing_unset():
    module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8))
    module.register_buffer("ids", torch.zeros(1, 5, dtype=torch.int64))
    filled = unets._filled(module.to("meta"), torch.float32, "cpu", 0)
    assert filled.ids.tolist() == [[0, 1, 2, 3, 4]]
    assert all(torch.isfinite(p).all() for p in filled.parameters()) and filled[0].weight.abs().max() <= 0.5
