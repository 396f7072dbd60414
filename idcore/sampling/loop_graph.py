"""The whole denoising loop as one CUDA graph: recorded once per shape, then played with one launch.

Not run on a GPU yet: what is recorded and what stays variable is tested on the CPU with a recorder that replays tensor
operations on the same memory.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..attention.conditioning import Conditioning
from ..errors import InputError
from .denoise import Job, denoise
from .loop_inputs import ConditioningInputs
from .sdxl import fresh_copy
from .unet_state import ModelState
from .vae import LatentDecoder

Play = tuple[Callable[[], None], "Made"]
Recorder = Callable[[Callable[[], "Made"], Callable[[], None]], Play]


class Made(NamedTuple):
    """What a recorded loop leaves."""

    latents: Tensor
    pictures: Tensor | None  # where the decode is part of it


def record_on_cuda(run: Callable[[], Made], before: Callable[[], None]) -> Play:
    """Warm up on a side stream, call `before`, record `run`; returns (replay, its result)."""
    if not torch.cuda.is_available():
        raise InputError('runner="graph" records a CUDA graph and no CUDA device is usable here; use runner="eager"')
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    before()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph.replay, result


class _Recorded(NamedTuple):
    play: Callable[[], None]
    made: Made
    job: Job  # the tensors that the graph reads
    noise: list[Tensor]
    people: list[ConditioningInputs]


class LoopGraphs:
    """Plays jobs from recorded loops.

    Variable from one play to the next, without recording anew: latents, prompts, sizes, the weight of guidance, noise,
    scales, the schedule's factors, region masks, and the identities (their keys and values are copied to where the
    graph reads them). Another shape, number of steps, sampler, number of identities or tokens, or a mask where there
    was none records another loop. A change of the models (LoRA, weights, device, processors, hooks) drops all loops.

    Args:
        unet: attached or not.
        decoder: of latents to pictures, to be recorded with the loop where a call asks for it.
        record: makes (replay, result) of a function; default a CUDA graph.
        limit: loops kept; the one used longest ago goes first. Each holds the activations of its shape.
    """

    def __init__(
        self, unet: nn.Module, decoder: LatentDecoder | None = None, record: Recorder = record_on_cuda, limit: int = 4
    ) -> None:
        self.unet, self.decoder, self.record, self.limit = unet, decoder, record, limit
        self.kept: OrderedDict[Any, _Recorded] = OrderedDict()
        self._state: ModelState | None = None

    def forget(self) -> None:
        """Drop all loops and their memory."""
        self.kept.clear()
        self._state = None

    def __call__(self, job: Job, conditionings: Sequence[Conditioning], decode: bool = False) -> Made:
        """The latents of a job, and with `decode` its pictures, not looked at yet (`LatentDecoder.checked`).

        Raises:
            InputError: a conditioning whose scales are numbers (not `Conditioning.as_data`), which would stay fixed.
        """
        for c in conditionings:
            if not c.as_data:
                raise InputError(
                    "a recorded loop cannot follow identities that were attached to its UNet from outside; detach them "
                    'and give id_embeds, or use runner="eager"'
                )
            if c.plan is not None:
                c.plan.prepare(job.latents.device)
        if self._state is not None and not self._state.holds():
            self.forget()
        key = (self._key(job, conditionings), decode)
        found = self.kept.pop(key, None) or self._recorded(job, conditionings, decode)
        self.kept[key] = found
        while len(self.kept) > self.limit:
            self.kept.popitem(last=False)
        self._fill(found, job)
        found.play()
        return Made(*(None if t is None else t.clone() for t in found.made))

    def _key(self, job: Job, conditionings: Sequence[Conditioning]) -> Any:
        tensors = tuple((n, t.shape, t.dtype, t.device) for n, t in job.tensors().items())
        scheduler = job.scheduler
        steps = (type(scheduler), tuple(scheduler.timesteps.tolist()), tuple(scheduler.sigmas.tolist()))
        return tensors, job.guided, steps, tuple(ConditioningInputs.key(c) for c in conditionings)

    def _recorded(self, job: Job, conditionings: Sequence[Conditioning], decode: bool) -> _Recorded:
        own = replace(job, **{n: t.clone() for n, t in job.tensors().items()}, generator=None)
        own.scheduler = fresh_copy(job.scheduler)
        own.guidance = torch.tensor(float(job.guidance), device=job.latents.device)
        noise = self._noise(job)
        plan = self.decoder.plan(own.latents.shape) if decode else None

        def run() -> Made:
            scheduler = fresh_copy(own.scheduler)
            if noise:
                scheduler.drawn = noise
            latents = denoise(self.unet, replace(own, scheduler=scheduler))
            return Made(latents, None if plan is None else self.decoder.decode(latents, plan))

        def before() -> None:
            # What is kept by a tensor's version (keys and values of the text) must be computed inside the recording.
            for t in own.tensors().values():
                t.add_(0)

        like = torch.empty(0, dtype=self.unet.dtype, device=own.latents.device)
        people = [ConditioningInputs(c, own.guided, like) for c in conditionings]
        with torch.no_grad(), contextlib.ExitStack() as reading:
            for inputs in people:
                reading.enter_context(inputs.read())
            play, made = self.record(run, before)
        # Recording itself may have put processors back.
        self._state = ModelState(self.unet, *([] if self.decoder is None else [self.decoder.vae]))
        return _Recorded(play, made, own, noise, people)

    def _noise(self, job: Job) -> list[Tensor]:
        """Where the noise of a sampler that draws will stand; filled before each play."""
        if not hasattr(job.scheduler, "draw"):
            return []
        return [torch.zeros_like(job.latents, dtype=torch.float32) for _ in job.scheduler.timesteps[1:]]

    def _fill(self, found: _Recorded, job: Job) -> None:
        for name, tensor in job.tensors().items():
            found.job.tensors()[name].copy_(tensor)
        found.job.guidance.fill_(float(job.guidance))
        if found.noise:
            for mine, drawn in zip(found.noise, job.scheduler.draw(job.latents, job.generator)):
                mine.copy_(drawn)
        for inputs in found.people:
            inputs.fill()
