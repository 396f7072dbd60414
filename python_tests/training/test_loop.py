"""The training loop in one process: steps, saving, resuming bit for bit, refusals."""

import json

import pytest
import torch
from loop_cases import Denoise, Rows, config, losses

from idcore.files import read_safetensors
from idcore.training import checkpoint
from idcore.training.loop import train


def state_files(folder):
    names = ("module", "average", "optimiser", "random")
    return {n: read_safetensors(folder / f"{n}.safetensors")[0] for n in names}


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].keys() == b[name].keys()
        for k in a[name]:
            assert torch.equal(a[name][k], b[name][k]), (name, k)


def test_the_loss_falls_and_everything_is_written(tmp_path):
    task = Denoise()
    made = train(task, Rows(), config(steps=60, save_every=25, validate_every=30), tmp_path, facts={"by": "a test"})
    lines = losses(tmp_path)
    assert list(lines) == list(range(1, 61))
    first, last = ([lines[s]["loss"] for s in steps] for steps in (range(1, 11), range(51, 61)))
    assert sum(last) < 0.8 * sum(first)
    assert lines[1].keys() == {"step", "loss", "terms", "logs", "lr", "grad_norm"} and lines[1]["terms"].keys() == {
        "noise", "size",
    }  # fmt: skip
    assert [f.name for f in checkpoint.folders(tmp_path / "checkpoints")] == ["step-00000060", "step-00000050"]
    assert made == tmp_path / "model"
    facts = json.loads((made / "facts.json").read_text())
    assert facts["by"] == "a test" and facts["steps"] == 60 and facts["samples"] == 240 and facts["data"]["count"] == 64
    shown = sorted(p.parent.name for p in (tmp_path / "validation").glob("*/map.png"))
    assert shown == ["step-00000000", "step-00000030", "step-00000060"]
    measures = [json.loads(line) for line in (tmp_path / "measures.jsonl").read_text().splitlines()]
    assert [m["step"] for m in measures] == [0, 30, 60] and measures[2]["measures"]["weight"] > 0
    average = read_safetensors(tmp_path / "checkpoints/step-00000060/average.safetensors")[0]
    assert all(torch.equal(v, average[k]) for k, v in task.exported.items())
    assert not torch.equal(task.module["b"].weight, average["b.weight"])  # the weights themselves are back


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_resuming_equals_not_having_stopped_bit_for_bit(tmp_path, optimiser):
    c = {"optimiser": optimiser, "schedule": "cosine", "warmup": 3, "accumulate": 2, "validate_every": 5}
    train(Denoise(0, 0.1), Rows(), config(**c), tmp_path / "whole")
    for seed, stop in ((0, 5), (1, 7), (2, 0)):
        train(Denoise(seed, 0.1), Rows(), config(**c, stop_at=stop), tmp_path / "parts", resume=stop != 5)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    whole, parts = (checkpoint.newest(tmp_path / n / "checkpoints") for n in ("whole", "parts"))
    same(state_files(whole.folder), state_files(parts.folder))
    assert whole.state["task_state"] == parts.state["task_state"] == {"seen": 24}
    measures = [(tmp_path / n / "measures.jsonl").read_text() for n in ("whole", "parts")]
    assert measures[0] == measures[1]
