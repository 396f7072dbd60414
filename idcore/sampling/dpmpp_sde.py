"""DPM++ SDE (two passes of the network a step) as a diffusers scheduler, without torchsde."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..errors import InputError


class DpmppSdeScheduler(SchedulerMixin, ConfigMixin):
    """Stochastic DPM-Solver++ of second order, single step, midpoint r = 1/2 (Lu et al., arXiv 2211.01095, sec. 5 and
    6), on Karras' sigmas; what k-diffusion calls dpmpp_sde. With n steps the network runs 2 n - 1 times: `timesteps`
    holds all of these, and `step` is called after each.

    Each pass moves from sigma to a target by x' = (d / sigma) x + (1 - d / sigma) D + u n, where D is the predicted
    clean latent, u^2 + d^2 = target^2 and u is the share that is drawn anew (eta). The first pass of a step goes to the
    geometric mean of its two sigmas, the second repeats the whole step with D taken there. Both noises are increments
    of one Brownian path over sigma, as in the published sampler; they are drawn in order from the generators, so they
    are not the ones that torchsde draws from the same seed.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas: as in diffusers' schedulers.
        prediction_type: "epsilon" or "v_prediction".
        rho: of Karras' sigmas.
        eta: 0 without, 1 with all of the noise of the reverse process.
        s_noise: factor of the noise.
    """

    order = 2

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: Any = None,
        prediction_type: str = "epsilon",
        rho: float = 7.0,
        eta: float = 1.0,
        s_noise: float = 1.0,
    ) -> None:
        if prediction_type not in ("epsilon", "v_prediction"):
            raise InputError(f'prediction_type must be "epsilon" or "v_prediction", got {prediction_type!r}')
        betas = _betas(num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas)
        kept = np.cumprod(1 - betas)
        self.train_sigmas = np.sqrt((1 - kept) / kept)
        self.sigmas = torch.from_numpy(self.train_sigmas[::-1].astype(np.float32).copy())
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)
        self.num_inference_steps: int | None = None
        self.drawn: list[Tensor] | None = None
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._x: Tensor | None = None  # the sample at the start of the step
        self._first_noise: Tensor | None = None

    @property
    def init_noise_sigma(self) -> float:
        """Factor of the first noise: the largest sigma."""
        return float(self.sigmas.max())

    @property
    def step_index(self) -> int | None:
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Place in `timesteps` of the first pass; even, as a step must not start in its middle."""
        if begin_index % 2:
            raise InputError(f"begin_index must be even (two passes a step), got {begin_index}")
        self._begin_index = begin_index

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Make `timesteps` (int64 [2 n - 1], on `device`) and `sigmas` (float32 [2 n], on the CPU, ending in 0)."""
        if not isinstance(num_inference_steps, int) or num_inference_steps < 1:
            raise InputError(f"num_inference_steps must be a whole number from 1, got {num_inference_steps!r}")
        low, high = self.train_sigmas[0], self.train_sigmas[-1]
        ramp = np.linspace(0, 1, num_inference_steps)
        root = 1 / self.config.rho
        whole = (high**root + ramp * (low**root - high**root)) ** self.config.rho
        sigmas = np.empty(2 * num_inference_steps)
        sigmas[0:-1:2], sigmas[-1] = whole, 0
        sigmas[1:-1:2] = np.sqrt(whole[:-1] * whole[1:])
        distance = np.abs(np.log(sigmas[:-1, None]) - np.log(self.train_sigmas))
        self.timesteps = torch.from_numpy(distance.argmin(1)).to(device)
        self.sigmas = torch.from_numpy(sigmas.astype(np.float32))
        self.num_inference_steps = num_inference_steps
        self.drawn = None
        self._step_index = self._begin_index = self._x = self._first_noise = None

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """sample / sqrt(sigma^2 + 1): what the network takes."""
        self._start(timestep)
        return sample / math.sqrt(self._sigma(0) ** 2 + 1)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """original + sigma(timestep) noise (img2img, inpainting)."""
        if self._begin_index is not None:
            sigma = self.sigmas[self._begin_index].to(original_samples)
            return original_samples + sigma * noise
        table = torch.from_numpy(self.train_sigmas).to(original_samples)
        sigma = table[timesteps.to(table.device).long()]
        return original_samples + sigma.view(-1, *[1] * (noise.dim() - 1)) * noise

    def draw(self, like: Tensor, generator: Any = None) -> list[Tensor]:
        """Draw the noise of all steps now (float32, 2 (n - 1) tensors shaped as `like`), so that `step` needs no
        generator: for a loop that is recorded once and played again with other noise in the same place."""
        passes = len(self.timesteps) - 1 - (self._begin_index or 0)
        self.drawn = [self._noise(like, generator) for _ in range(passes)]
        return self.drawn

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """After a pass of the network: the sample for the next pass, in the dtype of `sample`.

        Args:
            model_output: what the network said of `scale_model_input(sample)`.
            timestep: of this pass; read only when the scheduler has not been told where it begins.
            sample: before this pass.
            generator: one, or one per sample of the batch.
        """
        self._start(timestep)
        x, at, first = sample.float(), self._sigma(0), self._step_index % 2 == 0
        clean = self._clean(model_output.float(), x, at)
        if self._sigma(1) == 0:
            x = clean
        elif first:
            self._x, self._first_noise = x, self._next_noise(x, generator)
            x = self._move(x, clean, at, self._sigma(1), self._first_noise)
        else:
            x = self._second(clean, x, generator)
        self._step_index += 1
        x = x.to(sample.dtype)
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)

    def _second(self, clean: Tensor, like: Tensor, generator: Any) -> Tensor:
        """The whole step again, from where it began, with the clean latent seen in its middle (r = 1/2)."""
        start, middle, target = self._sigma(-1), self._sigma(0), self._sigma(1)
        more = self._next_noise(like, generator)
        a, b = math.sqrt(start - middle), math.sqrt(middle - target)
        noise = (a * self._first_noise + b * more) / math.sqrt(start - target)
        return self._move(self._x, clean, start, target, noise)

    def _move(self, x: Tensor, clean: Tensor, at: float, target: float, noise: Tensor) -> Tensor:
        up = min(target, self.config.eta * math.sqrt(target**2 * (at**2 - target**2) / at**2))
        down = math.sqrt(target**2 - up**2)
        ratio = down / at
        return ratio * x + (1 - ratio) * clean + (self.config.s_noise * up) * noise

    def _clean(self, output: Tensor, x: Tensor, sigma: float) -> Tensor:
        if self.config.prediction_type == "epsilon":
            return x - sigma * output
        return x / (sigma**2 + 1) - (sigma / math.sqrt(sigma**2 + 1)) * output

    def _next_noise(self, like: Tensor, generator: Any) -> Tensor:
        if self.drawn is not None:
            return self.drawn[self._step_index - (self._begin_index or 0)]
        return self._noise(like, generator)

    def _noise(self, like: Tensor, generator: Any) -> Tensor:
        return randn_tensor(like.shape, generator=generator, device=like.device, dtype=torch.float32)

    def _sigma(self, ahead: int) -> float:
        return float(self.sigmas[self._step_index + ahead])

    def _start(self, timestep: Any) -> None:
        if self._step_index is not None:
            return
        if self._begin_index is not None:
            self._step_index = self._begin_index
            return
        found = (self.timesteps == timestep).nonzero()[:, 0].tolist()
        self._step_index = next((i for i in found if i % 2 == 0), 0)

    def __len__(self) -> int:
        return self.config.num_train_timesteps


def _betas(count: int, start: float, end: float, schedule: str, trained: Any) -> np.ndarray:
    if trained is not None:
        return np.asarray(trained, dtype=np.float64)
    if schedule == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, count) ** 2
    if schedule == "linear":
        return np.linspace(start, end, count)
    raise InputError(f'beta_schedule must be "scaled_linear" or "linear", or give trained_betas; got {schedule!r}')
