"""The training loop in one process: steps, saving, resuming bit for bit, refusals."""

import errno
import json
import os
import random
import sys

import numpy as np
import pytest
import torch
from loop_cases import Denoise, Rows, config, losses

from idcore.errors import IdcoreError, InputError, MissingDependencyError, WeightsError
from idcore.files import read_safetensors
from idcore.training import checkpoint
from idcore.training.loop import train
from idcore.training.optimise import Average, learning_rate
from idcore.training.processes import lock
from idcore.training.records import Lines


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


@pytest.mark.parametrize("optimiser", ["adamw", "sgd", "bitsandbytes", "torchao"])
def test_resuming_equals_not_having_stopped_bit_for_bit(tmp_path, optimiser, monkeypatch):
    if optimiser in ("bitsandbytes", "torchao"):
        pytest.importorskip(optimiser)
        other = {"bitsandbytes": "torchao", "torchao": "bitsandbytes"}[optimiser]
        monkeypatch.setitem(sys.modules, f"{other}.optim", None)
        optimiser = "adamw8bit"
    c = {"optimiser": optimiser, "schedule": "cosine", "warmup": 3, "accumulate": 2, "validate_every": 5}
    train(Denoise(0, 0.1, width=600), Rows(), config(**c), tmp_path / "whole")
    for seed, stop in ((0, 5), (1, 7), (2, 0)):
        train(Denoise(seed, 0.1, width=600), Rows(), config(**c, stop_at=stop), tmp_path / "parts", resume=stop != 5)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    whole, parts = (checkpoint.newest(tmp_path / n / "checkpoints") for n in ("whole", "parts"))
    same(state_files(whole.folder), state_files(parts.folder))
    assert whole.state["task_state"] == parts.state["task_state"] == {"seen": 24}
    measures = [(tmp_path / n / "measures.jsonl").read_text() for n in ("whole", "parts")]
    assert measures[0] == measures[1]


def test_accumulating_equals_one_larger_batch(tmp_path):
    train(Denoise(), Rows(), config(batch=8), tmp_path / "one")
    train(Denoise(), Rows(), config(batch=2, accumulate=4), tmp_path / "four")
    one, four = losses(tmp_path / "one"), losses(tmp_path / "four")
    assert all(abs(one[s]["loss"] - four[s]["loss"]) < 1e-5 for s in one)
    train(Denoise(), Rows(), config(batch=4, accumulate=2), tmp_path / "one", resume=True)  # the same global batch


def test_training_leaves_everything_else_as_it_was(tmp_path):
    torch.manual_seed(11), np.random.seed(3), random.seed(4)
    deterministic = torch.are_deterministic_algorithms_enabled()
    before = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    train(task := Denoise(0), Rows(), config(steps=2, deterministic=True, precision="bf16"), tmp_path / "a")
    torch.manual_seed(11)  # Denoise itself seeds
    after = (torch.get_rng_state(), np.random.get_state()[1], random.getstate())
    assert torch.equal(before[0], after[0]) and (before[1] == after[1]).all() and before[2] == after[2]
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert task.module["a"](torch.ones(1, 7)).dtype == torch.float32  # no autocast left behind
    train(task, Rows(), config(steps=2), tmp_path / "b")


def test_a_loss_that_is_not_finite_stops_before_anything_is_updated(tmp_path):
    task = Denoise(poison_at=6)
    with pytest.raises(IdcoreError) as e:
        train(task, Rows(), config(), tmp_path)
    text = str(e.value)
    assert "training stopped at step 6: the loss is nan (noise 0." in text and "size nan) on samples row" in text
    assert f"the checkpoint of step 4 in {tmp_path / 'checkpoints'} is intact" in text and "--allow-change lr" in text
    assert all(bool(torch.isfinite(p).all()) for p in task.module.parameters())
    assert list(losses(tmp_path)) == [1, 2, 3, 4, 5, 6]
    train(Denoise(), Rows(), config(), tmp_path, resume=True)
    train(Denoise(), Rows(), config(), tmp_path / "whole")
    assert losses(tmp_path) == losses(tmp_path / "whole")


@pytest.mark.parametrize(("keep", "way"), [(2, "from step-00000005, remove step-00000006"), (1, "anew in another")])
def test_a_loss_that_fails_right_after_a_checkpoint_names_an_older_one(tmp_path, keep, way):
    with pytest.raises(IdcoreError, match=f"that checkpoint's weights have diverged already: .*{way}"):
        train(Denoise(poison_at=6), Rows(), config(save_every=1, keep=keep), tmp_path)


def test_a_gradient_that_is_not_finite_stops_too(tmp_path):
    class Steep(Denoise):
        def losses(self, batch, step):
            terms = super().losses(batch, step)
            return terms | {
                "steep": 1e-9 * (self.module["b"].weight - self.module["b"].weight.detach()).square().sum().sqrt()
            }

    with pytest.raises(IdcoreError, match="step 0: the gradient's norm is nan. Nothing was updated; the checkpoint of"):
        train(Steep(), Rows(), config(), tmp_path)


