"""Training loop of the embedded model: resuming, killing, NaN, bad settings."""

import json

import pytest
import torch
from safetensors.torch import load_file

from idcore.errors import IdcoreError, InputError, WeightsError
from idcore.sampling.tiny_model import TinyConfig
from idcore.training.tiny import checkpoint, loop
from idcore.training.tiny.loop import TrainConfig, Trainer, learning_rate, train_tiny
from idcore.training.tiny.pool import make_pool

SMALL = TinyConfig(channels=(32, 32, 32), width=32, text_layers=1)


@pytest.fixture(autouse=True)
def _few_batches(monkeypatch):
    fit = Trainer.fit_feature_scale
    monkeypatch.setattr(Trainer, "fit_feature_scale", lambda self, batches=1: fit(self, batches))


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    make_pool(folder, shards=1, people=6)
    return folder


def config(pool, out, **changes):
    values = {"iterations": 4, "batch": 2, "save_every": 2, "log_every": 2, "warmup": 1, "recogniser_from": 1}
    values |= {"bf16": False, "textures": 8, "shards": 0}
    return TrainConfig(str(out), str(pool), model=SMALL, **{**values, **changes})


def weights(folder):
    path = checkpoint.find_checkpoint(folder)
    return {n: load_file(path / f"{n}.safetensors") for n in ("model", "ema", "optimiser")}


def test_resuming_equals_not_having_stopped_bit_for_bit(pool, tmp_path):
    train_tiny(config(pool, tmp_path / "whole"))
    train_tiny(config(pool, tmp_path / "parts", stop_at=2))
    assert json.loads((tmp_path / "parts/checkpoint/state.json").read_text())["step"] == 2
    train_tiny(config(pool, tmp_path / "parts"), resume=True)
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for name, tensors in a.items():
        assert tensors.keys() == b[name].keys()
        for k, v in tensors.items():
            assert torch.equal(v, b[name][k]), (name, k)


def test_training_moves_every_part_of_the_model(pool, tmp_path):
    torch.manual_seed(0)
    trainer = Trainer(config(pool, tmp_path, drop_identity=0.0, drop_text=0.0))
    trainer.fit_feature_scale(1)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    for _ in range(2):
        trainer.train_step()
    moved = {
        k.split(".")[0] + "." + k.split(".")[1]
        for k, v in trainer.model.state_dict().items()
        if not torch.equal(v, before[k])
    }
    assert {"system.id_to_k", "system.id_to_v", "system.encoder", "text.layers", "look.weight", "map.0"} <= moved
    assert float(trainer.model.system.encoder.std0.min()) > 0


def test_a_kill_during_saving_leaves_the_previous_checkpoint(pool, tmp_path, monkeypatch):
    trainer = Trainer(config(pool, tmp_path))
    checkpoint.save_checkpoint(tmp_path, trainer)
    trainer.step = 99

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_optimiser_tensors", die)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_checkpoint(tmp_path, trainer)
    fresh = Trainer(config(pool, tmp_path))
    checkpoint.load_checkpoint(tmp_path, fresh)
    assert fresh.step == 0


def test_a_kill_between_the_two_renames_is_survived(pool, tmp_path):
    trainer = Trainer(config(pool, tmp_path))
    trainer.step = 7
    last = checkpoint.save_checkpoint(tmp_path, trainer)
    last.rename(tmp_path / checkpoint.OLD)
    fresh = Trainer(config(pool, tmp_path))
    checkpoint.load_checkpoint(tmp_path, fresh)
    assert fresh.step == 7


def test_a_nan_loss_stops_and_leaves_the_checkpoint_alone(pool, tmp_path, monkeypatch):
    train_tiny(config(pool, tmp_path, stop_at=2))
    before = (tmp_path / "checkpoint/model.safetensors").read_bytes()
    monkeypatch.setattr(loop, "picture_loss", lambda *a: torch.tensor(float("nan"), requires_grad=True))
    with pytest.raises(IdcoreError, match="loss is nan at iteration 2.*intact"):
        train_tiny(config(pool, tmp_path), resume=True)
    assert (tmp_path / "checkpoint/model.safetensors").read_bytes() == before


def test_resuming_without_a_checkpoint_says_so(pool, tmp_path):
    with pytest.raises(WeightsError, match="no checkpoint in"):
        train_tiny(config(pool, tmp_path / "nothing"), resume=True)


@pytest.mark.parametrize("bad", [{"iterations": 0}, {"batch": -1}, {"ema": 1.0}, {"lr": 0.0}, {"workers": 0}])
def test_bad_settings_are_named(pool, tmp_path, bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        train_tiny(config(pool, tmp_path, **bad))


def test_learning_rate_warms_up_stays_and_falls():
    c = TrainConfig("o", "p", iterations=100, lr=1.0, warmup=10, decay=0.2)
    rates = [learning_rate(k, c) for k in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[79] == 1.0
    assert rates[99] == pytest.approx(0.05) and rates[80] >= rates[90] >= rates[99]


def test_two_workers_average_their_gradients(pool, tmp_path):
    """Two workers of 2 give one step from 4 pictures; both hold the same weights, so one checkpoint tells all."""
    train_tiny(config(pool, tmp_path, iterations=1, workers=2, save_every=1, log_every=1))
    state = json.loads((tmp_path / "checkpoint/state.json").read_text())
    assert state["step"] == 1 and state["samples"] == 4
    assert all(torch.isfinite(v).all() for v in weights(tmp_path)["model"].values())
