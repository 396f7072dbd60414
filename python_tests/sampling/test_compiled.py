"""`torch.compile` of the UNet inside of `IDPipeline`: one graph, whatever identity, scale, schedule and step."""

import pytest
import torch
from naive_attention import one_thread  # noqa: F401
from torch._dynamo.testing import CompileCounterWithBackend

import idcore
from idcore.systems.base import AttentionOptions
from idcore.testing.tiny_models import TinySystem, tiny_pipeline, tiny_unet

V2 = AttentionOptions("ortho_v2", 4, 3)
SMALL = {"layers_per_block": 1, "block_out_channels": (16, 32), "transformer_layers_per_block": 1}


def small_pipeline():
    return tiny_pipeline("sdxl", unet=tiny_unet("sdxl", **SMALL))


def draw(pipe, **how):
    return pipe("a dog", generator=torch.Generator().manual_seed(0), output_type="latent", **how).images


def requests(system):
    """20 scales, 3 identities, schedules that come and go."""
    people = [system.identity(i) for i in range(3)]
    for i in range(20):
        when = {0: {}, 1: {"id_guidance_end": 0.5}, 2: {"id_schedule": [0.1 * i, 1.0]}}[i % 3]
        yield dict(id_embeds=people[i % 3], id_scale=i / 10, num_inference_steps=2, **when)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.nightly)])
def test_twenty_scales_and_three_identities_compile_once(backend):
    torch._dynamo.reset()
    stock = small_pipeline()
    system = TinySystem(stock.unet, options=V2)
    eager = idcore.IDPipeline(small_pipeline(), system)
    counter = CompileCounterWithBackend(backend)
    stock.unet = torch.compile(stock.unet, backend=counter, fullgraph=True)
    compiled = idcore.IDPipeline(stock, system)
    for how in requests(system):
        a, b = draw(eager, **how), draw(compiled, **how)
        assert (a - b).abs().max() < 2e-4 * a.abs().max()
    assert counter.frame_count == 1
    draw(compiled, guidance_scale=2.0, num_inference_steps=1)  # another batch and other parts: one more, not two
    assert counter.frame_count == 2
    torch._dynamo.reset()


def test_compiling_from_a_folder(tmp_path):
    torch._dynamo.reset()
    small_pipeline().save_pretrained(tmp_path)
    system = TinySystem(tiny_unet("sdxl", **SMALL), options=V2)
    eager = idcore.IDPipeline.from_pretrained(tmp_path, system)
    compiled = idcore.IDPipeline.from_pretrained(tmp_path, system, compile="aot_eager")
    how = dict(id_embeds=system.identity(), num_inference_steps=1)
    a, b = draw(eager, **how), draw(compiled, **how)
    assert hasattr(compiled.unet, "_orig_mod") and (a - b).abs().max() < 2e-4 * a.abs().max()
    torch._dynamo.reset()
