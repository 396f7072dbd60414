"""The benchmark of staged text: what is compared agrees, launches are counted, and a wrong op gets no time."""

import argparse

import pytest
import torch

from idcore.bench import stages


def rows(*words):
    parser = argparse.ArgumentParser()
    stages.add_arguments(parser)
    with torch.no_grad():
        return stages.run(parser.parse_args(["--cases", "tiny", "--rounds", "3", *words]))["rows"]


@pytest.mark.parametrize("count", [1, 5])
def test_op_and_layer_are_timed_and_no_launch_is_added(count):
    found = rows("--stages", str(count), "--dtype", "fp32,bf16")
    assert [(r["what"], r["dtype"]) for r in found] == [(w, d) for d in ("fp32", "bf16") for w in ("op", "layer")]
    for row in found:
        assert row["parity"] and row["over_text"] == pytest.approx(
            row["ms"]["ours"] / row["ms"]["own_text_only"] - 1, abs=0.01
        )
    for row in found[1::2]:
        assert row["launches"]["ours"] == row["launches"]["own_text_only"] == 3, "queries, attention, output"
        assert row["launches"]["stock"] > 3


def test_the_layers_agree_where_the_stages_do():
    layers = stages.Layers("tiny", "fp32", 5, 2)
    parts = [layers.plain] * 5
    layers.wide = stages.joined_text(layers.plain, parts, parts)
    with torch.no_grad():
        made = [call() for call in layers.calls().values()]
        op = [call() for call in layers.op_calls().values()]
    assert all(torch.allclose(a, made[0], atol=1e-5) for a in made) and all(
        torch.allclose(a, op[0], atol=1e-5) for a in op
    )


def test_every_step_reads_its_own_stage():
    layers, results = stages.Layers("tiny", "fp32", 5, 2), []
    for t in (10, 250, 999):
        layers.begin(t)
        with torch.no_grad():
            ours, plain, _ = (call() for call in layers.op_calls().values())
        assert torch.allclose(ours, plain, atol=1e-6)
        results.append(ours)
    assert not torch.allclose(results[0], results[1], atol=1e-3) and not torch.allclose(*results[1:], atol=1e-3)


def test_a_wrong_op_gets_no_time(monkeypatch):
    real = stages.id_attention
    monkeypatch.setattr(stages, "id_attention", lambda *a, stage=None, **k: real(*a, stage=torch.zeros(1).int(), **k))
    (row, _) = rows("--dtype", "fp32")
    assert not row["parity"] and "ms" not in row and row["error"] > row["limit"]
