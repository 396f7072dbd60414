"""When identities act: start, end and factors per step, on pipelines, bare UNets and compiled ones."""

import pytest
import torch
from attach_cases import SMALL
from naive_attention import one_thread  # noqa: F401
from torch._dynamo.testing import CompileCounter

import idcore
from idcore.attention.schedule import StepSchedule
from idcore.errors import InputError
from idcore.sampling.sdxl import scheduler_by_name
from idcore.systems.base import AttentionOptions
from idcore.testing.tiny_models import TinySystem, tiny_inputs, tiny_pipeline, tiny_unet

V2 = AttentionOptions("ortho_v2", 4, 3)


def draw(pipe, steps=4, **more):
    return pipe(
        "a dog", num_inference_steps=steps, height=16, width=16, generator=torch.Generator().manual_seed(0),
        output_type="latent", **more,
    ).images  # fmt: skip


@pytest.mark.parametrize(
    "start, end, values, passes, want",
    [
        (0.25, 0.75, None, 4, [0, 1, 1, 0]),
        (0.0, 0.6, None, 5, [1, 1, 1, 0, 0]),
        (0.0, 1.0, [0.5, 1.0, 2.0], 3, [0.5, 1, 2]),
        (0.0, 1.0, [1.0, 2.0, 3.0, 4.0, 5.0], 9, [1, 1, 2, 2, 3, 3, 4, 4, 5]),  # two passes a step but the last
        (0.5, 1.0, torch.tensor([3.0]), 4, [0, 0, 3, 3]),
    ],
)
def test_factors(start, end, values, passes, want):
    rows = StepSchedule(start, end, values, torch.arange(passes, 0, -1), 1).rows
    assert [row[0] for row in rows] == want


def test_the_window_is_diffusers_control_guidance():
    for steps in range(1, 12):
        for start, end in [(0.0, 0.5), (0.2, 0.9), (0.1, 1.0)]:
            rows = StepSchedule(start, end, None, torch.arange(steps, 0, -1), 1).rows
            theirs = [1.0 - float(i / steps < start or (i + 1) / steps > end) for i in range(steps)]
            assert [r[0] for r in rows] == theirs


