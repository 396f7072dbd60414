"""DPM++ SDE: its formulas, its noise, and what it draws from a distribution that is known."""

import math

import pytest
import torch

from idcore.errors import InputError
from idcore.sampling.dpmpp_sde import DpmppSdeScheduler


def scheduler(steps, **config):
    s = DpmppSdeScheduler(**config)
    s.set_timesteps(steps)
    s.set_begin_index(0)
    return s


def sample(s, x, predict, generator=None):
    """x in units of sigma; predict(x, sigma) -> clean."""
    for i, t in enumerate(s.timesteps):
        sigma = float(s.sigmas[i])
        scaled = s.scale_model_input(x, t)
        assert torch.allclose(scaled * math.sqrt(sigma**2 + 1), x)
        x = s.step((x - predict(x, sigma)) / sigma, t, x, generator=generator, return_dict=False)[0]
    return x


def test_one_step_by_the_formula():
    """Against the published update, written out for one step with the noises that the scheduler drew."""
    s = scheduler(2)
    x0 = torch.randn(3, 4, 2, 2) * s.init_noise_sigma
    first, second = s.draw(x0, torch.Generator().manual_seed(1))
    predict = lambda x, sigma: torch.tanh(x / (1 + sigma))  # noqa: E731
    got = sample(s, x0, predict)
    a, b, c = (float(v) for v in s.sigmas[:3])

    def ancestral(start, end):
        up = min(end, math.sqrt(end**2 * (start**2 - end**2) / start**2))
        return math.sqrt(end**2 - up**2), up

    t = lambda sigma: -math.log(sigma)  # noqa: E731
    down, up = ancestral(a, b)
    clean = predict(x0, a)
    middle = (down / a) * x0 - math.expm1(t(a) - t(down)) * clean + up * first
    clean = predict(middle, b)
    down, up = ancestral(a, c)
    whole = (math.sqrt(a - b) * first + math.sqrt(b - c) * second) / math.sqrt(a - c)
    end = (down / a) * x0 - math.expm1(t(a) - t(down)) * clean + up * whole
    assert torch.allclose(got, predict(end, c), atol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_gaussian_comes_out_as_it_is(eta):
    """Data N(m, s^2) has the exact denoiser (s^2 x + sigma^2 m) / (s^2 + sigma^2); the samples must be N(m, s^2)."""
    mean, std = 0.7, 0.5
    s = scheduler(60, eta=eta)
    g = torch.Generator().manual_seed(0)
    x = mean + torch.randn(40000, 1, 1, 1, generator=g) * math.hypot(s.init_noise_sigma, std)
    out = sample(s, x, lambda x, sigma: (std**2 * x + sigma**2 * mean) / (std**2 + sigma**2), g)
    assert abs(out.mean() - mean) < 0.015 and abs(out.std() - std) < 0.015


def test_second_order_without_noise():
    """With eta 0 the error of the probability flow's end falls nearly fourfold when the steps are doubled."""
    std = 0.5
    clean = lambda x, sigma: std**2 * x / (std**2 + sigma**2)  # noqa: E731
    errors = []
    for steps in (10, 20, 40):
        s = scheduler(steps, eta=0.0)
        x = torch.full((1, 1, 1, 1), 3.0, dtype=torch.float64)
        low = float(s.sigmas[-2])
        start = float(s.sigmas[0])
        # exact flow to the last sigma above 0, then the scheduler's own last step to 0
        exact = 3.0 * math.sqrt((std**2 + low**2) / (std**2 + start**2))
        exact = clean(exact, low)
        errors.append(abs(float(sample(s, x, clean)) - exact))
    assert errors[0] > 3.3 * errors[1] > 3.3**2 * errors[2]


def test_velocity_prediction():
    s, v = scheduler(3), scheduler(3, prediction_type="v_prediction")
    x = torch.randn(2, 4, 3, 3) * s.init_noise_sigma
    drawn = s.draw(x, torch.Generator().manual_seed(0))
    v.drawn = drawn
    y = x
    for i, t in enumerate(s.timesteps):
        sigma = float(s.sigmas[i])
        noise = torch.sin(x / (1 + sigma))
        clean = x - sigma * noise
        velocity = (x / (sigma**2 + 1) - clean) * math.sqrt(sigma**2 + 1) / sigma
        x = s.step(noise, t, x, return_dict=False)[0]
        y = v.step(velocity, t, y, return_dict=False)[0]
        assert torch.allclose(x, y, atol=1e-4)


def test_one_generator_per_picture_and_noise_drawn_ahead():
    predict = lambda x, sigma: torch.tanh(x)  # noqa: E731
    x = torch.randn(3, 4, 2, 2) * 14

    def generators():
        return [torch.Generator().manual_seed(i) for i in range(3)]

    batch = sample(scheduler(4), x, predict, generators())
    for i in range(3):
        assert torch.equal(sample(scheduler(4), x[i : i + 1], predict, generators()[i])[0], batch[i])
    s = scheduler(4)
    s.draw(x, generators())
    assert torch.equal(sample(s, x, predict), batch)


def test_the_sample_keeps_its_dtype_and_a_middle_start_its_place():
    s = scheduler(4)
    x = torch.randn(1, 4, 2, 2).half()
    assert s.step(x, s.timesteps[0], x, return_dict=False)[0].dtype == torch.float16
    s = scheduler(4)
    s.set_begin_index(2)
    noisy = s.add_noise(torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2), s.timesteps[2:3])
    assert torch.allclose(noisy, s.sigmas[2].expand_as(noisy))
    assert torch.allclose(s.scale_model_input(noisy), noisy / math.sqrt(float(s.sigmas[2]) ** 2 + 1))
    with pytest.raises(InputError, match="begin_index must be even"):
        s.set_begin_index(3)


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: DpmppSdeScheduler(prediction_type="sample"), 'prediction_type must be "epsilon" or "v_prediction"'),
        (lambda: DpmppSdeScheduler(beta_schedule="cosine"), "beta_schedule must be"),
        (lambda: scheduler(0), "num_inference_steps must be a whole number from 1, got 0"),
    ],
)
def test_refusals(make, text):
    with pytest.raises(InputError, match=text):
        make()
