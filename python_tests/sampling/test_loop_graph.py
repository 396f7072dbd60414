"""The recorded loop: what changes from play to play, on a recorder that holds numbers fixed as a CUDA graph does."""

import pytest
import torch
from naive_attention import one_thread  # noqa: F401
from tape import record

import idcore
from idcore.errors import InputError
from idcore.sampling.loop_graph import LoopGraphs, record_on_cuda
from idcore.sampling.vae import LatentDecoder
from idcore.systems.base import AttentionOptions
from idcore.testing.tiny_models import TinySystem, tiny_pipeline, tiny_unet

V2 = AttentionOptions("ortho_v2", 4, 3)
SMALL = {"layers_per_block": 1, "block_out_channels": (16, 32), "transformer_layers_per_block": 1}


def two(sampler="lightning"):
    """The same pipeline twice: eager, and with a recorder in place of CUDA's."""
    stock = tiny_pipeline("sdxl", unet=tiny_unet("sdxl", **SMALL))
    system = TinySystem(stock.unet, options=V2)
    eager = idcore.IDPipeline(stock, system, sampler=sampler, backend="reference")
    other = tiny_pipeline("sdxl", unet=tiny_unet("sdxl", **SMALL))
    graph = idcore.IDPipeline(other, system, sampler=sampler, backend="reference")
    graph.runner, graph.graphs, graph._seat.as_data = "graph", LoopGraphs(other.unet, graph.decoder, record), True
    recorded = []
    inner = graph.graphs._recorded
    graph.graphs._recorded = lambda *a: recorded.append(1) or inner(*a)
    return eager, graph, recorded


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def both(eager, graph, **how):
    seeds = how.pop("seeds", (0,))
    how = {"prompt": "a dog"} | how
    a, b = (
        p(generator=[torch.Generator().manual_seed(s) for s in seeds], output_type="latent", **how).images
        for p in (eager, graph)
    )
    assert (a - b).abs().max() < 1e-4 * a.abs().max()
    return a


@pytest.mark.parametrize(
    "sampler, steps", [("lightning", 3), ("lightning-euler", 3), ("karras-2m", 3), ("karras-sde", 2)]
)
def test_one_recording_serves_new_words_seeds_people_scales_and_times(sampler, steps):
    eager, graph, recorded = two(sampler)
    people = [eager.system.identity(i) for i in range(3)]
    pictures = [
        both(eager, graph, num_inference_steps=steps, guidance_scale=1.5, **how)
        for how in [
            dict(id_embeds=people[0]),
            dict(id_embeds=people[0], id_scale=0.4),
            dict(id_embeds=people[1], id_scale={"up": 1.5}),
            dict(id_embeds=people[2], prompt="a cat", negative_prompt="bad"),
            dict(id_embeds=people[2], seeds=(3,)),
            dict(id_embeds=people[2], id_guidance_start=0.3),
            dict(id_embeds=people[2], id_schedule=[0.5, 1.5]),
            dict(id_embeds=people[0], original_size=(64, 64)),
            dict(),
        ]
    ]
    assert len(recorded) == 1
    for i, a in enumerate(pictures):
        assert all(not torch.allclose(a, b) for b in pictures[:i])
    both(eager, graph, num_inference_steps=steps, guidance_scale=2.5, id_embeds=people[0])
    assert len(recorded) == 1


def test_scales_in_tensors_are_read_at_each_play():
    eager, graph, recorded = two()
    people = idcore.Identity.batch([eager.system.identity(0), eager.system.identity(1)])
    how = dict(id_embeds=people, num_inference_steps=2, guidance_scale=1.5, num_images_per_prompt=2, seeds=(0, 1))
    a, b = (both(eager, graph, id_scale=torch.tensor([s]), **how) for s in ([0.5, 1.0], [1.0, 0.0]))
    assert len(recorded) == 1 and not torch.allclose(a[0], b[0]) and not torch.allclose(a[1], b[1])
    both(eager, graph, id_scale=torch.tensor(0.7), **how)
    assert len(recorded) == 2


