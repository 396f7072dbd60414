"""What the training commands share: settings by base and option, missing options, bases by name."""

import json
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from idcore.errors import IdcoreError, InputError, WeightsError
from idcore.results import Result, trained_on
from idcore.testing.tiny_models import tiny_pipeline
from idcore.training.bases.opening import open_base, open_text_base
from idcore.training.bases.sd15 import SD15Base
from idcore.training.bases.sdxl import SDXLBase
from idcore.training.bases.tiny import TinyBase
from idcore.training.card import Card, write_card
from idcore.training.commands import TrainArguments, load_settings, over, run_training
from idcore.training.config import LoopConfig
from idcore.training.settings import setting


@dataclass(frozen=True)
class Model:
    base: str = setting("a", "Base")
    size: int = setting(1, "Size")


@dataclass(frozen=True)
class Mine:
    model: Model = setting(factory=Model)
    rate: float = setting(0.5, "Rate", above=0)


PRESETS = {"small": {"model": {"size": 7}, "rate": 0.1}}


def test_settings_come_from_options_file_preset_and_default_in_this_order(tmp_path):
    def made(*args, **how):
        return load_settings(Mine, *args, presets=PRESETS, default_base="a", **how)

    file = tmp_path / "s.yaml"
    file.write_text("model: {base: small, size: 3}\n")
    assert made() == Mine() and made(None, (), "small") == Mine(Model("small", 7), 0.1)
    assert made(file) == Mine(Model("small", 3), 0.1) and made(file, (), "a") == Mine(Model("a", 3), 0.5)
    assert made(file, ["model.size=4"], given={"rate": 2.0}) == Mine(Model("small", 4), 2.0)
    assert made(None, ["model.base=small", "rate=9"], given={"rate": 2.0}) == Mine(Model("small", 7), 9.0)
    assert PRESETS == {"small": {"model": {"size": 7}, "rate": 0.1}} and over({"a": {"b": 1}}, {"a": 2}) == {"a": 2}
    with pytest.raises(InputError, match="unknown key 'rat'; did you mean 'rate'"):
        made(None, ["rat=1"])
    with pytest.raises(InputError, match="model must be settings below model"):
        made(None, ["model=1"])


def test_a_command_says_what_is_missing_and_what_to_do_with_the_result(tmp_path):
    said, out = [], tmp_path / "run"

    ends = ["checkpoints/step-00000003", "model"]

    def train(settings, folder):
        assert settings == Mine() and folder == out
        return folder / ends.pop(0)

    arguments = TrainArguments(out, say=said.append)
    assert run_training("mine", TrainArguments(print_config=True), Mine(), None)[0].startswith("#")
    with pytest.raises(InputError, match="train mine: --out FOLDER is missing; see idcore train mine --help"):
        run_training("mine", TrainArguments(), Mine(), train)
    with pytest.raises(InputError, match="--images is missing"):
        run_training("mine", arguments, Mine(), train, needed=[("--images", ())])
    assert run_training("mine", arguments, Mine(), train, use="draw {made}") == [str(out / "checkpoints/step-00000003")]
    assert "stopped early; go on with --resume" in said[-1]
    run_training("mine", arguments, Mine(), train, use="draw {made}")
    assert said[-1].endswith(f"use it with `draw {out / 'model'}`")


def test_bases_by_name(tmp_path, monkeypatch):
    for kind, cls in (("sd", SD15Base), ("sdxl", SDXLBase)):
        tiny_pipeline(kind).save_pretrained(tmp_path / kind)
        base = open_text_base(str(tmp_path / kind))
        assert type(base) is cls and not any(p.requires_grad for p in base.unet.parameters())
    assert isinstance(open_base("tiny"), TinyBase)
    with pytest.raises(InputError, match='base model tiny: it has no text encoder; give "tiny-sd"'):
        open_text_base("tiny")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match='empty has no model_index.json; wanted "tiny-sd"'):
        open_base(str(tmp_path / "empty"))
    with pytest.raises(WeightsError, match="base model some/where is not there"):
        open_base("some/where")
    loaded = SimpleNamespace(load_config=lambda *a, **k: {"_class_name": "FluxPipeline"})
    monkeypatch.setattr("diffusers.DiffusionPipeline", loaded)
    with pytest.raises(WeightsError, match="is a FluxPipeline; wanted"):
        open_base("some/where")


@dataclass(frozen=True)
class WithLoop:
    loop: LoopConfig = setting(factory=LoopConfig)


def test_what_this_machine_cannot_serve_is_told_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    for loop, text in (
        (LoopConfig(optimiser="adamw8bit"), "pip install torchao"), (LoopConfig(trackers=("nope",)), "'nope' is none"),
        (LoopConfig(precision="fp16", device="cpu"), "fp16 needs a GPU"),
    ):  # fmt: skip
        with pytest.raises(IdcoreError, match=text):
            run_training("mine", TrainArguments(tmp_path), WithLoop(loop), lambda *a: pytest.fail("it began"))


def test_a_value_that_json_has_no_number_for_is_a_dash_in_the_card(tmp_path):
    lines = [{"step": s, "measures": {"a": v, "b": 1.0}} for s, v in ((0, 0.5), (2, None))]
    (tmp_path / "measures.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (tmp_path / "model").mkdir()
    write_card(Card("T", "S", ""), Mine(), tmp_path / "model", {})
    card = (tmp_path / "model" / "README.md").read_text()
    assert "| a | 0.5000 | – |" in card and "| b | 1.0000 | 1.0000 |" in card


def test_the_base_that_a_result_was_trained_on(tmp_path):
    (tmp_path / "a").mkdir()
    Result("pulid", "x.safetensors", "tiny-sd").write(tmp_path / "a", {})
    assert trained_on("auto", tmp_path / "photo.jpg", tmp_path / "a") == "tiny-sd"
    assert trained_on("auto", tmp_path) is None


def test_the_first_of_several_processes_speaks_for_all(tmp_path, monkeypatch):
    for rank, told in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        said: list[str] = []
        lines = run_training("mine", TrainArguments(tmp_path, say=said.append), Mine(), lambda s, out: out / "model")
        assert len(said) == len(lines) == told
