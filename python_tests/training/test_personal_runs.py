"""Textual inversion and DreamBooth on tiny random Stable Diffusion and SDXL models: train, resume, save, load, draw."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import idcore
from idcore.cli import app
from idcore.errors import InputError
from idcore.systems.lora import load_lora
from idcore.testing.tiny_models import tiny_pipeline
from idcore.text.inversion import read_words
from idcore.training.bases.sd15 import SD15Base
from idcore.training.bases.sdxl import SDXLBase
from idcore.training.contract import Batch, Step
from idcore.training.personal.config import BoothConfig, InversionConfig, load_config
from idcore.training.personal.dreambooth import BoothTask, class_pictures, train_dreambooth
from idcore.training.personal.textual_inversion import InversionTask, LearnedWords, train_textual_inversion
from idcore.training.tuning import ADAPTER

BASES = {"sd": SD15Base, "sdxl": SDXLBase}
SMALL = (
    "model.base=random", "model.dtype=float32", "person.class_word=x", "loop.steps=2", "loop.batch=2", "loop.lr=1e-2",
    "loop.trackers=", "validation.faces=null", "validation.steps=2", "validation.prompts=a {person}",
)  # fmt: skip
BOOTH = (*SMALL, "prior.count=3", "prior.steps=1", "prior.guidance=1", "tune.rank=2")


def photo(seed=0, size=40):
    g = torch.Generator().manual_seed(seed)
    return Image.fromarray((torch.rand(size, size + 8, 3, generator=g) * 255).byte().numpy())


def base_of(kind="sd"):
    return BASES[kind](tiny_pipeline(kind), name=f"random {kind}")


def draw(pipe, prompt):
    seed = torch.Generator().manual_seed(0)
    call = dict(num_inference_steps=2, guidance_scale=1.0, output_type="pt", height=16, width=16, generator=seed)
    return pipe(prompt, **call).images


def losses_of(folder):
    return [json.loads(line)["terms"] for line in (folder / "losses.jsonl").read_text().splitlines()]


def command(name, tmp_path, settings):
    pairs = [s for pair in settings[1:] for s in ("--set", pair)]
    line = ["train", name, "--base", str(tmp_path / "base"), "--images", str(tmp_path / "me.png")]
    return CliRunner().invoke(app, [*line, "--out", str(tmp_path / "run"), *pairs], catch_exceptions=False)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_words_by_the_command_and_back_into_pictures(kind, tmp_path):
    pipe = tiny_pipeline(kind)
    pipe.save_pretrained(tmp_path / "base")
    photo().save(tmp_path / "me.png")
    made = command("textual-inversion", tmp_path, (*SMALL, "person.words=2", "loop.validate_every=2"))
    assert made.exit_code == 0 and "--id" in made.stderr, made.output
    result = tmp_path / "run" / "model"
    assert "textual inversion" in (result / "README.md").read_text()
    assert len(list((tmp_path / "run" / "validation").rglob("person.png"))) >= 1
    person = read_words(result / "learned_embeds.safetensors")
    assert person.tokens.shape == (1, 2, 32 if kind == "sd" else 64) and person.meta["placeholder"] == "S*"
    with idcore.attach(pipe, None, person):
        assert not torch.allclose(draw(pipe, "a S*"), draw(pipe, "a x"))
    line = ["generate", "--base", str(tmp_path / "base"), "--id", str(result / "learned_embeds.safetensors"), "--steps"]
    size = ["2", "--width", "16", "--height", "16", "--prompt", "a S*", "--out", str(tmp_path / "drawn")]
    drawn = CliRunner().invoke(app, [*line, *size], catch_exceptions=False)
    assert drawn.exit_code == 0 and (tmp_path / "drawn" / "000_seed0.png").is_file(), drawn.output


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_lora_by_the_command_and_back_into_pictures(kind, tmp_path):
    pipe = tiny_pipeline(kind)
    pipe.save_pretrained(tmp_path / "base")
    photo().save(tmp_path / "me.png")
    made = command("dreambooth", tmp_path, BOOTH)
    assert made.exit_code == 0 and "--style" in made.stderr, made.output
    assert [p.name for p in sorted((tmp_path / "run" / "class").glob("*.png"))] == ["0000.png", "0001.png", "0002.png"]
    assert set(losses_of(tmp_path / "run")[0]) == {"person", "class"}
    plain, weights = draw(pipe, "sks x"), tmp_path / "run" / "model" / "pytorch_lora_weights.safetensors"
    with load_lora(pipe, weights):
        ours = draw(pipe, "sks x")
    assert not torch.allclose(ours, plain) and torch.allclose(draw(pipe, "sks x"), plain)
    pipe.load_lora_weights(weights)  # diffusers' own reading
    assert torch.allclose(draw(pipe, "sks x"), ours, atol=1e-5)
    line = [
        "generate",
        "--base",
        str(tmp_path / "base"),
        "--style",
        str(weights),
        "--prompt",
        "a sks x",
        "--steps",
        "1",
    ]
    drawn = CliRunner().invoke(app, [*line, "--width", "16", "--height", "16", "--out", str(tmp_path / "drawn")])
    assert drawn.exit_code == 0 and (tmp_path / "drawn" / "000_seed0.png").is_file(), drawn.output


@pytest.mark.parametrize("name", ["words", "lora"])
def test_a_stopped_run_goes_on_with_the_same_losses(name, tmp_path):
    train, cls, small = {
        "words": (train_textual_inversion, InversionConfig, SMALL), "lora": (train_dreambooth, BoothConfig, BOOTH)
    }[name]  # fmt: skip
    whole = (*small, "loop.steps=4")
    train(load_config(cls, None, whole), tmp_path / "a", images=[photo()], base=base_of())
    train(load_config(cls, None, (*whole, "loop.stop_at=2")), tmp_path / "b", images=[photo()], base=base_of())
    made = train(load_config(cls, None, whole), tmp_path / "b", images=[photo()], base=base_of(), resume=True)
    assert losses_of(tmp_path / "a") == losses_of(tmp_path / "b") and made == tmp_path / "b" / "model"
    weights = next(p for p in made.iterdir() if p.suffix == ".safetensors").name
    a, b = (load_file(tmp_path / run / "model" / weights) for run in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(InputError, match="holds a finished training already; add --resume"):
        train(load_config(cls, None, whole), tmp_path / "a", images=[photo()], base=base_of())


def test_only_the_words_train_and_they_begin_as_the_class_word():
    base = base_of("sdxl")
    task = InversionTask(load_config(InversionConfig, None, (*SMALL, "person.words=3")), base)
    assert [tuple(p.shape) for p in task.module.parameters()] == [(3, 32), (3, 32)]
    words = LearnedWords([torch.arange(4.0)], 3)
    assert torch.equal(words.vectors[0][0], torch.arange(4.0)) and not torch.equal(
        words.vectors[0][1], torch.arange(4.0)
    )
    batch = Batch(["a"], torch.tensor([0]), ["a S*"], torch.randn(1, 3, 16, 16), sizes=None)
    task.losses(batch, Step(0, 0, 1))["diffusion"].backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in task.module.parameters())
    assert not any(p.requires_grad for p in base.unet.parameters())


def test_prior_preservation_weighs_the_class():
    config = load_config(BoothConfig, None, (*BOOTH, "prior.weight=0.5"))
    task = BoothTask(config, base_of())
    groups = {"group": torch.tensor([0, 0, 0, 1])}
    batch = Batch(list("abcd"), torch.arange(4), ["a"] * 4, torch.zeros(4, 3, 16, 16), extra=groups)
    terms = task.terms(batch, lambda rows: rows.float().mean())
    assert float(terms["person"]) == 1.0 * 2 * 3 / 4 and float(terms["class"]) == 0.5 * 3.0 * 2 * 1 / 4
    task.close()
    alone = BoothTask(load_config(BoothConfig, None, (*BOOTH, "prior.weight=0")), base := base_of())
    assert set(alone.terms(batch, lambda rows: rows.float().mean())) == {"person"}
    alone.close()
    with load_lora(base.pipe, task.tuned.lora()):  # wrappers of a LoRA that was taken off do not hide the layers
        pass
    BoothTask(config, base).close()
    assert not any(ADAPTER in n for n, _ in base.unet.named_parameters())


def test_class_pictures_are_kept_and_hang_on_their_number_alone(tmp_path):
    config, base = load_config(BoothConfig, None, BOOTH), base_of()
    group = class_pictures(config, base, 16, tmp_path)
    first = [p.read_bytes() for p in group.pictures]
    group.pictures[1].unlink()
    group.pictures[0].write_bytes(b"mine")
    again = class_pictures(config, base, 16, tmp_path)
    assert again.pictures[1].read_bytes() == first[1] and again.pictures[0].read_bytes() == b"mine"
    assert again.prompts == ("a photo of a x",) and len(set(first)) == 3
    wrong = load_config(BoothConfig, None, (*BOOTH, f"prior.pictures={tmp_path}/none"))
    with pytest.raises(InputError, match="prior.pictures is no folder: .*none; null lets the base draw them"):
        class_pictures(wrong, base, 16, tmp_path)


def test_whole_weights_make_a_pipeline(tmp_path):
    from diffusers import StableDiffusionPipeline

    config = load_config(BoothConfig, None, (*BOOTH, "tune.weights=full", "prior.weight=0"))
    made = train_dreambooth(config, tmp_path, images=[photo()], base=base_of())
    pipe = StableDiffusionPipeline.from_pretrained(made / "pipeline", safety_checker=None)
    assert not torch.equal(pipe.unet.conv_in.weight, tiny_pipeline("sd").unet.conv_in.weight)


def test_what_cannot_be_learned_is_said(tmp_path):
    with pytest.raises(InputError, match="train dreambooth: no photo; give --images PHOTO"):
        train_dreambooth(load_config(BoothConfig, None, BOOTH), tmp_path, base=base_of())
    with pytest.raises(InputError, match=r"person.prompts must name the person by S\* or {person}, got 'a face'"):
        load_config(InversionConfig, None, (*SMALL, "person.prompts=a face"))
    with pytest.raises(InputError, match="person.class_word is empty"):
        load_config(BoothConfig, None, ("person.class_word= ",))
    with pytest.raises(InputError, match="a placeholder must be a word without blanks"):
        load_config(BoothConfig, None, ("person.identifier=a b",))
    with pytest.raises(InputError, match="min_snr weighs mean squares"):
        load_config(InversionConfig, None, ("loss.min_snr=5", "loss.diffusion_norm=norm"))
    missing = CliRunner().invoke(app, ["train", "textual-inversion", "--out", str(tmp_path / "x")])
    assert missing.exit_code == 1 and "--images PHOTO is missing" in str(missing.exception)
    shown = CliRunner().invoke(app, ["train", "dreambooth", "--print-config"])
    assert shown.exit_code == 0 and "DB 3.2" in shown.stdout and "count: 48" in shown.stdout
