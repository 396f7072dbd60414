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
        self.prediction = scheduler.config.prediction_type
        self.largest = float(scheduler.init_noise_sigma)
        sigmas = scheduler.sigmas  # float32, and so are all numbers that come from them, as in diffusers
        self.sigmas: list[float] = sigmas.tolist()
        self.moves: list[float] = (sigmas[1:] - sigmas[:-1]).tolist()
        self.powers: list[float] = (sigmas**2 + 1).tolist()
        self.roots: list[float] = ((sigmas**2 + 1) ** 0.5).tolist()
        self.velocity: list[float] = (-sigmas / (sigmas**2 + 1) ** 0.5).tolist()

    def start(self, noise: Tensor) -> Tensor:
        return noise * self.largest

    def scaled(self, i: int, x: Tensor) -> Tensor:
        return x / self.roots[i]

    def advance(self, i: int, x: Tensor, prediction: Tensor, memory: Any) -> tuple[Tensor, Any]:
        if self.prediction == "epsilon":
            clean = x - self.sigmas[i] * prediction
        elif self.prediction == "sample":
            clean = prediction
        else:
            clean = prediction * self.velocity[i] + x / self.powers[i]
        return x + (x - clean) / self.sigmas[i] * self.moves[i], None


class DpmSteps:
    """DPM-Solver++ 2M, midpoint (Lu et al., arXiv 2211.01095, algorithm 2), the first and the last step of first order;
    remembers the clean picture of the step before."""

    def __init__(self, scheduler: Any) -> None:
        self.times = scheduler.timesteps.detach().clone().float()
        self.prediction = scheduler.config.prediction_type
        sigmas = scheduler.sigmas  # float32, as above
        alphas = 1 / (sigmas**2 + 1) ** 0.5
        sigmas = sigmas * alphas
        h = (torch.log(alphas) - torch.log(sigmas)).diff()
        self.alphas: list[float] = alphas.tolist()
        self.sigmas: list[float] = sigmas.tolist()
        self.shrink: list[float] = (sigmas[1:] / sigmas[:-1]).tolist()
        self.grow: list[float] = (alphas[1:] * (torch.exp(-h) - 1.0)).tolist()
        self.weights: list[float] = [0.0, *(1.0 / (h[:-1] / h[1:])).tolist()]

    def start(self, noise: Tensor) -> Tensor:
        return noise

    def scaled(self, i: int, x: Tensor) -> Tensor:
        return x

    def advance(self, i: int, x: Tensor, prediction: Tensor, memory: Any) -> tuple[Tensor, Any]:
        alpha, sigma = self.alphas[i], self.sigmas[i]
        if self.prediction == "epsilon":
            clean = (x - sigma * prediction) / alpha
        elif self.prediction == "sample":
            clean = prediction
        else:
            clean = alpha * x - sigma * prediction
        result = self.shrink[i] * x - self.grow[i] * clean
        if memory is not None and i + 1 < len(self.times):
            result = result - 0.5 * self.grow[i] * (self.weights[i] * (clean - memory))
        return result, clean
