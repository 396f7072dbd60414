"""When identities act: a start, an end and a factor per step of the denoising."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .per_thread import PerThread
from .running import Running


class StepSchedule:
    """Factors on `id_scale` over the passes of the UNet, one column per identity.

    Pass i of N acts where `start <= i / N` and `(i + 1) / N <= end`, as diffusers counts `control_guidance_start` and
    `_end`. Of m `values`, value `i * m // N` holds in pass i: one value per step also for samplers with two passes a
    step. A pass is known by its timestep, looked up among the timesteps of the run; passes that share one share the
    factors of the first of them.

    Args:
        start, end: 0..1, a number or one per identity.
        values: None, or m finite factors: numbers, or rows with one per identity; or a float tensor [m] or [m, n].
        timesteps: of the run that follows, `scheduler.timesteps`; or a function that tells them at each pass; or None.
        count: n, number of identities.
        keep: a schedule whose tensors are taken over where they fit, so that who reads them sees the new factors.

    Raises:
        InputError: values out of range or of the wrong count.
    """

    def __init__(
        self, start: Any, end: Any, values: Any, timesteps: Any, count: int, keep: StepSchedule | None = None
    ) -> None:
        self.start = _per_identity(start, count, "id_guidance_start")
        self.end = _per_identity(end, count, "id_guidance_end")
        for a, b in zip(self.start, self.end):
            if not 0 <= a < b <= 1:
                raise InputError(
                    f"id_guidance_start and id_guidance_end must be 0 <= start < end <= 1, got {a} and {b}"
                )
        self.values = None if values is None else _rows(values, count)
        self.fixed = None if timesteps is None or callable(timesteps) else _timesteps(timesteps)
        self._ask: Callable[[], Tensor] | None = timesteps if callable(timesteps) else None
        self._seen: Tensor | None = None
        self.rows: list[tuple[float, ...]] = []
        self._on_cpu: list[float] = []
        self.table: Tensor | None = None if keep is None else keep.table
        self.steps: Tensor | None = None if keep is None else keep.steps
        if self.fixed is not None:
            self._make(self.fixed, self.fixed.device)

    @property
    def always(self) -> bool:
        """Whether nothing changes over the run."""
        return self.values is None and set(self.start) == {0.0} and set(self.end) == {1.0}

    def factors(self, passes: int) -> list[tuple[float, ...]]:
        """n factors for each of `passes` passes."""
        rows = []
        for i in range(passes):
            keep = [float(a <= i / passes and (i + 1) / passes <= b) for a, b in zip(self.start, self.end)]
            row = [1.0] * len(keep) if self.values is None else self.values[i * len(self.values) // passes]
            rows.append(tuple(k * v for k, v in zip(keep, row)))
        return rows

    def prepare(self, device: torch.device) -> None:
        """Know the timesteps of the run, and have them and the factors on a device (float32 [N], [N, n]).

        Raises:
            InputError: nothing tells the timesteps.
        """
        steps = self.fixed if self.fixed is not None else self._asked()
        if steps is not self._seen or self.table.device != device:
            self._make(steps, device)

    def at(self, timestep: Any) -> int:
        """The pass of a timestep that can be read on the CPU."""
        return min(range(len(self._on_cpu)), key=lambda i: abs(self._on_cpu[i] - float(timestep)))

    def row_on_device(self, timestep: Tensor) -> Tensor:
        """Factors [n] of the pass of a timestep that stays on its device."""
        nearest = (self.steps - timestep.reshape(-1)[0]).abs().argmin()
        return self.table.index_select(0, nearest.reshape(1))[0]

    def _asked(self) -> Tensor:
        if self._ask is None:
            raise InputError(
                "id schedule: the UNet runs without a pipeline that tells its timesteps; give them: "
                "handle.schedule(..., timesteps=scheduler.timesteps)"
            )
        return self._ask()

    def _make(self, steps: Tensor, device: torch.device) -> None:
        wanted = (len(steps), len(self.start))
        if self.table is None or self.table.device != device or self.table.shape != wanted:
            self.table = torch.empty(wanted, device=device)
            self.steps = torch.empty(len(steps), device=device)
        self.rows = self.factors(len(steps))
        self.table.copy_(torch.tensor(self.rows))
        self.steps.copy_(steps)
        self._on_cpu = steps.tolist()
        self._seen = steps


def steps_of(running: Running) -> StepsOf | None:
    """What tells the timesteps of a pipeline's runs; None for a bare UNet."""
    return None if running.alone else StepsOf(running)


class StepsOf:
    """Asks the pipeline that runs for the timesteps of its call."""

    def __init__(self, running: Running) -> None:
        self.running = running
        self._kept = PerThread()  # (scheduler's timesteps, first, number, those of the run)

    def __call__(self) -> Tensor:
        """The same tensor as long as the run is the same."""
        pipe = self.running()
        scheduler = getattr(pipe, "scheduler", None)
        if scheduler is None or getattr(scheduler, "timesteps", None) is None:
            raise InputError("id schedule: the pipeline that was attached is gone or has no scheduler; attach anew")
        whole = scheduler.timesteps
        count = getattr(pipe, "num_timesteps", None) or len(whole)
        begin = getattr(scheduler, "begin_index", None)
        if begin is None:
            begin = 0 if hasattr(scheduler, "begin_index") else len(whole) - count
        kept = self._kept.get()
        if kept is None or kept[0] is not whole or kept[1:3] != (begin, count):
            kept = (whole, begin, count, _timesteps(whole[begin : begin + count]))
            self._kept.set(kept)
        return kept[3]


def _timesteps(steps: Any) -> Tensor:
    steps = torch.as_tensor(steps).detach().flatten().float()
    if not len(steps):
        raise InputError("id schedule: timesteps must be those of a run, got none")
    return steps


def _per_identity(value: Any, count: int, name: str) -> tuple[float, ...]:
    several = isinstance(value, Sequence) and not isinstance(value, str)
    values = list(value) if several else [value] * count
    if len(values) != count:
        raise InputError(f"{name}: {count} identities need one number or {count}, got {len(values)}")
    return tuple(_number(v, name) for v in values)


def _rows(values: Any, count: int) -> list[tuple[float, ...]]:
    values = values.tolist() if isinstance(values, Tensor) else values
    if not isinstance(values, Sequence) or isinstance(values, str) or not len(values):
        raise InputError(f"id_schedule must be a list of factors, one per step, got {values!r:.80}")
    return [_per_identity(row, count, "id_schedule") for row in values]


def _number(value: Any, name: str) -> float:
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        raise InputError(f"{name} must be finite numbers, got {value!r}")
    return float(value)
