"""The denoising loop of `IDPipeline`: text-to-image on SDXL's UNet, the halves of guidance in one pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

TENSORS = ("latents", "prompt_embeds", "add_text_embeds", "add_time_ids")  # what a callback may read and replace


@dataclass(eq=False)
class Job:
    """What one run of the loop needs. Rows of the conditions are [uncond, cond] halves where `guided`.

    Attributes:
        scheduler: of this run alone, its timesteps set.
        latents: [images, 4, h, w], already times `scheduler.init_noise_sigma`.
        prompt_embeds: [images or 2 images, L, E].
        add_text_embeds, add_time_ids: SDXL's pooled text [rows, P] and sizes [rows, 6].
        guidance: weight of classifier-free guidance: a number, or a tensor [] that may change in place.
        guided: whether there are two halves.
        generator: for samplers that draw noise.
    """

    scheduler: Any
    latents: Tensor
    prompt_embeds: Tensor
    add_text_embeds: Tensor
    add_time_ids: Tensor
    guidance: float | Tensor
    guided: bool
    generator: Any = None

    def tensors(self) -> dict[str, Tensor]:
        """Those that a recorded loop reads."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name in TENSORS}


def denoise(unet: Any, job: Job, after_pass: Callable[[int, Tensor], None] | None = None) -> Tensor:
    """Run all passes; returns the latents. `after_pass(i, t)` may change the job."""
    scheduler = job.scheduler
    scheduler.set_begin_index(0)
    draws = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": job.generator} if draws else {}
    for i, t in enumerate(scheduler.timesteps):
        sample = torch.cat([job.latents] * 2) if job.guided else job.latents
        predicted = unet(
            scheduler.scale_model_input(sample, t),
            t,
            encoder_hidden_states=job.prompt_embeds,
            added_cond_kwargs={"text_embeds": job.add_text_embeds, "time_ids": job.add_time_ids},
            return_dict=False,
        )[0]
        if job.guided:
            without, with_text = predicted.chunk(2)
            predicted = without + job.guidance * (with_text - without)
        job.latents = scheduler.step(predicted, t, job.latents, **extra, return_dict=False)[0]
        if after_pass is not None:
            after_pass(i, t)
    return job.latents


class CallbackView:
    """What `callback_on_step_end` gets as its pipeline: this run's state under the names that diffusers' callbacks
    read and write, everything else from the pipeline itself."""

    def __init__(self, pipe: Any, job: Job) -> None:
        self._pipe, self._job = pipe, job
        self.interrupt = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)

    @property
    def num_timesteps(self) -> int:
        return len(self._job.scheduler.timesteps)

    @property
    def scheduler(self) -> Any:
        return self._job.scheduler

    @property
    def guidance_scale(self) -> float:
        return self._job.guidance

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._job.guided

    @property
    def _guidance_scale(self) -> float:
        return self._job.guidance

    @_guidance_scale.setter
    def _guidance_scale(self, value: float) -> None:
        self._job.guidance = value
        self._job.guided = value > 1

    @property
    def _interrupt(self) -> bool:
        return self.interrupt

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        self.interrupt = value


class Interrupted(Exception):
    """A callback asked the run to stop; the latents are those of the last pass."""


def caller(callback: Callable, names: list[str], view: CallbackView, job: Job) -> Callable[[int, Tensor], None]:
    """`after_pass` that runs a diffusers callback.

    Raises:
        InputError: it asks for tensors that are not there.
    """
    unknown = [n for n in names if n not in TENSORS]
    if unknown:
        raise InputError(f"callback_on_step_end_tensor_inputs knows {', '.join(TENSORS)}, got {', '.join(unknown)}")

    def after_pass(i: int, t: Tensor) -> None:
        changed = callback(view, i, t, {n: getattr(job, n) for n in names}) or {}
        for name in TENSORS:
            setattr(job, name, changed.get(name, getattr(job, name)))
        if view.interrupt:
            raise Interrupted

    return after_pass
