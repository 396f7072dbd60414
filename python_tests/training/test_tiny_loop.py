"""Training of the embedded model: resuming, killing, NaN, bad settings, two workers."""

import json
from dataclasses import replace

import pytest
import torch

from idcore.errors import IdcoreError, InputError, WeightsError
from idcore.sampling.tiny_model import TinyConfig, TinyModel
from idcore.training import checkpoint
from idcore.training.tiny import task as task_module
from idcore.training.tiny.data import TinyData
from idcore.training.tiny.pool import make_pool
from idcore.training.tiny.run import TrainConfig, train_tiny
from idcore.training.tiny.task import TinySource

SMALL = TinyConfig(channels=(32, 32, 32), width=32, text_layers=1)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    make_pool(folder, shards=1, people=6)
    return folder


def config(pool, **changes):
    loop = {"steps": 4, "batch": 2, "save_every": 2, "log_every": 2, "warmup": 1, "precision": "no"}
    of_loop = {k: changes.pop(k) for k in list(changes) if hasattr(TrainConfig().loop, k)}
    made = TrainConfig(
        pool=str(pool), model=SMALL, textures=8, shards=0, scale_batches=1, **{"recogniser_from": 1, **changes}
    )
    return replace(made, loop=replace(made.loop, **{**loop, **of_loop}))


def weights(out):
    found = checkpoint.newest(out / "checkpoints")
    return {n: found.tensors(n) for n in ("module", "average", "optimiser")}


def test_resuming_equals_not_having_stopped_bit_for_bit(pool, tmp_path):
    train_tiny(config(pool), tmp_path / "whole")
    train_tiny(config(pool, stop_at=2), tmp_path / "parts")
    assert checkpoint.newest(tmp_path / "parts" / "checkpoints").step == 2
    assert train_tiny(config(pool), tmp_path / "parts", resume=True) == tmp_path / "parts" / "model"
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for name, tensors in a.items():
        assert tensors.keys() == b[name].keys()
        for k, v in tensors.items():
            assert torch.equal(v, b[name][k]), (name, k)
    exported = json.loads((tmp_path / "parts" / "model" / "config.json").read_text())
    assert exported["training"]["samples"] == 8 and exported["training"]["last_losses"]["identity"] > 0


def test_training_moves_every_part_of_the_model(pool, tmp_path):
    train_tiny(config(pool, drop_identity=0.0, drop_text=0.0, steps=2), tmp_path)
    after = weights(tmp_path)["module"]
    torch.manual_seed(0)
    before = TinyModel(SMALL).state_dict()
    moved = {".".join(k.split(".")[:2]) for k, v in after.items() if not torch.equal(v, before[k])}
    assert {"system.id_to_k", "system.id_to_v", "system.encoder", "text.layers", "look.weight", "map.0"} <= moved
    assert float(after["system.encoder.std0"].min()) > 0


def test_a_nan_loss_stops_and_leaves_the_checkpoint_alone(pool, tmp_path, monkeypatch):
    train_tiny(config(pool, stop_at=2), tmp_path)
    monkeypatch.setattr(task_module, "picture_loss", lambda p, *a: p.sum() * float("nan"))
    with pytest.raises(IdcoreError, match="stopped at step 2: the loss is nan.*the checkpoint of step 2 .* is intact"):
        train_tiny(config(pool), tmp_path, resume=True)
    assert checkpoint.newest(tmp_path / "checkpoints").step == 2


def test_what_cannot_be_started(pool, tmp_path):
    with pytest.raises(WeightsError, match="no checkpoint in"):
        train_tiny(config(pool), tmp_path / "nothing", resume=True)
    with pytest.raises(WeightsError, match="no checkpoint in .*nowhere to start from"):
        train_tiny(config(pool, init=str(tmp_path / "nowhere")), tmp_path / "out")
    (tmp_path / "old" / "checkpoints" / "step-00000003").mkdir(parents=True)
    with pytest.raises(InputError, match="holds a run already .step-00000003.; add --resume"):
        train_tiny(config(tmp_path / "no pool either"), tmp_path / "old")


def test_a_training_may_start_from_the_average_of_another(pool, tmp_path):
    train_tiny(config(pool, steps=2), tmp_path / "first")
    train_tiny(config(pool, init=str(tmp_path / "first"), lr=1e-30), tmp_path / "second")
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert all(torch.equal(v, second["module"][k]) for k, v in first["average"].items())


def test_the_source_gives_the_same_pictures_however_they_are_divided(pool):
    source = TinySource(TinyData(pool, 0, 8), 2)
    alone = list(source.micro_batches(3, 0, 0, 1, 2, 4))
    first, second = (list(source.micro_batches(3, 0, rank, 2, 2, 2)) for rank in (0, 1))
    divided = [first[0], second[0], first[1], second[1]]
    assert [b.places.tolist() for b in alone] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    for a, b in zip(alone, divided):
        assert torch.equal(a.places, b.places) and a.prompts == b.prompts
        assert torch.equal(a.extra["target"], b.extra["target"]) and torch.equal(a.extra["ref"], b.extra["ref"])
    with pytest.raises(InputError, match="drawn for batch 2 and seed 0, asked for 3 and 0"):
        list(source.micro_batches(0, 0, 0, 1, 3, 1))


def test_two_workers_take_one_step_together(pool, tmp_path):
    """Two workers of 2 give the step that one gives from two micro batches of 2."""
    train_tiny(config(pool, steps=1, workers=2), tmp_path / "two")
    train_tiny(config(pool, steps=1, accumulate=2), tmp_path / "one")
    found = checkpoint.newest(tmp_path / "two" / "checkpoints")
    assert found.state["samples"] == 4 and found.state["world"] == 2
    lines = [json.loads((tmp_path / n / "losses.jsonl").read_text()) for n in ("one", "two")]
    assert lines[0]["loss"] == pytest.approx(lines[1]["loss"], abs=1e-5)
    one, two = weights(tmp_path / "one")["module"], weights(tmp_path / "two")["module"]
    assert all(torch.allclose(one[k], two[k], atol=2e-3) for k in one)
