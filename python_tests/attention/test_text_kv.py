"""Keys and values of the text: projected once per prompt, and never used where they are not true any more."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import nn

from idcore.attach import attach
from idcore.attention.text_kv import TextKeys
from idcore.testing.tiny_models import TinySystem, tiny_inputs, tiny_unet

WIDTH, CHANNELS = 8, 12


@pytest.fixture
def counted(monkeypatch):
    """How often a text of the tiny UNet's width went through a linear layer."""
    seen, real = [], F.linear

    def linear(x, w, b=None):
        seen.append(tuple(x.shape))
        return real(x, w, b)

    monkeypatch.setattr(F, "linear", linear)
    return seen


def steps(unet, inputs, count=3):
    with torch.no_grad():
        return [unet(**inputs).sample for _ in range(count)]


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_once_per_prompt_in_a_denoising_loop(kind, counted):
    unet, inputs = tiny_unet(kind), tiny_inputs(kind, batch=2)
    text = inputs["encoder_hidden_states"]
    system = TinySystem(unet)
    with attach(unet, system, system.identity(), id_scale=0.7) as handle:
        layers = len(system.sites(unet))

        def projections():
            found = sum(shape == tuple(text.shape) for shape in counted)
            counted.clear()
            return found

        projections()
        first, again, _ = steps(unet, inputs)
        assert projections() == 2 * layers
        assert torch.equal(first, again)
        text.add_(0.5)  # in place
        changed = steps(unet, inputs, 2)[1]
        assert projections() == 2 * layers
        assert (changed - first).abs().max() > 1e-4
        other = steps(unet, inputs | {"encoder_hidden_states": text.clone()}, 2)[1]
        assert projections() == 2 * layers
        assert torch.equal(other, changed)
        steps(unet, inputs, 1)
        assert projections() == 0, "two prompts in turn are both kept"
        handle.refresh()
        steps(unet, inputs, 1)
        assert projections() == 2 * layers


def layer():
    torch.manual_seed(0)
    return nn.Linear(WIDTH, CHANNELS), nn.Linear(WIDTH, CHANNELS, bias=False)


def asked(keys, text, modules):
    return keys.get(text, modules, lambda t: tuple(m(t) for m in modules))


@pytest.fixture
def case():
    keys, modules, text = TextKeys(), layer(), torch.randn(2, 5, WIDTH)
    with torch.no_grad():
        pair = asked(keys, text, modules)
        assert asked(keys, text, modules) is pair
        yield keys, modules, text, pair


def true_now(keys, text, modules):
    got = asked(keys, text, modules)
    return all(torch.equal(a, m(text)) for a, m in zip(got, modules, strict=True))


def test_weights_changed_in_place_or_replaced(case):
    keys, modules, text, pair = case
    modules[0].weight.mul_(2)
    assert asked(keys, text, modules) is not pair and true_now(keys, text, modules)
    modules[0].bias.add_(1)
    assert true_now(keys, text, modules)
    modules[1].load_state_dict({"weight": torch.randn(CHANNELS, WIDTH)})
    assert true_now(keys, text, modules)
    modules[1].weight = nn.Parameter(torch.randn(CHANNELS, WIDTH))
    assert true_now(keys, text, modules)
    for m in modules:
        m.double()
    assert true_now(keys, text.double(), modules)


def test_autocast_is_part_of_the_question(case):
    keys, modules, text, pair = case
    with torch.autocast("cpu", torch.bfloat16):
        assert asked(keys, text, modules)[0].dtype == torch.bfloat16
    assert asked(keys, text, modules)[0].dtype == torch.float32


def test_nothing_is_kept_while_gradients_flow(case):
    keys, modules, text, _ = case
    keys.forget()
    with torch.enable_grad():
        for leaf in (modules[0].weight, text.requires_grad_()):
            k, v = asked(keys, text, modules)
            (k.sum() + v.sum()).backward()
            assert leaf.grad.abs().sum() > 0 and len(keys) == 0
            for m in modules:
                m.requires_grad_(False)
        text.requires_grad_(False)
        pair = asked(keys, text, modules)
        assert asked(keys, text, modules) is pair


def test_hooks_overridden_forwards_and_other_classes_are_called(case):
    keys, modules, text, _ = case
    handle = modules[0].register_forward_hook(lambda m, given, out: out + 1)
    assert torch.equal(asked(keys, text, modules)[0], modules[0](text))
    handle.remove()
    modules[1].forward = lambda x: F.linear(x, modules[1].weight * 3)
    assert true_now(keys, text, modules)
    del modules[1].forward

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    other = (Doubled(WIDTH, CHANNELS), modules[1])
    keys.forget()
    assert true_now(keys, text, other) and len(keys) == 0


def test_inference_mode(case):
    """Kept tensors serve later calls with gradients; a text whose changes nobody counts is not kept."""
    keys, modules, text, _ = case
    keys.forget()
    with torch.inference_mode():
        assert not any(t.is_inference() for t in asked(keys, text, modules))
        loose = text.clone()
        asked(keys, loose, modules)
        loose.add_(1)
        assert true_now(keys, loose, modules) and len(keys) == 1


def test_memory_goes_with_the_prompt(case):
    keys, modules, text, _ = case
    texts = [torch.randn(1, 5, WIDTH) for _ in range(4)]
    for t in texts:
        asked(keys, t, modules)
    assert len(keys) == 2
    del t
    texts.clear()
    gc.collect()
    assert len(keys) == 0
    assert len(copy.deepcopy(keys)) == 0


def test_peft_lora(counted):
    unet, inputs = tiny_unet("sd"), tiny_inputs("sd", batch=1)
    text = tuple(inputs["encoder_hidden_states"].shape)
    system = TinySystem(unet)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False), "one")
    unet.eval()
    with attach(unet, system, system.identity(), id_scale=0.5):
        first, again = steps(unet, inputs, 2)
        asked_before = sum(shape == text for shape in counted)
        assert torch.equal(first, again)
        steps(unet, inputs, 1)
        assert sum(shape == text for shape in counted) == asked_before, "LoRA's keys and values are kept too"
        changes = [
            lambda: unet.set_adapters(["one"], [0.2]),
            lambda: unet.disable_adapters(),
            lambda: unet.enable_adapters(),
            lambda: [p.mul_(-1) for n, p in unet.named_parameters() if "lora_B" in n],
            lambda: unet.fuse_lora(),
            lambda: unet.unfuse_lora(),
        ]
        for change in changes:
            with torch.no_grad():
                change()
            ours = steps(unet, inputs, 2)
            fresh = steps(unet, inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"].clone()}, 1)[0]
            assert torch.equal(ours[0], ours[1]) and torch.equal(ours[0], fresh)
