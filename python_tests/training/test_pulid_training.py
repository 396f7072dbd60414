"""PuLID's training in small: all stages, resumed, exported, loaded and drawn with."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pulid_cases import DrawnPeople, features
from typer.testing import CliRunner

from idcore.cli import app
from idcore.errors import InputError, WeightsError
from idcore.results import is_result, read_result
from idcore.systems.pulid import PuLID
from idcore.training.contract import Step
from idcore.training.losses.faces import FixedFace
from idcore.training.pulid.config import PuLIDTrainConfig, load_config
from idcore.training.pulid.run import Models, new_system, train_pulid
from idcore.training.settings import load
from idcore.training.settings_out import as_text

SMALL = (
    "stage1.steps=2", "stage2.steps=2", "stage3.steps=2", "loop.batch=2", "stage2.batch=2",
    "stage3.batch=2", "loop.warmup=0", "loop.validate_every=0",
    "loop.save_every=1", "loop.trackers=", "encoder.width=16", "encoder.output_dim=24", "loop.ema=0.5",
)  # fmt: skip


def tensors(folder):
    return PuLID.from_weights(folder / read_result(folder).weights).state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def equal_losses(a, b):
    """The losses of every step of every stage."""
    for n in (1, 2, 3):
        lines = [
            [json.loads(x) for x in (run / f"stage{n}" / "losses.jsonl").read_text().splitlines()] for run in (a, b)
        ]
        assert [x["step"] for x in lines[0]] == [x["step"] for x in lines[1]] == [1, 2]
        for one, two in zip(*lines):
            assert (one["terms"], one["grad_norm"]) == (two["terms"], two["grad_norm"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A whole small run on the embedded base, both layouts exported, with validation."""
    out = tmp_path_factory.mktemp("pulid") / "run"
    more = ("loop.validate_every=2", "validation.count=1", "result.layouts=pulid,community")
    config = load_config(None, [*SMALL, *more], "tiny")
    return train_pulid(config, DrawnPeople(4), out), config


def test_three_stages_leave_a_result_that_loads_in_both_layouts(trained):
    model, config = trained
    assert is_result(model) and read_result(model).features == "tiny-pulid"
    a, b = (PuLID.from_weights(model / f"pulid{x}.safetensors") for x in ("", "_community"))
    assert same(a.state_dict(), b.state_dict())
    assert [i for i, _ in a.config.layers] == [1, 3, 5, 7] and a.config.encoder == config.encoder_config()
    card = (model / "README.md").read_text()
    assert "L_diff + L_id + L_align" in card and "lambda_id" in card and "face/distance" in card
    run = model.parent
    lines = [json.loads(x) for x in (run / "stage3" / "losses.jsonl").read_text().splitlines()]
    assert [set(x["terms"]) for x in lines] == [{"diffusion", "identity", "semantic", "layout"}] * 2
    assert set(json.loads((run / "stage1" / "losses.jsonl").read_text().splitlines()[0])["terms"]) == {"diffusion"}
    with Image.open(run / "stage3" / "validation" / "step-00000002" / "people.png") as sheet:
        assert sheet.width == 128 * 5  # the photo, and two prompts without and with
    assert not same(tensors(run / "stage1" / "model"), tensors(run / "stage2" / "model"))


def test_stopped_and_resumed_has_the_losses_of_the_run_in_one_piece(trained, tmp_path):
    model, config = trained
    for stop in (1, 0):
        loop = replace(config.loop, stop_at=stop, validate_every=0)
        made = train_pulid(replace(config, loop=loop), DrawnPeople(4), tmp_path, resume=stop == 0)
        assert is_result(made) == (stop == 0)
    equal_losses(model.parent, made.parent)
    assert same(tensors(model), tensors(made))
    with pytest.raises(InputError, match="finished stage already; add --resume"):
        train_pulid(config, DrawnPeople(4), tmp_path)


