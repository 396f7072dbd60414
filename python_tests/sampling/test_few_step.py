"""The few-step sampler against the formula."""

import pytest
import torch

from idcore.errors import InputError
from idcore.sampling.few_step import euler_step, noise_levels, sample, seeded_noise


def test_four_steps_stand_at_the_quarters():
    assert noise_levels(4) == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_euler_step_is_the_velocity_form():
    x, clean = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    t, s = 0.75, 0.5
    velocity = (x - clean) / t
    torch.testing.assert_close(euler_step(x, clean, t, s), x + (s - t) * velocity)


def test_a_perfect_model_is_followed_along_the_straight_path():
    clean, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    seen = []

    def predict(x, t):
        seen.append((float(t[0]), x.clone()))
        return clean

    torch.testing.assert_close(sample(predict, noise, 4), clean)
    for t, x in seen:
        torch.testing.assert_close(x, (1 - t) * clean + t * noise)


@pytest.mark.parametrize("bad", [0, -1, 101, 2.5, True, "4"])
def test_bad_step_counts_are_named(bad):
    with pytest.raises(InputError, match="num_inference_steps is a whole number from 1 to 100"):
        noise_levels(bad)


def test_noise_depends_on_the_seed_alone():
    a, b = seeded_noise([3, 5], (3, 8, 8)), seeded_noise([5], (3, 8, 8))
    assert torch.equal(a[1], b[0]) and not torch.equal(a[0], a[1])
