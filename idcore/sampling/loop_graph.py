"""The whole denoising loop as one CUDA graph: recorded once per shape, then played with one launch.

Not run on a GPU yet: what is recorded and what stays variable is tested on the CPU with a recorder that replays tensor
operations on the same memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..attention.conditioning import Conditioning
from ..errors import InputError
from .denoise import Job, denoise
from .sdxl import fresh_copy

Play = tuple[Callable[[], None], Tensor]
Recorder = Callable[[Callable[[], Tensor], Callable[[], None]], Play]


def record_on_cuda(run: Callable[[], Tensor], before: Callable[[], None]) -> Play:
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
    result: Tensor
    job: Job  # the tensors that the graph reads
    noise: list[Tensor]
    keys_values: list[list[Tensor]]  # per conditioning
    scales: list[Tensor | None]  # per conditioning, where they were given as a tensor
    keep: Any  # what the key names by id


class LoopGraphs:
    """Plays jobs from recorded loops.

    Variable from one play to the next, without recording anew: latents, prompts, sizes, the weight of guidance, noise,
    scales, the schedule's factors, and the identities (their keys and values are copied to where the graph reads them).
    Another shape, number of steps, sampler, mask, number of identities or tokens records another loop. What else
    happens to the UNet is not seen: after loading a LoRA or moving weights call `forget`.

    Args:
        unet: attached or not.
        record: makes (replay, result) of a function; default a CUDA graph.
        limit: loops kept; the one used longest ago goes first. Each holds the activations of its shape.
    """

    def __init__(self, unet: nn.Module, record: Recorder = record_on_cuda, limit: int = 4) -> None:
        self.unet, self.record, self.limit = unet, record, limit
        self.kept: OrderedDict[Any, _Recorded] = OrderedDict()

    def forget(self) -> None:
        """Drop all loops and their memory."""
        self.kept.clear()

    def __call__(self, job: Job, conditionings: Sequence[Conditioning]) -> Tensor:
        """The latents of a job.

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
        key = self._key(job, conditionings)
        found = self.kept.pop(key, None) or self._recorded(job, conditionings)
        self.kept[key] = found
        while len(self.kept) > self.limit:
            self.kept.popitem(last=False)
        self._fill(found, job, conditionings)
        found.play()
        return found.result.clone()

    def _key(self, job: Job, conditionings: Sequence[Conditioning]) -> Any:
        tensors = tuple((n, t.shape, t.dtype, t.device) for n, t in job.tensors().items())
        scheduler = job.scheduler
        steps = (type(scheduler), tuple(scheduler.timesteps.tolist()), tuple(scheduler.sigmas.tolist()))
        people = tuple(
            (id(c), id(c.masks), c.options, c.plan is not None, _shape(c.tensor), *map(self._facts, c.people))
            for c in conditionings
        )
        return tensors, job.guided, steps, people

    def _facts(self, person: Any) -> tuple:
        return tuple(person.tokens.shape), getattr(person, "uncond_tokens", None) is None

    def _recorded(self, job: Job, conditionings: Sequence[Conditioning]) -> _Recorded:
        own = replace(job, **{n: t.clone() for n, t in job.tensors().items()}, generator=None)
        own.scheduler = fresh_copy(job.scheduler)
        own.guidance = torch.tensor(float(job.guidance), device=job.latents.device)
        noise = self._noise(job)

        def run() -> Tensor:
            scheduler = fresh_copy(own.scheduler)
            if noise:
                scheduler.drawn = noise
            return denoise(self.unet, replace(own, scheduler=scheduler))

        def before() -> None:
            # What is kept by a tensor's version (keys and values of the text) must be computed inside the recording.
            for t in own.tensors().values():
                t.add_(0)

        given = [c.tensor for c in conditionings]
        scales = [None if t is None else t.detach().to(job.latents.device, torch.float32, copy=True) for t in given]
        try:
            for c, mine in zip(conditionings, scales):
                c.tensor = mine
            with torch.no_grad():
                play, result = self.record(run, before)
        finally:
            for c, theirs in zip(conditionings, given):
                c.tensor = theirs
        kept = [self._keys_values(c, own) for c in conditionings]
        return _Recorded(play, result, own, noise, kept, scales, [(c, c.masks) for c in conditionings])

    def _noise(self, job: Job) -> list[Tensor]:
        """Where the noise of a sampler that draws will stand; filled before each play."""
        if not hasattr(job.scheduler, "draw"):
            return []
        return [torch.zeros_like(job.latents, dtype=torch.float32) for _ in job.scheduler.timesteps[1:]]

    def _keys_values(self, c: Conditioning, job: Job) -> list[Tensor]:
        rows = ("uncond", "cond") if job.guided else ("cond",)
        like = torch.empty(0, dtype=self.unet.dtype, device=job.latents.device)
        return [t for name in c.sites for pair in c.bank.pairs(name, rows, like) for t in pair]

    def _fill(self, found: _Recorded, job: Job, conditionings: Sequence[Conditioning]) -> None:
        for name, tensor in job.tensors().items():
            found.job.tensors()[name].copy_(tensor)
        found.job.guidance.fill_(float(job.guidance))
        if found.noise:
            for mine, drawn in zip(found.noise, job.scheduler.draw(job.latents, job.generator)):
                mine.copy_(drawn)
        for c, mine in zip(conditionings, found.scales):
            if mine is not None:
                mine.copy_(c.tensor)
        for c, mine in zip(conditionings, found.keys_values):
            theirs = self._keys_values(c, found.job)
            pairs = [(a, b) for a, b in zip(mine, theirs) if a is not b]
            if pairs:
                torch._foreach_copy_([a for a, _ in pairs], [b for _, b in pairs])


def _shape(scale: Tensor | None) -> Any:
    return None if scale is None else scale.shape
