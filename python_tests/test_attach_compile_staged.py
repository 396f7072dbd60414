"""torch.compile of a UNet that reads staged text (SeFi-IDE): pictures of all stages, and training."""

import contextlib

import pytest
import torch
from attach_cases import SMALL
from torch._dynamo.testing import CompileCounter

import idcore
from idcore.attention.staged import AttentionLoss
from idcore.systems.sefi_ide import SeFiTokens, class_word_embeddings, stage_text, staged_unet, watching
from idcore.testing.tiny_models import tiny_inputs, tiny_pipeline, tiny_unet

TIMES = (torch.tensor(950), torch.tensor(120), torch.tensor(400.5))


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def case():
    pipe = tiny_pipeline("sd", unet=tiny_unet("sd", **SMALL))
    made = SeFiTokens(class_word_embeddings(pipe, "x"), heads=2, head_dim=8).eval()
    torch.nn.init.normal_(made.expanders[0].out.weight, std=0.02)
    return pipe, made


def wide_text(pipe):
    return pipe.encode_prompt(["a V*", "V* b"], "cpu", 1, False)[0]


def test_one_graph_serves_all_stages(case):
    pipe, made = case
    counter = CompileCounter()
    compiled = torch.compile(pipe.unet, backend=counter, fullgraph=True)
    with idcore.attach(pipe, None, made.identity("x")), torch.no_grad():
        text, seen = wide_text(pipe), []
        for t in TIMES:
            inputs = tiny_inputs("sd") | {"timestep": t, "encoder_hidden_states": text}
            seen.append(pipe.unet(**inputs).sample)
            assert torch.allclose(compiled(**inputs).sample, seen[-1], atol=1e-5)
        assert counter.frame_count <= 2  # timesteps are whole numbers and others
        one = inputs | {"timestep": torch.tensor([950, 120])}
        assert torch.allclose(compiled(**one).sample, pipe.unet(**one).sample, atol=1e-5)
    assert not torch.allclose(seen[0], seen[1], atol=1e-3)


def test_hooks_inside_of_the_graph(case):
    pipe, made = case
    counter = CompileCounter()
    twice = torch.compile(lambda **x: pipe.unet(**x).sample * 2, backend=counter, fullgraph=True)
    with idcore.attach(pipe, None, made.identity("x")), torch.no_grad():
        text = wide_text(pipe)
        for t in TIMES[:2]:
            inputs = tiny_inputs("sd") | {"timestep": t, "encoder_hidden_states": text}
            assert torch.allclose(twice(**inputs), pipe.unet(**inputs).sample * 2, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("shown", [False, True])
def test_gradients_and_attention_loss_through_a_compiled_unet(case, shown):
    pipe, made = case
    counter = CompileCounter()
    compiled = torch.compile(pipe.unet, backend=counter, fullgraph=True)
    with staged_unet(pipe.unet) as staged:
        for t in ([950, 120], [650, 300]):
            inputs = tiny_inputs("sd") | {"timestep": torch.tensor(t)}
            found = []
            for unet in (pipe.unet, compiled):
                made.zero_grad()
                staged.begin(inputs["timestep"], torch.device("cpu"))
                text, _ = stage_text(pipe, ["a V*", "V*"], made(), staged.stage, class_word="x")
                loss = AttentionLoss(pipe.unet, staged, text, weight=3.0)
                with watching(pipe.unet, loss) if shown else contextlib.nullcontext():
                    out = unet(**inputs | {"encoder_hidden_states": text}).sample
                (out.square().mean() + (loss.total() if shown else 0)).backward()
                found.append([p.grad.clone() for p in made.parameters()])
            assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*found))
            assert any(bool(g.any()) for g in found[0])
    assert counter.frame_count == 1
