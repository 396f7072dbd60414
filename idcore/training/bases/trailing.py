"""Trailing few-step samplers without a state: Euler and DPM++ 2M as diffusers' schedulers compute them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ...sampling.sdxl import few_step_scheduler

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def trailing_steps(config: Mapping[str, Any], count: int = 4, sampler: str = "euler") -> EulerSteps | DpmSteps:
    """The sampler of `idcore.sampling.sdxl.few_step_scheduler`, as a function.

    Args:
        config: of the base's scheduler: its betas and what the UNet predicts.
        count: steps.
        sampler: "euler" (SDXL-Lightning's own recommendation) or "dpmpp_2m" (PuLID's published pipeline).

    Raises:
        InputError: unknown sampler or prediction type.
    """
    scheduler = few_step_scheduler(config, sampler)
    if scheduler.config.prediction_type not in PREDICTIONS:
        raise InputError(
            f"few steps: the UNet's prediction_type must be one of {', '.join(PREDICTIONS)}, got "
            f"{scheduler.config.prediction_type!r}"
        )
    scheduler.set_timesteps(count)
    return (EulerSteps if sampler == "euler" else DpmSteps)(scheduler)


class EulerSteps:
    """Euler steps on sigmas (Karras et al., arXiv 2206.00364, algorithm 2 without churn); x = x_0 + sigma n."""

    def __init__(self, scheduler: Any) -> None:
        self.times = scheduler.timesteps.detach().clone().float()
        self.sigmas = scheduler.sigmas.detach().clone()
        self.prediction = scheduler.config.prediction_type
        self._largest = float(scheduler.init_noise_sigma)

    def start(self, noise: Tensor) -> Tensor:
        return noise * self._largest

    def scaled(self, i: int, x: Tensor) -> Tensor:
        return x / float((self.sigmas[i] ** 2 + 1) ** 0.5)

    def advance(self, i: int, x: Tensor, prediction: Tensor, memory: Any) -> tuple[Tensor, Any]:
        sigma = self.sigmas[i]
        if self.prediction == "epsilon":
            clean = x - float(sigma) * prediction
        elif self.prediction == "sample":
            clean = prediction
        else:
            clean = prediction * float(-sigma / (sigma**2 + 1) ** 0.5) + x / float(sigma**2 + 1)
        slope = (x - clean) / float(sigma)
        return x + slope * float(self.sigmas[i + 1] - sigma), None


class DpmSteps:
    """DPM-Solver++ 2M, midpoint (Lu et al., arXiv 2211.01095, algorithm 2), the first and the last step of first order;
    remembers the clean picture of the step before."""

    def __init__(self, scheduler: Any) -> None:
        self.times = scheduler.timesteps.detach().clone().float()
        sigmas = scheduler.sigmas.detach().clone()
        self.prediction = scheduler.config.prediction_type
        self.alphas = 1 / (sigmas**2 + 1) ** 0.5
        self.sigmas = sigmas * self.alphas
        self.lambdas = torch.log(self.alphas) - torch.log(self.sigmas)

    def start(self, noise: Tensor) -> Tensor:
        return noise

    def scaled(self, i: int, x: Tensor) -> Tensor:
        return x

    def advance(self, i: int, x: Tensor, prediction: Tensor, memory: Any) -> tuple[Tensor, Any]:
        alpha, sigma = float(self.alphas[i]), float(self.sigmas[i])
        if self.prediction == "epsilon":
            clean = (x - sigma * prediction) / alpha
        elif self.prediction == "sample":
            clean = prediction
        else:
            clean = alpha * x - sigma * prediction
        h = self.lambdas[i + 1] - self.lambdas[i]
        grow = self.alphas[i + 1] * (torch.exp(-h) - 1.0)
        result = float(self.sigmas[i + 1] / self.sigmas[i]) * x - float(grow) * clean
        if memory is not None and i + 1 < len(self.times):
            r = (self.lambdas[i] - self.lambdas[i - 1]) / h
            result = result - float(0.5 * grow) * (float(1.0 / r) * (clean - memory))
        return result, clean
