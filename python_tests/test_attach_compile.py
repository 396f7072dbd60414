"""torch.compile of a UNet with identities in place."""

import pytest
import torch
from attach_cases import SMALL, run
from naive_attention import one_thread  # noqa: F401
from torch._dynamo.testing import CompileCounter

import idcore
from idcore.systems.base import AttentionOptions
from idcore.testing.tiny_models import TinySystem, tiny_inputs, tiny_ip_adapter, tiny_unet


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


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


def with_pictures(unet, inputs):
    """Load an IP-Adapter and give inputs that carry its picture."""
    unet._load_ip_adapter_weights(tiny_ip_adapter(unet))
    return inputs | {"added_cond_kwargs": {"image_embeds": [torch.ones(2, 1, 16)]}}


def test_an_ip_adapter_loaded_into_a_compiled_unet():
    unet, inputs = tiny_unet("sd", **SMALL), tiny_inputs("sd")
    system = TinySystem(unet)
    counter = CompileCounter()
    compiled = torch.compile(unet, backend=counter, fullgraph=True)
    with idcore.attach(unet, system, system.identity()) as handle:
        run(compiled, inputs)
        inputs = with_pictures(unet, inputs)
        both = run(compiled, inputs)
        assert counter.frame_count == 2
        assert torch.allclose(both, run(unet, inputs), atol=1e-5)
        handle.scale(0.0)
        ip_only = run(unet, inputs)
        assert torch.allclose(run(compiled, inputs), ip_only, atol=1e-5)
        assert not torch.allclose(both, ip_only, atol=1e-3)
        assert counter.frame_count == 2
    assert torch.allclose(run(unet, inputs), ip_only, atol=1e-6)


def test_a_unet_inside_of_a_larger_graph():
    unet, inputs = tiny_unet("sd", **SMALL), tiny_inputs("sd")
    system = TinySystem(unet)
    counter = CompileCounter()
    twice = torch.compile(lambda **x: unet(**x).sample * 2, backend=counter, fullgraph=True)
    with idcore.attach(unet, system, system.identity(), id_mask=torch.rand(3, 3)) as handle, torch.no_grad():
        for scale in (1.0, 0.3):
            handle.scale(scale)
            assert torch.allclose(twice(**inputs), run(unet, inputs) * 2, atol=1e-5)
        assert counter.frame_count == 1
        inputs = with_pictures(unet, inputs)
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"call handle.refresh\(\) before this compiled UNet"):
            twice(**inputs)
        handle.refresh()
        assert torch.allclose(twice(**inputs), run(unet, inputs) * 2, atol=1e-5)


@pytest.mark.slow
def test_inductor_on_cpu():
    unet, inputs = tiny_unet("sd", **SMALL), tiny_inputs("sd")
    system = TinySystem(unet, options=AttentionOptions("ortho_v2", 3, 2))
    compiled = torch.compile(unet, fullgraph=True)
    with idcore.attach(unet, system, system.identity(), id_scale=0.5) as handle:
        for scale in (0.5, 1.5):
            handle.scale(scale)
            assert torch.allclose(run(compiled, inputs), run(unet, inputs), atol=1e-5)
