"""What of a base trains: LoRA layers by name, saved and loaded on a fresh pipeline, taken off without a trace."""

import pytest
import torch

from idcore.errors import InputError
from idcore.lora_files import read_lora, write_lora
from idcore.systems.lora import load_lora
from idcore.testing.tiny_models import tiny_pipeline
from idcore.training.bases.sd15 import SD15Base
from idcore.training.bases.sdxl import SDXLBase
from idcore.training.tuning import Tuned, TuneSettings


def base_of(kind):
    return {"sd": SD15Base, "sdxl": SDXLBase}[kind](tiny_pipeline(kind))


def predicted(base, text):
    with torch.no_grad():
        t = text(["a photo of [V] style"], 16, 16)
        return base.predict(torch.ones(1, 4, 8, 8), torch.tensor([7]), t)


def trained(tuned):
    """A step of plain gradient descent that changes all that wants gradients."""
    text = tuned.text(["a photo of [V] style"], 16, 16)
    out = tuned.base.predict(torch.ones(1, 4, 8, 8), torch.tensor([7]), text)
    out.square().mean().backward()
    changed = 0
    with torch.no_grad():
        for name, p in tuned.module.named_parameters():
            if p.grad is None:
                continue
            if not name.endswith("lora_A.weight"):  # gradient 0 at first, as lora_B is 0
                p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
                changed += 1
    return changed


@pytest.mark.parametrize(
    "kind, layers, text_encoder, layout",
    [
        ("sd", "cross", False, "diffusers"),
        ("sd", "all", True, "kohya"),
        ("sd", "all", True, "peft"),
        ("sdxl", "all", True, "kohya"),
    ],
)
def test_a_lora_that_trained_here_draws_the_same_when_loaded(kind, layers, text_encoder, layout, tmp_path):
    base = base_of(kind)
    before = predicted(base, base.text)
    tuned = Tuned(base, TuneSettings(layers=layers, rank=3, alpha=6.0, text_encoder=text_encoder))
    torch.testing.assert_close(predicted(base, tuned.text), before)
    assert trained(tuned) > 0
    wanted = predicted(base, tuned.text)
    assert (wanted - before).abs().max() > 1e-4
    file = tmp_path / ("peft" if layout == "peft" else "style.safetensors")
    write_lora(tuned.lora(), file, layout, family="sdxl" if kind == "sdxl" else "sd15")
    fresh = base_of(kind)
    with load_lora(fresh.pipe, read_lora(file)):
        torch.testing.assert_close(predicted(fresh, fresh.text_live), wanted, rtol=1e-4, atol=1e-5)
    with Tuned(fresh, TuneSettings(layers=layers, rank=3, text_encoder=text_encoder)) as anew:
        assert anew.lora().layers.keys() == tuned.lora().layers.keys()
    torch.testing.assert_close(predicted(fresh, fresh.text_live), before)
    tuned.remove()
    assert torch.equal(predicted(base, base.text_live), before)
    assert not any("lora" in n for n, _ in base.unet.named_modules())
    with Tuned(base, TuneSettings(layers=layers, rank=3)):  # and again
        pass


def test_the_same_seed_begins_with_the_same_lora():
    states = []
    for seed in (0, 0, 1):
        with Tuned(base_of("sd"), TuneSettings(rank=2), seed) as tuned:
            states.append(tuned.module.state_dict())
    key = next(k for k in states[0] if "lora_A" in k)
    assert torch.equal(states[0][key], states[1][key]) and not torch.equal(states[0][key], states[2][key])


def test_whole_weights_train_and_the_pipeline_is_saved(tmp_path):
    from diffusers import StableDiffusionPipeline

    base = base_of("sd")
    tuned = Tuned(base, TuneSettings(weights="full", text_encoder=True))
    assert {k.partition(".")[0] for k in tuned.module.state_dict()} == {"unet", "text_encoder"}
    assert trained(tuned) > 100
    wanted = predicted(base, tuned.text)
    tuned.remove()
    assert not any(p.requires_grad for p in base.unet.parameters())
    saved = StableDiffusionPipeline.from_pretrained(tuned.save_pipeline(tmp_path / "pipeline"), safety_checker=None)
    again = SD15Base(saved)
    torch.testing.assert_close(predicted(again, again.text), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="whole weights train here"):
        tuned.lora()


def test_errors():
    base = base_of("sd")
    with Tuned(base, TuneSettings()), pytest.raises(InputError, match="the unet has the LoRA 'idcore_tuning' on it"):
        Tuned(base, TuneSettings())
    base.to("cpu", torch.bfloat16)
    with pytest.raises(InputError, match="trains in float32, it is torch.bfloat16; set model.dtype=float32"):
        Tuned(base, TuneSettings(weights="full"))
    tuned = Tuned(base, TuneSettings(rank=2))
    assert {p.dtype for p in tuned.module.parameters()} == {torch.float32}
    assert trained(tuned) > 0