def test_the_base_is_untouched_and_gradients_reach_every_weight():
    config = load_config(None, [*SMALL, "drop_identity=0.5", "drop_text=0.5"], "tiny")
    models = Models(config)
    before = {k: v.clone() for k, v in models.base.unet.state_dict().items()}
    processors = dict(models.base.unet.attn_processors)
    system = new_system(replace(config, encoder=replace(config.encoder, init="random")), models.base)
    task = models.task(system, 3, DrawnPeople(4))
    batch = next(iter(DrawnPeople(4).micro_batches(0, 0, 0, 1, 2, 1)))
    terms = task.losses(batch, Step(0, 0, 2))
    sum(terms.values()).backward()
    silent = [n for n, p in system.named_parameters() if p.grad is None or not bool(p.grad.abs().sum())]
    assert not silent
    assert {"identity_distance", "semantic", "layout", "faces_found"} <= set(task.logs())
    task.close()
    assert models.base.unet.attn_processors == processors
    assert all(torch.equal(v, before[k]) for k, v in models.base.unet.state_dict().items())


@pytest.mark.parametrize("passes", ["alternate", "shared"])
def test_passes_of_stage_3(passes):
    config = load_config(None, [*SMALL, f"loss.passes={passes}"], "tiny")
    models = Models(config)
    task = models.task(new_system(config, models.base), 3, DrawnPeople(4))
    seen = []
    for i, batch in enumerate(next(iter(DrawnPeople(4).micro_batches(s, 0, 0, 1, 2, 1))) for s in (0, 1)):
        seen.append(set(task.losses(batch, Step(0, i, 2))) - {"diffusion"})
    task.close()
    both = {"identity", "semantic", "layout"}
    assert seen == ([{"identity"}, both - {"identity"}] if passes == "alternate" else [both, both])


def test_the_naive_form_judges_the_one_step_prediction():
    config = load_config(None, [*SMALL, "loss.through=one", "drop_identity=0"], "tiny")
    models = Models(config)
    task = models.task(new_system(config, models.base), 2, DrawnPeople(4))
    batch = next(iter(DrawnPeople(4).micro_batches(0, 0, 0, 1, 2, 1)))
    terms = task.losses(batch, Step(0, 0, 2))
    task.close()
    assert set(terms) == {"diffusion", "identity"}
    # the prediction shows the sample's own noisy picture, a whole denoising from noise does not: it starts much nearer
    full = models.task(new_system(load_config(None, SMALL, "tiny"), models.base), 2, DrawnPeople(4))
    full.config = replace(config, loss=replace(config.loss, through="steps"))
    assert terms["identity"].item() < full.losses(batch, Step(0, 0, 2))["identity"].item()
    full.close()


def test_zero_init_begins_as_the_base_and_base_init_copies_it(trained):
    _, config = trained
    models = Models(config)
    zero = new_system(config, models.base)
    assert config.encoder.init == "zero" and not any(bool(v.abs().sum()) for _, v in zero.kv_weights().values())
    wide = replace(config, encoder=replace(config.encoder, init="base", output_dim=128))
    copied = new_system(wide, models.base)
    attn = models.base.unet.down_blocks[2].attentions[0].transformer_blocks[0].attn2
    k, v = copied.kv_weights()[1]
    assert torch.equal(k, attn.to_k.weight) and torch.equal(v, attn.to_v.weight)
    assert copied(features(2)).shape == (2, 10, 128)


def test_people_of_cached_latents_are_shown_decoded():
    class Latents(DrawnPeople):
        def micro_batches(self, *args):
            for batch in super().micro_batches(*args):
                batch.latents, batch.pixels = models.base.encode_pictures(batch.pixels), None
                yield batch

    models = Models(load_config(None, [*SMALL, "validation.count=2"], "tiny"))
    drawn, decoded = (models.guests(s) for s in (DrawnPeople(4), Latents(4)))
    for a, b in zip(drawn, decoded):
        away = np.abs(np.asarray(a.picture, np.int16) - np.asarray(b.picture, np.int16))
        assert a.name == b.name and away.max() <= 2 and torch.equal(a.features.id_cond, b.features.id_cond)


# -- SDXL's layout --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    from idcore.testing.tiny_models import tiny_pipeline

    folder = tmp_path_factory.mktemp("sdxl") / "base"
    tiny_pipeline("sdxl").save_pretrained(folder)
    return folder