@pytest.mark.parametrize("sampler", ["lightning", "lightning-euler", "karras-2m", "karras-sde"])
def test_a_schedule_equals_scales_set_by_hand(sampler):
    pipe = tiny_pipeline("sdxl")
    pipe.scheduler = scheduler_by_name(sampler, pipe.scheduler.config)
    system = TinySystem(pipe.unet, options=V2)
    people = [system.identity(0), system.identity(1)]
    values = [[0.5, 0.0], [0.0, 0.0], [1.5, 1.0]]
    with idcore.attach(pipe, system, people, id_scale=[0.9, 0.4], id_schedule=values):
        scheduled = draw(pipe, 3)
    with idcore.attach(pipe, system, people) as handle:
        passes = 5 if sampler == "karras-sde" else 3
        rows = [values[i * 3 // passes] for i in range(passes)]

        def by_hand(i):
            handle.scale([0.9 * rows[i][0], 0.4 * rows[i][1]])

        by_hand(0)
        manual = draw(pipe, 3, callback_on_step_end=lambda p, i, t, kw: (i + 1 < passes and by_hand(i + 1), kw)[1])
    assert torch.equal(scheduled, manual)


def test_window_on_a_pipeline_and_its_end():
    pipe = tiny_pipeline("sdxl")
    system = TinySystem(pipe.unet, options=V2)
    plain = draw(pipe)
    with idcore.attach(pipe, system, system.identity(), id_guidance_start=0.5) as handle:
        late = draw(pipe)
        latents = []
        draw(pipe, callback_on_step_end=lambda p, i, t, kw: (latents.append(kw["latents"]), kw)[1])
        handle.schedule()
        always = draw(pipe)
        handle.schedule(id_guidance_end=0.1)  # shorter than a step: never, and then to the last bit
        assert torch.equal(draw(pipe), plain)
    alone = []
    draw(pipe, callback_on_step_end=lambda p, i, t, kw: (alone.append(kw["latents"]), kw)[1])
    assert torch.equal(latents[1], alone[1]) and not torch.equal(latents[2], alone[2])
    assert not torch.equal(late, plain) and not torch.equal(always, late)


def run(unet, inputs, t):
    with torch.no_grad():
        return unet(**(inputs | {"timestep": t})).sample


def test_a_bare_unet_needs_timesteps():
    unet, inputs = tiny_unet("sd"), tiny_inputs("sd")
    system = TinySystem(unet, options=V2)
    steps = torch.tensor([9, 6, 3])
    with idcore.attach(unet, system, system.identity(), id_schedule=[1.0, 0.5]) as handle:
        with pytest.raises(InputError, match=r"give them: handle.schedule\(..., timesteps=scheduler.timesteps\)"):
            run(unet, inputs, 9)
        handle.schedule(id_schedule=[1.0, 0.5, 0.0], timesteps=steps)
        got = [run(unet, inputs, t) for t in (torch.tensor(9), 6, 3.0)]
        with pytest.raises(InputError, match="one timestep for the whole batch is needed, got 2"):
            run(unet, inputs, torch.tensor([9, 6]))
        handle.schedule()
        for t, scale, one in zip((9, 6, 3), (1.0, 0.5, 0.0), got):
            handle.scale(scale)
            assert torch.equal(one, run(unet, inputs, t))


def test_a_learned_scale_follows_the_schedule():
    unet, inputs = tiny_unet("sd"), tiny_inputs("sd")
    system = TinySystem(unet, options=V2)
    with idcore.attach(unet, system, system.identity(), id_scale=torch.tensor(0.8)) as handle:
        handle.schedule(id_schedule=[1.0, 0.25], timesteps=[9, 5])
        got = run(unet, inputs, 5)
        handle.schedule()
        handle.scale(torch.tensor(0.2))
        assert torch.allclose(got, run(unet, inputs, 5), atol=1e-6)


@pytest.mark.parametrize("inside", [False, True], ids=["torch.compile(unet)", "unet.compile()"])
def test_compiled_schedules_do_not_compile_anew(inside):
    torch._dynamo.reset()
    unet, inputs = tiny_unet("sd", **SMALL), tiny_inputs("sd")
    system = TinySystem(unet, options=V2)
    counter = CompileCounter()
    with idcore.attach(unet, system, system.identity()) as handle:
        handle.schedule(id_schedule=[1.0, 0.0], timesteps=[9, 5])
        eager = {t: run(unet, inputs, torch.tensor(t)) for t in (9, 5)}
        if inside:
            step = torch.compile(lambda **x: unet(**x), backend=counter, fullgraph=True)
        else:
            step = torch.compile(unet, backend=counter, fullgraph=True)
        for t in (9, 5, 9):
            assert torch.allclose(run(step, inputs, torch.tensor(t)), eager[t], atol=1e-5)
        for k in range(5):
            handle.schedule(id_schedule=[0.2 * k, 1.0], timesteps=[9, 5])
            handle.scale(0.5 + 0.1 * k)
            got = run(step, inputs, torch.tensor(9))
            assert torch.allclose(got, run(unet, inputs, torch.tensor(9)), atol=1e-5)
        assert counter.frame_count == 1
    torch._dynamo.reset()


def test_swapping_people_keeps_or_refuses_the_schedule():
    unet, inputs = tiny_unet("sd"), tiny_inputs("sd")
    system = TinySystem(unet, options=V2)
    with idcore.attach(unet, system, system.identity()) as handle:
        handle.schedule(id_schedule=[1.0, 0.5], timesteps=[9, 5])
        handle.identity([system.identity(0), system.identity(1)])
        both = run(unet, inputs, 5)
        handle.schedule(id_guidance_end=[0.5, 1.0], timesteps=[9, 5])
        with pytest.raises(InputError, match="3 identities need one number or 3, got 2"):
            handle.identity([system.identity(i) for i in range(3)])
        handle.schedule()
        handle.scale(0.5)
        assert torch.equal(run(unet, inputs, 5), both)


@pytest.mark.parametrize(
    "more, text",
    [
        (dict(id_guidance_start=0.5, id_guidance_end=0.5), "0 <= start < end <= 1, got 0.5 and 0.5"),
        (dict(id_guidance_end=1.5), "0 <= start < end <= 1"),
        (dict(id_guidance_start=[0.1, 0.2]), "1 identities need one number or 1, got 2"),
        (dict(id_guidance_start="early"), "id_guidance_start must be finite numbers, got 'early'"),
        (dict(id_schedule=[]), "id_schedule must be a list of factors"),
        (dict(id_schedule=[float("nan")]), "id_schedule must be finite numbers"),
        (dict(id_schedule=0.5), "id_schedule must be a list of factors"),
    ],
)
def test_wrong_schedules_attach_nothing(more, text):
    unet = tiny_unet("sd")
    system = TinySystem(unet)
    with pytest.raises(InputError, match=text):
        idcore.attach(unet, system, system.identity(), **more)
    assert not unet._forward_pre_hooks