def test_what_records_anew_and_what_is_kept():
    eager, graph, recorded = two()
    me, you = eager.system.identity(0), eager.system.identity(1)
    half = torch.zeros(4, 4)
    half[:, 2:] = 1
    different = [
        dict(id_embeds=me),
        dict(id_embeds=me, num_inference_steps=2),
        dict(id_embeds=me, guidance_scale=2.0),
        dict(id_embeds=me, height=32),
        dict(id_embeds=[me, you], id_masks=[half, None]),
    ]
    for i, how in enumerate(different):
        both(eager, graph, **how)
        assert len(recorded) == i + 1
        both(eager, graph, **how, seeds=(9,))
        assert len(recorded) == i + 1
    assert len(graph.graphs.kept) == graph.graphs.limit
    both(eager, graph, id_embeds=me)  # the oldest went
    assert len(recorded) == len(different) + 1
    graph.forget_identity()
    assert not graph.graphs.kept


def test_other_masks_of_the_same_people_are_copied():
    eager, graph, recorded = two()
    people = [eager.system.identity(0), eager.system.identity(1)]
    left, right = torch.zeros(4, 4), torch.zeros(4, 4)
    left[:, :2] = right[:, 2:] = 1
    pictures = [
        both(eager, graph, id_embeds=people, id_masks=masks, num_inference_steps=2, guidance_scale=1.5)
        for masks in ([left, right], [right, left], [torch.ones(8, 6) / 2, left], "1 2", [left, right])
    ]
    assert len(recorded) == 1
    assert torch.equal(pictures[0], pictures[4])
    assert all(not torch.allclose(a, b) for i, a in enumerate(pictures[:4]) for b in pictures[:i])
    both(eager, graph, id_embeds=people, id_masks=[left, None], num_inference_steps=2)
    both(eager, graph, id_embeds=people, num_inference_steps=2)
    assert len(recorded) == 3


def test_a_recording_goes_on_after_others_of_other_shapes():
    """Scales, factors and masks stand in tensors of other shapes then; each recording must be filled from those."""
    eager, graph, recorded = two()
    me, you = eager.system.identity(0), eager.system.identity(1)
    half = torch.zeros(4, 4)
    half[:2] = 1
    kinds = [dict(id_embeds=me, num_inference_steps=3), dict(id_embeds=me, num_inference_steps=2, id_masks=[half]),
             dict(id_embeds=[me, you], num_inference_steps=3)]  # fmt: skip
    for changed in ({}, {"id_scale": 0.3}, {"id_guidance_start": 0.5}, {"id_schedule": [0.2, 2.0]}):
        for how in kinds:
            both(eager, graph, **how, **changed)
    both(eager, graph, **(kinds[1] | {"id_masks": [1 - half]}), id_scale=1.5)
    assert len(recorded) == len(kinds)


def test_models_that_change_are_recorded_anew():
    peft = pytest.importorskip("peft")
    eager, graph, recorded = two()
    me = eager.system.identity()

    def draw(count):
        latents = both(eager, graph, id_embeds=me, num_inference_steps=2)
        assert len(recorded) == count
        return latents

    def on_both(change):
        for pipe in (eager, graph):
            torch.manual_seed(0)
            change(pipe.unet)

    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
    draw(1)
    pictures = [draw(1)]
    changes = [
        lambda unet: unet.conv_in.weight.mul_(1.1),
        lambda unet: setattr(unet.conv_in, "weight", torch.nn.Parameter(unet.conv_in.weight / 1.2, False)),
        lambda unet: unet.add_adapter(config),
        lambda unet: unet.set_adapters("default", 0.5),
        lambda unet: unet.fuse_lora(lora_scale=2.0),
        lambda unet: unet.conv_in.register_forward_hook(lambda module, args, made: 0.9 * made),
    ]
    for i, change in enumerate(changes):
        with torch.no_grad():
            on_both(change)
        pictures.append(draw(i + 2))
        assert torch.equal(draw(i + 2), pictures[-1])
    assert all(not torch.allclose(a, b) for a, b in zip(pictures, pictures[1:]))