def test_sdxl_layout_trains_resumes_and_generates(sdxl, tmp_path, monkeypatch):
    points = FixedFace([[5, 6], [11, 6], [8, 9], [6, 12], [10, 12]])
    monkeypatch.setattr(Models, "_locate", lambda self: points)
    more = (
        f"model.base={sdxl}", "model.dtype=float32", "model.resolution=16", "face.features=tiny-pulid",
        "loop.gradient_checkpointing=true", "loss.checkpoint_steps=true", "encoder.output_dim=64",
    )  # fmt: skip
    config = load_config(None, [*SMALL, *more])
    whole = train_pulid(config, Small(4), tmp_path / "whole")
    for stop in (1, 0):
        loop = replace(config.loop, stop_at=stop)
        made = train_pulid(replace(config, loop=loop), Small(4), tmp_path / "parts", resume=stop == 0)
    equal_losses(whole.parent, made.parent)
    assert same(tensors(whole), tensors(made))
    photo = tmp_path / "photo.png"
    gate_photo().save(photo)
    out = tmp_path / "pictures"
    done = CliRunner().invoke(app, [
        "generate", "--system", str(whole), "--base", str(sdxl), "--id", str(photo), "--prompt", "portrait", "--out",
        str(out), "--width", "16", "--height", "16", "--steps", "2",
    ])  # fmt: skip
    assert done.exit_code == 0, done.output + repr(done.exception)
    assert len(list(out.glob("*.png"))) == 1


def test_stable_diffusion_1_5_layout_trains_all_stages(tmp_path, monkeypatch):
    from idcore.testing.tiny_models import tiny_pipeline

    tiny_pipeline("sd").save_pretrained(tmp_path / "base")
    points = FixedFace([[5, 6], [11, 6], [8, 9], [6, 12], [10, 12]])
    monkeypatch.setattr(Models, "_locate", lambda self: points)
    more = (f"model.base={tmp_path / 'base'}", "model.dtype=float32", "model.resolution=16", "face.features=tiny-pulid")
    config = load_config(None, [*SMALL, *more, "encoder.output_dim=32", "loop.validate_every=0"])
    result = train_pulid(config, Small(4), tmp_path / "run")
    assert is_result(result) and len(tensors(result)) > 10
    rows = [json.loads(r) for r in (tmp_path / "run" / "stage3" / "losses.jsonl").read_text().splitlines()]
    assert {"diffusion", "identity", "semantic", "layout"} <= set(rows[-1]["terms"])


class Small(DrawnPeople):
    """16 pixel pictures, as the small SDXL draws."""

    def micro_batches(self, *args):
        for batch in super().micro_batches(*args):
            batch.pixels = torch.nn.functional.interpolate(batch.pixels, size=(16, 16), mode="area")
            batch.extra["landmarks"] = batch.extra["landmarks"] / 4
            yield batch


def gate_photo():
    from idcore.metrics.gate import gate_person

    return gate_person(1_000)


# -- the command line --------------------------------------------------------------------------------------------


def test_the_command_trains_from_pictures_and_generate_draws_with_its_result(tmp_path, monkeypatch):
    from idcore.training.data.procedural import procedural_folder

    data = procedural_folder(tmp_path / "people", 6, progress=False)
    sets = [x for s in (*SMALL, "validation.count=1") for x in ("--set", s)]
    args = ["train", "pulid", "--base", "tiny", "--data", str(data), "--out", str(tmp_path / "run"), *sets]
    done = CliRunner().invoke(app, [*args, "--stage", "2"])
    assert isinstance(done.exception, InputError) and "stage 2 begins with the weights" in str(done.exception)
    assert not (tmp_path / "run" / "prepared").exists()  # before the pictures are prepared
    done = CliRunner().invoke(app, [*args, "--stage", "1"])
    assert done.exit_code == 0, done.output + repr(done.exception)
    done = CliRunner().invoke(app, [*args, "--stage", "2,3", "--resume"])
    assert done.exit_code == 0, done.output + repr(done.exception)
    said = shlex.split(done.stderr.rsplit("use it with `", 1)[1].split("`")[0])
    result = tmp_path / "run" / "model"
    assert is_result(result) and (tmp_path / "run" / "prepared" / "manifest.json").is_file()
    photo = tmp_path / "photo.jpg"
    gate_photo().save(photo)
    pictures = {}
    for scale in ("0", "1"):
        out = tmp_path / f"pictures{scale}"
        done = CliRunner().invoke(app, [
            "generate", "--system", str(result), "--id", str(photo), "--prompt", "a photo", "--out", str(out),
            "--id-scale", scale,
        ])  # fmt: skip
        assert done.exit_code == 0, done.output + repr(done.exception)
        (path,) = out.glob("*.png")
        pictures[scale] = path.read_bytes()
    assert pictures["0"] != pictures["1"]
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, said[1:])  # what the training said, to the letter
    assert done.exit_code == 0 and len(list(Path("pictures").glob("*.png"))) == 1, done.output + repr(done.exception)
    me = tmp_path / "me.safetensors"
    done = CliRunner().invoke(app, ["encode", str(photo), "--system", str(result), "--out", str(me)])
    assert done.exit_code == 0, done.output + repr(done.exception)


