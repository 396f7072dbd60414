"""torch.compile of a UNet with identities in place."""

import pytest
import torch
from naive_attention import one_thread  # noqa: F401
from torch._dynamo.testing import CompileCounter

import idcore
from idcore.systems.base import AttentionOptions
from idcore.testing.tiny_models import TinySystem, tiny_inputs, tiny_unet

SMALL = {"layers_per_block": 1, "block_out_channels": (16, 32), "attention_head_dim": 2}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(unet, inputs):
    with torch.no_grad():
        return unet(**inputs).sample


def test_scales_and_identities_do_not_compile_anew():
    unet, inputs = tiny_unet("sd", **SMALL), tiny_inputs("sd")
    system = TinySystem(unet, options=AttentionOptions("ortho_v2", 3, 2))
    counter = CompileCounter()
    compiled = torch.compile(unet, backend=counter, fullgraph=True)
    plain = run(unet, inputs)
    with idcore.attach(unet, system, system.identity(), id_scale=0.5) as handle:
        results = []
        for i in range(20):
            handle.scale([0.5, 0.0, 1.5, {"mid": 0.7}][i] if i < 4 else i / 10)
            if i % 7 == 3:
                handle.identity(system.identity(i))
            results.append(run(compiled, inputs))
            assert torch.allclose(results[-1], run(unet, inputs), atol=1e-5)
        assert counter.frame_count == 1
        assert torch.allclose(results[1], plain, atol=1e-6) and not torch.allclose(results[0], plain, atol=1e-3)
    assert torch.allclose(run(compiled, inputs), plain, atol=1e-6)


def test_masks_and_a_compiled_unet_that_is_attached():
    unet, inputs = tiny_unet("sd", **SMALL), tiny_inputs("sd", height=4, width=8)
    system = TinySystem(unet)
    counter = CompileCounter()
    compiled = torch.compile(unet, backend=counter, fullgraph=True)
    people = [system.identity(0), system.identity(1, uncond=False)]
    with idcore.attach(compiled, system, people, id_mask=[torch.rand(3, 5), None], cfg=True) as handle:
        assert torch.allclose(run(compiled, inputs), run(unet, inputs), atol=1e-5)
        frames = counter.frame_count
        handle.masks([torch.rand(3, 5), None])
        assert torch.allclose(run(compiled, inputs), run(unet, inputs), atol=1e-5)
        assert counter.frame_count == frames


@pytest.mark.slow
def test_inductor_on_cpu():
    unet, inputs = tiny_unet("sd", **SMALL), tiny_inputs("sd")
    system = TinySystem(unet, options=AttentionOptions("ortho_v2", 3, 2))
    compiled = torch.compile(unet, fullgraph=True)
    with idcore.attach(unet, system, system.identity(), id_scale=0.5) as handle:
        for scale in (0.5, 1.5):
            handle.scale(scale)
            assert torch.allclose(run(compiled, inputs), run(unet, inputs), atol=1e-5)
