"""DreamIdentity: one pass to k words, kept in the names' range; weights, photos, a whole pipeline, the command line."""

import json

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import idcore
from idcore.cli import app
from idcore.demo import PHOTO
from idcore.encoders.face_crops import FaceCrops
from idcore.encoders.face_vit import FaceViT, FaceViTConfig
from idcore.errors import InputError, WeightsError
from idcore.files import write_safetensors
from idcore.systems.dreamidentity import DreamIdentity, DreamIdentityConfig, words_penalty
from idcore.systems.loading import load_system, system_of
from idcore.systems.words import encode_with_words
from idcore.testing.tiny_models import tiny_pipeline
from idcore.text.inversion import write_words
from idcore.text.names import name_statistics

VIT = FaceViTConfig(image_size=16, patch_size=8, width=32, depth=4, heads=2, mlp_dim=48, id_dim=6)


def system(widths=(32,), **config):
    torch.manual_seed(0)
    made = DreamIdentity(DreamIdentityConfig(vit=VIT, widths=widths, taps=(1, 2, 4), hidden=20, **config))
    g = torch.Generator().manual_seed(5)
    size = sum(widths)
    made.set_names(torch.randn(size, generator=g) * 0.01, torch.rand(size, generator=g) * 0.02 + 0.005)
    return made.eval()


