"""What SeFi-IDE's training calls: the expander, a batch's stage text, the attention loss, with gradients."""

import math

import pytest
import torch
from sefi_naive import WIDTHS

import idcore
from idcore.attention.staged import AttentionLoss
from idcore.errors import InputError
from idcore.systems.sefi_ide import SeFiTokens, check_aligned, class_word_embeddings, stage_text, staged_unet, watching
from idcore.systems.stage_expander import StageExpander
from idcore.testing.tiny_models import tiny_inputs, tiny_pipeline


def tokens(kind="sd", stages=5, seed=0, **how):
    torch.manual_seed(seed)
    made = SeFiTokens(class_word_embeddings(tiny_pipeline(kind), "x"), stages, heads=2, head_dim=8, **how)
    for e in made.expanders:
        torch.nn.init.normal_(e.out.weight, std=0.02)
    return made.eval()


def test_the_expander_begins_at_the_class_word_and_equals_its_formula():
    start = torch.randn(16)
    fresh = StageExpander(start, 6, heads=2, head_dim=4).eval()
    assert torch.equal(fresh(), start.expand(6, 16))
    torch.nn.init.normal_(fresh.out.weight)
    s = {k: v.double() for k, v in fresh.state_dict().items()}

    def norm(x, name):
        x = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
        return x * s[f"{name}.weight"] + s[f"{name}.bias"]

    x = s["start"]
    for name in ("attention1", "attention2"):  # one token attends to itself alone
        value = s[f"{name}.to_qkv.weight"][16:] @ norm(x, f"{name}.norm")
        x = x + s[f"{name}.to_out.weight"] @ value + s[f"{name}.to_out.bias"]
    both = s["gate.weight"] @ norm(x, "norm") + s["gate.bias"]
    a, g = both[:64], both[64:]
    out = s["out.weight"] @ (a * g * 0.5 * (1 + torch.erf(g / math.sqrt(2)))) + s["out.bias"]
    assert torch.allclose(fresh().double(), out.view(6, 16) + start.double(), atol=1e-5)
    assert not torch.equal(StageExpander(start, 6, residual=False).eval()(), start.expand(6, 16))


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_batchs_text_is_that_of_the_attached_person_at_each_samples_stage(kind):
    pipe, made = tiny_pipeline(kind), tokens(kind)
    me = made.identity("x", base="b")
    assert me.tokens.shape == (1, 10, sum(WIDTHS[kind])) and me.meta["base"] == "b" and not made.training
    prompts, stage = ["a V*", "V* b", "c V*"], torch.tensor([4, 0, 2])
    text, pooled = stage_text(pipe, prompts, made(), stage, class_word="x")
    width = sum(WIDTHS[kind])
    assert text.shape == (3, 77, 3 * width) and text.requires_grad and (pooled is None) == (kind == "sd")
    with idcore.attach(pipe, None, me), torch.no_grad():
        whole = pipe.encode_prompt(prompt=prompts, device="cpu", num_images_per_prompt=1,
                                   do_classifier_free_guidance=False)  # fmt: skip
    parts = whole[0].unflatten(-1, (11, width))
    for b, s in enumerate(stage.tolist()):
        for mine, theirs in zip(text[b].detach().unflatten(-1, (3, width)).unbind(1), (0, 1 + s, 6 + s)):
            assert torch.allclose(mine, parts[b, :, theirs], atol=1e-5)
    if pooled is not None:
        assert torch.allclose(pooled, whole[2], atol=1e-5)


@pytest.mark.parametrize("kind, checkpointing", [("sd", False), ("sdxl", False), ("sd", True)])
def test_gradients_through_the_unet_reach_the_expander(kind, checkpointing):
    pipe, made = tiny_pipeline(kind), tokens(kind)
    inputs = tiny_inputs(kind, batch=2) | {"timestep": torch.tensor([950, 120])}
    reference = []
    for again in (False, True):
        made.zero_grad()
        with staged_unet(pipe.unet) as staged:
            if again and checkpointing:
                pipe.unet.train().enable_gradient_checkpointing()
            staged.begin(inputs["timestep"], torch.device("cpu"))
            text, _ = stage_text(pipe, ["a V*", "V*"], made(), staged.stage, class_word="x")
            loss = AttentionLoss(pipe.unet, staged, text, weight=3.0)
            with watching(pipe.unet, loss):
                out = pipe.unet(**inputs | {"encoder_hidden_states": text}).sample
                (out.square().mean() + loss.total()).backward()
        reference.append([p.grad.clone() for p in made.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*reference))
    assert sum(g.abs().max() > 0 for g in reference[0]) > 0.7 * len(reference[0])
    assert all(p.grad is None for p in pipe.unet.parameters()) and not pipe.unet._forward_pre_hooks


