"""The schedules have the published timesteps and sigmas."""

import pytest
import torch

from idcore.errors import InputError
from idcore.sampling.sdxl import few_step_scheduler

SDXL = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)


@pytest.mark.parametrize("sampler", ("dpmpp_2m", "euler"))
def test_four_lightning_steps(sampler):
    s = few_step_scheduler(SDXL, sampler)
    s.set_timesteps(4)
    assert [round(float(t)) for t in s.timesteps] == [999, 749, 499, 249]
    want = torch.tensor([14.6146, 4.0817, 1.6129, 0.6932, 0.0])
    assert (s.sigmas.float() - want).abs().max() < 1e-3


def test_the_old_end():
    s = few_step_scheduler(SDXL, final_sigma="sigma_min")
    s.set_timesteps(4)
    assert abs(float(s.sigmas[-1]) - 0.0292) < 1e-3


@pytest.mark.parametrize(
    "kwargs, text",
    [
        (dict(sampler="ddim"), "sampler must be one of dpmpp_2m, euler, got 'ddim'"),
        (dict(final_sigma="one"), "final_sigma must be"),
        (dict(sampler="euler", final_sigma="sigma_min"), "dpmpp_2m only"),
    ],
)
def test_refusals(kwargs, text):
    with pytest.raises(InputError, match=text):
        few_step_scheduler(SDXL, **kwargs)