def test_the_decode_in_the_recording():
    eager, graph, recorded = two()
    graph.decode_in_graph = True
    me, inside = eager.system.identity(), []
    decode = graph.decoder.decode
    graph.decoder.decode = lambda *a: inside.append(1) or decode(*a)
    pairs = [
        [
            p(
                "a dog",
                id_embeds=me,
                num_inference_steps=2,
                generator=torch.Generator().manual_seed(s),
                output_type=kind,
            )
            for p in (eager, graph)
        ]
        for s, kind in ((0, "np"), (1, "pt"), (2, "latent"))
    ]
    for a, b in pairs:
        assert abs(torch.as_tensor(a.images) - torch.as_tensor(b.images)).max() < 1e-4
    assert len(recorded) == 2 and len(inside) == 3  # twice to warm up, once recorded; latents alone need none


def test_an_overflow_of_the_recorded_decode_is_noticed():
    eager, graph, recorded = two()
    graph.decode_in_graph = True
    for pipe in (eager, graph):
        pipe.pipe.vae.decoder.up_blocks[0].resnets[0].conv2.weight.mul_(2e5)
    graph.decoder = graph.graphs.decoder = LatentDecoder(graph.pipe.vae, "float16")
    how = dict(id_embeds=eager.system.identity(), num_inference_steps=2, output_type="np")
    a = eager("a dog", generator=torch.Generator().manual_seed(0), **how).images
    with pytest.warns(UserWarning, match="overflowed in float16; its residual path carries 0.03125"):
        b = graph("a dog", generator=torch.Generator().manual_seed(0), **how).images
    c = graph("a dog", generator=torch.Generator().manual_seed(0), **how).images
    assert abs(a - b).max() < 0.02 and abs(a - c).max() < 0.02 and len(recorded) == 2


def test_without_identities_and_with_one_that_has_no_uncond():
    eager, graph, recorded = two()
    plain = both(eager, graph, guidance_scale=1.5)
    quiet = eager.system.identity(0, uncond=False)
    assert not torch.allclose(both(eager, graph, id_embeds=quiet, guidance_scale=1.5), plain)
    assert len(recorded) == 2


def test_identities_attached_from_outside_are_refused():
    eager, graph, _ = two()
    me = eager.system.identity()
    for first in ({}, {"id_embeds": me}):
        graph("a dog", num_inference_steps=1, output_type="latent", **first)
        with idcore.attach(graph.unet, eager.system, me, cfg=False):
            with pytest.raises(InputError, match="attached to its UNet from outside; detach them and give id_embeds"):
                graph("a dog", num_inference_steps=1, **first)


def test_no_callbacks_and_no_gpu():
    _, graph, _ = two()
    with pytest.raises(InputError, match='decode_in_graph puts the decode into the graph of runner="graph", got'):
        idcore.IDPipeline(graph.pipe, decode_in_graph=True)
    with pytest.raises(InputError, match="no callback between them"):
        graph("a dog", callback_on_step_end=lambda *a: {})
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no CUDA device is usable here"):
            record_on_cuda(lambda: torch.zeros(1), lambda: None)


@pytest.mark.gpu
def test_a_cuda_graph_draws_what_the_eager_loop_draws():
    stock = tiny_pipeline("sdxl", unet=tiny_unet("sdxl", **SMALL)).to("cuda")
    system = TinySystem(stock.unet, options=V2)
    eager = idcore.IDPipeline(stock, system)
    other = tiny_pipeline("sdxl", unet=tiny_unet("sdxl", **SMALL)).to("cuda")
    graph = idcore.IDPipeline(other, system, runner="graph")
    for i, how in enumerate([{}, {"id_scale": 0.3}, {"id_guidance_end": 0.5}, {"prompt": "a cat"}]):
        both(eager, graph, id_embeds=system.identity(i), guidance_scale=1.5, seeds=(i,), **how)
    assert len(graph.graphs.kept) == 1
