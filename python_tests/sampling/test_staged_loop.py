"""A loop whose text changes by stage, recorded: what a CUDA graph holds fixed stays right."""

import torch
from naive_attention import one_thread  # noqa: F401
from tape import record

import idcore
from idcore.identity import Identity
from idcore.sampling.loop_graph import LoopGraphs
from idcore.testing.tiny_models import tiny_pipeline, tiny_unet


def person(seed):
    tokens = torch.randn(1, 10, 64, generator=torch.Generator().manual_seed(seed)) * 0.05
    return Identity(tokens, None, "sefi-ide", {"stages": 5, "class_word": "x"})


def test_one_recorded_loop_serves_other_people_and_prompts():
    small = {"layers_per_block": 1, "block_out_channels": (16, 32), "transformer_layers_per_block": 1}
    eager, other = (tiny_pipeline("sdxl", unet=tiny_unet("sdxl", **small)) for _ in range(2))
    eager, graph = idcore.IDPipeline(eager, sampler="lightning"), idcore.IDPipeline(other, sampler="lightning")
    graph.runner, graph.graphs = "graph", LoopGraphs(other.unet, graph.decoder, record)
    recorded, inner = [], graph.graphs._recorded
    graph.graphs._recorded = lambda *a: recorded.append(1) or inner(*a)
    people, how = [person(1), person(2)], {"placeholder": ["V*", "B*"], "backend": "reference"}
    pictures = []
    with idcore.attach(eager, None, people, **how), idcore.attach(graph, None, people, **how):
        for prompt in ("a V*", "a B*", "B* smiles"):
            a, b = (
                pipe(prompt, num_inference_steps=4, guidance_scale=2.0, output_type="latent",
                     generator=torch.Generator().manual_seed(0)).images
                for pipe in (eager, graph)
            )  # fmt: skip
            assert (a - b).abs().max() < 1e-4 * a.abs().max()
            pictures.append(a)
    assert len(recorded) == 1
    assert all(not torch.allclose(a, pictures[0], atol=1e-3) for a in pictures[1:])
