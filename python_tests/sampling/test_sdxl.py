"""The schedules have the published timesteps and sigmas."""

import pytest
import torch

from idcore.errors import InputError
from idcore.sampling.sdxl import NAMES, few_step_scheduler, karras_scheduler, scheduler_by_name

SDXL = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)


def made(scheduler, steps):
    scheduler.set_timesteps(steps)
    return [round(float(t)) for t in scheduler.timesteps], scheduler.sigmas.double()


@pytest.mark.parametrize("sampler", ("dpmpp_2m", "euler"))
@pytest.mark.parametrize(
    "steps, timesteps, sigmas",
    [
        (2, [999, 499], [14.6146, 1.6129, 0.0]),
        (4, [999, 749, 499, 249], [14.6146, 4.0817, 1.6129, 0.6932, 0.0]),
        (
            8,
            [999, 874, 749, 624, 499, 374, 249, 124],
            [14.6146, 7.2974, 4.0817, 2.4925, 1.6129, 1.0690, 0.6932, 0.3977, 0.0],
        ),
    ],
)
def test_lightning_steps(sampler, steps, timesteps, sigmas):
    t, s = made(few_step_scheduler(SDXL, sampler), steps)
    assert t == timesteps
    assert (s - torch.tensor(sigmas, dtype=torch.float64)).abs().max() < 1e-3


def test_the_old_end():
    _, s = made(few_step_scheduler(SDXL, final_sigma="sigma_min"), 4)
    assert abs(float(s[-1]) - 0.0292) < 1e-3


@pytest.mark.parametrize("sampler, every", [("dpmpp_2m", 1), ("dpmpp_sde", 2)])
@pytest.mark.parametrize("steps", [5, 25])
def test_karras_sigmas(sampler, every, steps):
    t, s = made(karras_scheduler(SDXL, sampler), steps)
    low, high = 0.0291675 ** (1 / 7), 14.614641 ** (1 / 7)
    want = [(high + i / (steps - 1) * (low - high)) ** 7 for i in range(steps)]
    assert (s[:-1:every] - torch.tensor(want, dtype=torch.float64)).abs().max() < 1e-4 and s[-1] == 0
    assert len(t) == (steps if every == 1 else 2 * steps - 1)
    if steps == 5:
        assert t[::every] == [999, 786, 427, 59, 0]


@pytest.mark.parametrize("name", NAMES)
def test_names(name):
    own = few_step_scheduler(SDXL)
    scheduler = scheduler_by_name(name, own.config, own)
    assert (scheduler is own) == (name == "own")
    assert scheduler.config.prediction_type == "epsilon"
    # A model that predicts velocities keeps that, whatever stood in its config before.
    other = scheduler_by_name(name, {**SDXL, "prediction_type": "v_prediction"}, own)
    assert name == "own" or other.config.prediction_type == "v_prediction"


def test_another_schedule_takes_karras_off():
    config = karras_scheduler(SDXL).config
    for sampler in ("dpmpp_2m", "euler"):
        assert made(few_step_scheduler(config, sampler), 4)[0] == [999, 749, 499, 249]


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: few_step_scheduler(SDXL, "ddim"), "sampler must be one of dpmpp_2m, euler, got 'ddim'"),
        (lambda: few_step_scheduler(SDXL, final_sigma="one"), "final_sigma must be"),
        (lambda: few_step_scheduler(SDXL, "euler", "sigma_min"), "dpmpp_2m only"),
        (lambda: karras_scheduler(SDXL, "euler"), "sampler must be one of dpmpp_2m, dpmpp_sde, got 'euler'"),
        (lambda: scheduler_by_name("fast", SDXL), "sampler must be one of lightning, lightning-euler, karras-2m"),
    ],
)
def test_refusals(make, text):
    with pytest.raises(InputError, match=text):
        make()