def naive_words(s, pixels):
    """Float64, one head after the other, AdaIN as StableIdentity writes it."""
    identity, taps = s.vit.double()(pixels.double(), s.config.taps)
    v = torch.cat([*taps, identity], -1)
    words = []
    for head in s.heads.double():
        x = (v - v.mean(-1, keepdim=True)) / (v.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        x = (x * head.norm.weight + head.norm.bias) @ head.fc1.weight.T + head.fc1.bias
        x = torch.where(x > 0, x, 0.2 * x) @ head.fc2.weight.T + head.fc2.bias
        at, parts = 0, []
        for w in s.config.widths:
            part, cut = x[:, at : at + w], slice(at, at + w)
            mu = part.sum(-1, keepdim=True) / w
            sigma = ((part - mu).square().sum(-1, keepdim=True) / (w - 1)).sqrt()
            parts.append(s.name_std.double()[cut] * (part - mu) / sigma + s.name_mean.double()[cut])
            at += w
        words.append(torch.cat(parts, -1) if s.config.adain else x)
    return torch.stack(words, 1)


@pytest.mark.parametrize("widths, adain", [((32,), True), ((32, 48), True), ((32,), False)])
def test_words_are_the_papers_formula(widths, adain):
    made, pixels = system(widths, adain=adain, words=3), torch.randn(2, 3, 16, 16)
    assert made.config.length == 3 * 32 + 6
    with torch.no_grad():
        got = made(pixels)
        truth = naive_words(made, pixels)
    assert got.shape == (2, 3, sum(widths)) and torch.allclose(got.double(), truth, atol=1e-6)


def test_trained_words_stay_in_the_names_range_however_large_the_heads_output():
    made = system()
    with torch.no_grad():
        for head in made.heads:
            head.fc2.weight.mul_(1e4)
        words = made(torch.randn(4, 3, 16, 16))
    assert ((words - made.name_mean) / made.name_std).abs().max() < 6
    assert float(words_penalty(torch.full((2, 3, 4), 2.0))) == pytest.approx(0.01 * 3 * 4 * 4)


@pytest.mark.parametrize("kind, widths", [("sd", (32,)), ("sdxl", (32, 32))])
def test_the_diffusion_loss_reaches_vit_and_heads_through_the_frozen_text_encoder(kind, widths):
    pipe, made = tiny_pipeline(kind), system(widths).train()
    words = made(torch.randn(2, 3, 16, 16)).split(list(widths), -1)
    text, pooled = encode_with_words(pipe, ["a S*", "S* as nurse"], {"S*": words})
    (text.square().mean() + (0 if pooled is None else pooled.square().mean())).backward()
    frozen = {"vit.blocks.3.mlp.fc1.weight"}
    grads = {n: p.grad for n, p in made.named_parameters()}
    assert all(g is not None and g.abs().max() > 0 for g in grads.values()) and frozen <= set(grads)
    assert all(p.grad is None for p in pipe.text_encoder.parameters())


def test_one_forward_pass_per_photo_is_measured(monkeypatch):
    made = system()
    made.preprocess = FaceCrops(16)
    passes = []
    real = FaceViT.forward
    monkeypatch.setattr(FaceViT, "forward", lambda self, x, taps=(): passes.append(len(x)) or real(self, x, taps))
    me = made.encode(PHOTO)
    assert passes == [1] and me.tokens.shape == (1, 2, 32) and me.uncond_tokens is None
    assert made.timing["forward_ms"] > 0 and made.timing["preprocess_ms"] > 0
    two = made.encode([PHOTO, PHOTO])
    assert passes == [1, 2] and torch.allclose(two.tokens, me.tokens, atol=1e-6) and two.meta["photos"] == 2
    pixels = made.preprocess(PHOTO)
    assert pixels.shape == (1, 3, 16, 16) and pixels.min() >= -1 and pixels.max() <= 1 and pixels.std() > 0.1


@pytest.mark.parametrize("kind, widths", [("sd", (32,)), ("sdxl", (32, 32))])
def test_saved_and_loaded_and_drawn(tmp_path, kind, widths):
    made, pipe = system(widths), tiny_pipeline(kind)
    path = made.save(tmp_path / "d.safetensors")
    back = DreamIdentity.from_weights(path)
    pixels = torch.randn(1, 3, 16, 16)
    me, again = made.encode(pixels), back.encode(pixels)
    assert back.config == made.config and torch.equal(me.tokens, again.tokens) and me.meta == again.meta
    me.save(tmp_path / "me.safetensors")
    me = idcore.Identity.load(tmp_path / "me.safetensors")

    def draw(prompt):
        return torch.as_tensor(pipe(prompt, num_inference_steps=2, height=16, width=16, output_type="np",
                                    generator=torch.Generator().manual_seed(0)).images)  # fmt: skip

    with idcore.attach(pipe, back, me) as handle:
        by_system = draw("a photo of S* as a nurse")
        assert "dreamidentity" in repr(handle)
    with idcore.attach(pipe, None, me):
        assert torch.equal(draw("a photo of S* as a nurse"), by_system), "a saved identity needs no encoder weights"
    assert not torch.equal(draw("a photo of S* as a nurse"), by_system)


def test_a_timm_file_makes_an_encoder_to_be_trained(tmp_path):
    vit = FaceViT(FaceViTConfig(image_size=16, patch_size=8, width=64, depth=8, heads=1, mlp_dim=32, id_dim=0))
    path = write_safetensors(tmp_path / "vit.safetensors", vit.state_dict())
    made = DreamIdentity.from_vit(FaceViT.from_weights(path, image_size=24), (32,), hidden=8)
    assert made.config.taps == (2, 4, 6, 8) and made.config.length == 5 * 64 and made.config.vit.image_size == 24
    assert torch.equal(made.vit.blocks[5].mlp.fc1.weight, vit.blocks[5].mlp.fc1.weight)
    assert all(p.requires_grad for p in made.parameters())


def test_statistics_of_names_come_from_the_word_embeddings():
    pipe = tiny_pipeline("sdxl")
    mean, std = name_statistics(pipe, ["x y", "y Zed z"])  # single letters are tokens of the byte tokenizer
    tables = [e.get_input_embeddings().weight for e in (pipe.text_encoder, pipe.text_encoder_2)]
    ids = [pipe.tokenizer(c, add_special_tokens=False)["input_ids"][0] for c in "xyz"]
    rows = torch.cat([t[ids] for t in tables], -1)
    assert torch.allclose(mean, rows.mean(0), atol=1e-6) and torch.allclose(std, rows.std(0), atol=1e-6)
    with pytest.raises(InputError, match="of 1 words of names 0 are one token"):
        name_statistics(pipe, ["Zed"])


def test_errors_say_what_to_do(tmp_path):
    made = system()
    with pytest.raises(InputError, match=r"preprocess=FaceCrops"):
        made.encode(PHOTO)
    write_safetensors(tmp_path / "x", {"a": torch.zeros(1)})
    with pytest.raises(WeightsError, match="holds no DreamIdentity encoder"):
        DreamIdentity.from_weights(tmp_path / "x")
    write_safetensors(tmp_path / "y", made.state_dict(), {"format": "idcore-dreamidentity", "idcore_config": "{}"})
    with pytest.raises(WeightsError, match="config in the file's metadata is damaged"):
        DreamIdentity.from_weights(tmp_path / "y")
    with pytest.raises(InputError, match="different blocks of 1 to 4"):
        DreamIdentityConfig(vit=VIT, taps=(5,))
    with pytest.raises(InputError, match="one or two widths"):
        DreamIdentityConfig(widths=(1, 2, 3))
    with pytest.raises(WeightsError, match="dreamidentity needs weights that were trained for this base model"):
        load_system(None, system="dreamidentity")
    with pytest.raises(InputError, match="template must be one of"):
        FaceCrops(16, template="square")


def test_the_command_line_encodes_and_draws(tmp_path):
    run = CliRunner()
    path = system().save(tmp_path / "d.safetensors")
    tiny_pipeline().save_pretrained(tmp_path / "base")
    assert system_of(path) == "dreamidentity"
    me = tmp_path / "me.safetensors"
    encoder = ["--system", "dreamidentity", "--weights", str(path)]
    done = run.invoke(app, ["encode", str(PHOTO), "--out", str(me), *encoder])
    assert done.exit_code == 0 and "one forward pass for 1 photo: " in done.stderr, done.stderr
    words = write_words(tmp_path / "learned_embeds.safetensors", idcore.Identity.load(me).tokens[0], [32], "<me>")
    size = ["--width", "16", "--height", "16", "--steps", "2"]

    def draw(name, who, *more, prompt="a photo of S* as a nurse"):
        out = tmp_path / name
        done = run.invoke(app, ["generate", "--prompt", prompt, "--out", str(out), "--base", str(tmp_path / "base"),
                                "--id", str(who), *size, *more])  # fmt: skip
        return done, sorted(Image.open(p).tobytes() for p in out.glob("*.png"))

    saved = draw("a", me)
    assert saved[0].exit_code == 0, saved[0].exception
    assert saved[1] == draw("b", PHOTO, *encoder)[1]
    assert saved[1] == draw("c", words, prompt="a photo of <me> as a nurse")[1]
    assert saved[1] == draw("d", me, "--placeholder", "T*", prompt="a photo of T* as a nurse")[1]
    assert saved[1] != draw("e", me, "--id-scale", "0")[1]
    assert json.loads((tmp_path / "d" / "generate.json").read_text())["request"]["placeholder"] == "T*"
    wrong = draw("f", me, prompt="a nurse")[0]
    assert isinstance(wrong.exception, InputError) and "which does not say S*" in str(wrong.exception)