def test_the_attention_loss_is_the_papers_with_a_still_reference():
    pipe, made = tiny_pipeline(), tokens()
    for module in (pipe.unet, pipe.text_encoder, made):
        module.double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in tiny_inputs(batch=2).items()}
    inputs["timestep"] = torch.tensor([950, 120])
    shown = {}

    def keep(name):
        return lambda m, a: shown.__setitem__(name, a[0])

    with staged_unet(pipe.unet) as staged:
        staged.begin(inputs["timestep"], torch.device("cpu"))
        text, _ = stage_text(pipe, ["a V*", "V*"], made(), staged.stage, class_word="x")
        some = {"all": AttentionLoss(pipe.unet, staged, text),
                "down": AttentionLoss(pipe.unet, staged, text, layers=["down_blocks"], weight=1.0,
                                      tokens=torch.arange(77) < 4)}  # fmt: skip
        hooks = [layer.to_q.register_forward_pre_hook(keep(n)) for n, layer in some["all"].layers.items()]
        for loss in some.values():
            with watching(pipe.unet, loss), torch.no_grad():
                pipe.unet(**inputs | {"encoder_hidden_states": text})
        for h in hooks:
            h.remove()
        layers = some["all"].layers
    reference, keys, _ = text.detach().chunk(3, -1)

    def naive(names, count):
        total = []
        for n in names:
            attn = layers[n]
            q, k, r = attn.to_q(shown[n]), attn.to_k(keys), attn.to_k(reference)
            d, maps = q.shape[-1] // attn.heads, []
            for h in range(0, q.shape[-1], d):
                cut = slice(h, h + d)
                a, b = ((q[..., cut] @ t[..., cut].transpose(1, 2) / math.sqrt(d)).softmax(-1) for t in (k, r))
                maps.append((a - b)[..., :count].square())
            total.append(torch.stack(maps).mean())
        return torch.stack(total).mean()

    assert torch.allclose(some["all"].total(), 0.003 * naive(list(layers), 77), rtol=1e-6)
    down = [n for n in layers if "down_blocks" in n]
    assert 0 < len(down) < len(layers) and torch.allclose(some["down"].total(), naive(down, 4), rtol=1e-6)


def test_a_bank_of_all_stages_is_read_at_each_samples_stage():
    pipe, made = tiny_pipeline(), tokens()
    inputs = tiny_inputs(batch=2) | {"timestep": torch.tensor([950, 120])}
    with staged_unet(pipe.unet) as staged, torch.no_grad():
        staged.begin(inputs["timestep"], torch.device("cpu"))
        each, _ = stage_text(pipe, ["a V*", "V*"], made(), staged.stage, class_word="x")
        with idcore.attach(tiny_pipeline(), None, made.identity("x")) as handle:
            assert handle.stages == 5
        other = tiny_pipeline()
        with idcore.attach(other, None, made.identity("x")):
            every = other.encode_prompt(["a V*", "V*"], "cpu", 1, False)[0]
        losses, outs = [], []
        for text in (each, every):
            with watching(pipe.unet, AttentionLoss(pipe.unet, staged, text)) as loss:
                outs.append(pipe.unet(**inputs | {"encoder_hidden_states": text}).sample)
            losses.append(loss.total())
    assert torch.allclose(*outs, atol=1e-5) and torch.allclose(*losses, rtol=1e-4)


def test_errors_say_what_to_do():
    pipe = tiny_pipeline()
    with staged_unet(pipe.unet) as staged:
        with pytest.raises(InputError, match="the text has the plain width 32, wanted staged text"):
            AttentionLoss(pipe.unet, staged, torch.zeros(1, 77, 32))
        with pytest.raises(InputError, match=r"no cross-attention layer has one of \['nowhere'\]"):
            AttentionLoss(pipe.unet, staged, torch.zeros(1, 77, 96), layers=["nowhere"])
        with pytest.raises(InputError, match="no layer was shown"):
            AttentionLoss(pipe.unet, staged, torch.zeros(1, 77, 96)).total()
    check_aligned(pipe, "V*", "x")
    with pytest.raises(InputError, match="takes one position and the class word 'person' 6"):
        check_aligned(pipe, "V*", "person")
    with pytest.raises(InputError, match="has no token"):
        class_word_embeddings(pipe, " ")
    with pytest.raises(InputError, match="from 1 to 10, got 0"):
        SeFiTokens([torch.zeros(4)], 0)