def test_what_a_run_may_not_be_resumed_with(tmp_path):
    train(Denoise(), Rows(), config(stop_at=4), tmp_path)
    with pytest.raises(InputError) as e:
        train(Denoise(), Rows(60), config(lr=1.0, batch=8, save_every=3), tmp_path, resume=True)
    text = str(e.value)
    assert "  lr: was 0.01, is 1.0\n" in text and "  data.count: was 64, is 60\n" in text
    assert "  batch: was 4, is 8\n" in text and "save_every" not in text
    assert "--allow-change lr --allow-change data.count --allow-change batch" in text
    train(Denoise(), Rows(60), config(lr=1.0, batch=8), tmp_path, resume=True, allow_change=["lr", "data", "batch"])
    assert losses(tmp_path)[5]["lr"] == 1.0
    with pytest.raises(InputError, match="holds a run already .step-00000012.; add --resume"):
        train(Denoise(), Rows(), config(), tmp_path)
    with pytest.raises(WeightsError, match="no checkpoint in .*train without resuming first"):
        train(Denoise(), Rows(), config(), tmp_path / "new", resume=True)
    with pytest.raises(WeightsError, match=r"wanted 11 tensors, got 11; 7 of the wrong shape: a\.bias"):
        train(Denoise(width=25), Rows(), config(lr=1.0), tmp_path, resume=True, allow_change=["lr", "data", "batch"])
    with pytest.raises(WeightsError, match="saved by another optimiser"):
        allow = ["lr", "data", "batch", "optimiser"]
        train(Denoise(), Rows(), config(lr=1.0, optimiser="sgd"), tmp_path, resume=True, allow_change=allow)


def test_a_full_disk_under_losses_jsonl_is_told(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    lines = Lines(tmp_path / "losses.jsonl", 0)
    with pytest.raises(
        IdcoreError, match="cannot write .*losses.jsonl: No space left on device; the last checkpoint is"
    ):
        lines.sync()
    lines.close()


def test_lines_of_a_killed_run_are_cut_where_it_goes_on(tmp_path):
    path = tmp_path / "losses.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    lines = Lines(path, 2)
    lines.add(step=3, loss=float("nan"))
    lines.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "loss": null}\n' and lines.steps == {1, 2}


def test_two_runs_do_not_share_a_folder(tmp_path):
    with lock(tmp_path), pytest.raises(InputError, match="another training is running in .*choose another --out"):
        train(Denoise(), Rows(), config(), tmp_path)
    train(Denoise(), Rows(), config(), tmp_path)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"precision": "fp16"}, "precision fp16 needs a GPU; on the CPU choose bf16 or no"),
        ({"trackers": ("tensorbord",)}, "'tensorbord' is none that accelerate knows: .*tensorboard"),
        ({"trackers": ("aim",)}, "aim is not installed: pip install aim, or set trackers="),
        (
            {"optimiser": "adamw8bit"},
            "needs bitsandbytes or torchao, and neither is installed: pip",
        ),
        ({"warmup": 13}, "warmup must be at most steps"),
        (
            {"precision": "fp16", "parallel": "fsdp"},
            "precision fp16 does not go with parallel fsdp; choose bf16",
        ),
        ({"optimiser": "adamw8bit", "parallel": "fsdp"}, "adamw8bit does not go with parallel fsdp; choose adamw"),
    ],
)
def test_settings_that_cannot_be_served_here_are_refused(tmp_path, changes, words, monkeypatch):
    for name in ("aim", "bitsandbytes.optim", "torchao.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises((InputError, MissingDependencyError), match=words):
        train(Denoise(), Rows(), config(**changes), tmp_path)


def test_data_and_losses_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(InputError, match=r"micro batches of \[60\] samples at step 0; wanted 1 of 61"):
        train(Denoise(), Rows(60), config(batch=61), tmp_path / "a")
    task = Denoise()
    task.losses = lambda batch, step: {"flat": torch.tensor(1.0)}
    with pytest.raises(InputError, match=r"denoise: the losses do not depend on its module \(flat\)"):
        train(task, Rows(), config(), tmp_path / "b")
    task = Denoise()
    task.module.requires_grad_(False)
    with pytest.raises(InputError, match="denoise: its module has no parameter that wants a gradient"):
        train(task, Rows(), config(), tmp_path / "c")


def test_tensorboard_gets_losses_measures_and_pictures(tmp_path):
    c = {"trackers": ("tensorboard",), "log_every": 2, "validate_every": 6}
    train(Denoise(), Rows(), config(**c, stop_at=6), tmp_path)
    train(Denoise(), Rows(), config(**c), tmp_path, resume=True)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    steps, pictures = [], []
    for folder in {p.parent for p in tmp_path.rglob("events.out.*")}:
        events = EventAccumulator(str(folder)).Reload()
        steps += [e.step for e in events.Scalars("losses/noise")]
        pictures += [e.step for e in events.Images("validation/map")]
        assert {"loss", "lr", "grad_norm", "logs/output", "validation/weight"} <= set(events.Tags()["scalars"])
    assert steps == [2, 4, 6, 8, 10, 12] and pictures == [0, 6, 12]


def test_the_average_follows_slowly_and_swaps_back_exactly():
    task = Denoise()
    average = Average(task.module, 0.9)
    start = task.module["a"].weight.detach().clone()
    with torch.no_grad():
        task.module["a"].weight += 1
    average.update(0)  # decay (1 + 0) / (10 + 0)
    average.swap()
    assert torch.allclose(task.module["a"].weight, start + 0.9)
    average.swap()
    assert torch.equal(task.module["a"].weight, start + 1)


def test_courses_of_the_learning_rate():
    rates = lambda **c: [learning_rate(k, config(steps=100, lr=1.0, warmup=10, **c)) for k in range(100)]  # noqa: E731
    linear = rates(schedule="linear", decay=0.2, lr_end=0.02)
    assert linear[0] == pytest.approx(0.1) and linear[9] == linear[80] == 1.0
    assert linear[99] == pytest.approx(0.05) and sorted(linear[80:], reverse=True) == linear[80:]
    cosine = rates(schedule="cosine", lr_end=0.5)
    assert cosine[50] == pytest.approx(0.75) and cosine[99] == pytest.approx(0.5, abs=1e-3)
    assert set(rates()[10:]) == {1.0}