def test_print_config_is_read_back_and_names_sources():
    done = CliRunner().invoke(app, ["train", "pulid", "--print-config"])
    assert done.exit_code == 0 and "P 4.1" in done.output and "our choice" in done.output


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--out", "x"], "--data FOLDER is missing"),
        (["--data", "x"], "--out FOLDER is missing"),
        (["--stage", "4"], '--stage is 1, 2, 3, "all"'),
        (["--set", "loss.identiy=1"], "did you mean 'loss.identity'"),
        (["--set", "loss.gradient_steps=5"], "gradient_steps must be at most loss.steps = 4"),
        (["--set", "loss.min_snr=5", "--set", "loss.diffusion_norm=norm"], "min_snr weighs mean squares"),
        (["--set", "result.layouts=kohya"], "result.layouts holds pulid, community or both"),
        (["--set", "result.mode=best"], "result.mode must be one of"),
        (["--set", "loop.steps=3"], "set stage1.steps, stage2.steps, stage3.steps; got loop.steps=3"),
        (["--set", "loss.alignment_prompts=none-such"], "no file and none of the shipped sets"),
        (["--set", "validation.prompts="], "need at least one each"),
    ],
)
def test_refusals_say_what_was_wanted(args, text):
    done = CliRunner().invoke(app, ["train", "pulid", *args])
    assert isinstance(done.exception, InputError) and text in str(done.exception)


def test_refusals_of_runs(trained, tmp_path):
    model, config = trained
    with pytest.raises(InputError, match="stage 2 begins with the weights of stage 1"):
        train_pulid(config, DrawnPeople(4), tmp_path, stages=[2])
    with pytest.raises(InputError, match="stage 3 begins with the weights of stage 2, which --stage leaves out"):
        train_pulid(config, DrawnPeople(4), tmp_path, stages=[1, 3])
    assert not (tmp_path / "stage1").exists()
    with pytest.raises(InputError, match="stages 1, 2 and 3"):
        train_pulid(config, DrawnPeople(4), tmp_path, stages=[0])
    other = replace(config, encoder=replace(config.encoder, width=24), init=str(model / "pulid.safetensors"))
    with pytest.raises(WeightsError, match="Set encoder"):
        train_pulid(other, DrawnPeople(4), tmp_path, stages=[1])
    with pytest.raises(InputError, match="64x64 pixels, got 768x768"):
        Models(load_config(None, [*SMALL, "model.resolution=768"], "tiny"))
    with pytest.raises(InputError, match="compile"):
        Models(replace(config, loop=replace(config.loop, compile=True)))
    with pytest.raises(WeightsError, match="no result of a training"):
        read_result(tmp_path)


def test_the_paper_s_settings_are_the_defaults(tmp_path):
    c = PuLIDTrainConfig()
    assert (c.loss.identity, c.loss.semantic, c.loss.layout, c.loss.steps) == (1.0, 0.6, 0.1, 4)
    assert c.model.resolution == 768 and c.loss.identity_prompt == "portrait, color, cinematic"
    assert c.loss.gradient_steps == 4 and c.encoder_config().output_dim == 2048
    file = tmp_path / "all.yaml"
    file.write_text(as_text(c))
    assert load(PuLIDTrainConfig, file) == c
