"""What one `attach` puts on a UNet: identities, scales, region masks, and the batch parts they act on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from .guidance import HALVES
from .kv_bank import KvBank, normal_mode
from .masks import PeopleMasks, read_masks
from .per_thread import PerThread
from .running import Running
from .scales import expand
from .schedule import StepSchedule
from .types import AttentionOptions, Site


class Branch(NamedTuple):
    """The identities of one conditioning at one layer, as `id_attention` takes them."""

    k: tuple[Tensor, ...]  # n times [Bi, H, Li, D]
    v: tuple[Tensor, ...]
    scale: tuple[float, ...] | Tensor  # n floats, or float32 [n] or [n, B]
    mask: list[Tensor | None] | None  # per identity None or [1 or B, Lq]


class Conditioning:
    """Identities of one `attach`, ready for every layer."""

    def __init__(
        self,
        system: Any,
        people: Sequence[Any],
        sites: Sequence[Site],
        options: AttentionOptions,
        rows: Callable[[], tuple[str, ...]],
        backend: str | None,
    ) -> None:
        self.system = system
        self.bank = KvBank(system, people, sites)
        self.sites = {site.name: site for site in sites}
        self.places = {site.name: i for i, site in enumerate(sites)}
        self.options = options
        # A system of texts for regions takes the place of the prompt where it acts, in place of adding to it.
        self.replaces = bool(getattr(system, "replaces_text", False))
        self.rows = rows
        self.rows_now: tuple[str, ...] = HALVES[0]
        self.running: Running | None = None  # which pipeline runs the UNet
        self.backend = backend
        self.device = torch.device("cpu")
        self._heard_kept: dict[Any, Tensor] = {}
        self._base: Tensor | None = None  # scales as set, float32 [sites, n]
        self._table: Tensor | None = None  # the same times the factors of the step
        self.as_data = False  # scales as tensors in eager calls too: for a loop that is recorded
        self.plan: StepSchedule | None = None
        self.plan_spec: tuple[Any, Any, Any, Any] | None = None
        # Of the step: factors where the CPU knows them, or None, and the same as float32 [n].
        self._step = PerThread()
        self._gain: Tensor | None = None  # the latter of the latest pass, for graphs that are compiled
        self.set_scale(1.0)
        self.set_masks(None)

    # -- what the user may change while attached ------------------------------------------------

    @property
    def people(self) -> tuple[Any, ...]:
        """The identities."""
        return self.bank.people

    @property
    def has_masks(self) -> bool:
        """Whether some identity acts in a part of the picture alone."""
        return self.masks.some

    def set_people(self, people: Sequence[Any], place: tuple[torch.dtype, torch.device] | None) -> None:
        """Swap the identities; scales and masks stay, so their number must fit. With an exception nothing changes.

        Args:
            people: the new ones, checked by `people_of`.
            place: dtype and device for keys and values to be projected now; None: when a layer asks.
        """
        bank = KvBank(self.system, people, tuple(self.sites.values()))
        count = len(bank.people)
        if place is not None:
            bank.fill(*place)
        if count != len(self.people):
            if self.masks.some:
                raise InputError(
                    f"identity: masks for {len(self.people)} identities are set, got {count} identities; "
                    "call handle.masks(None) first"
                )
            plan = None if self.plan_spec is None else StepSchedule(*self.plan_spec, count)
            self.floats, self.tensor = self._expanded(self.spec, count)
            self.masks = PeopleMasks((None,) * count)
            self._base = self._table = None
            self._begin_anew()
            self.plan = plan
        self.bank = bank

    def set_scale(self, scale: Any) -> None:
        """Numbers for the eager path; the same numbers in a tensor, changed in place, for compiled graphs."""
        self.floats, self.tensor = self._expanded(scale, len(self.people))
        self.spec = scale
        if self.floats is not None and self._table is not None:
            self._base.copy_(self._rows_of_floats())
            self._write_table()

    def set_schedule(self, start: Any, end: Any, values: Any, timesteps: Any) -> None:
        """When the identities act; see `StepSchedule`. Tensors stay where they are as long as their shapes do."""
        spec = (start, end, values, timesteps)
        plan = StepSchedule(*spec, len(self.people), keep=self.plan)
        if plan.always and not self.as_data:
            spec = plan = None
        self.plan, self.plan_spec = plan, spec
        self._begin_anew()
        self._write_table()

    def set_masks(self, masks: Any) -> None:
        """Region masks; see `masks.read_masks` for the forms."""
        self.masks = PeopleMasks(read_masks(masks, len(self.people))).to(self.device)

    # -- what a layer asks for ------------------------------------------------------------------

    def is_off(self, name: str) -> bool:
        """True where every scale is the number 0, by itself or at this step: the layer then runs as if nothing were
        attached."""
        if self.as_data:
            return False
        factors = self._factors()
        if factors is not None and not any(factors):
            return True
        return self.floats is not None and not any(self._floats_now(name))

    def branch(self, name: str, q: Tensor, size: tuple[int, int] | None) -> Branch:
        """Everything that `id_attention` needs of this conditioning at layer `name`.

        Args:
            name: site name.
            q: queries [B, H, Lq, D].
            size: height and width of the UNet's input, needed where masks are set.

        Raises:
            InputError: the batch is not made of the parts that guidance says, or the identities' rows do not
                divide the number of images.
        """
        # What a pipeline says cannot be traced; the hook asked it just before.
        rows = self.rows_now if torch.compiler.is_compiling() else self.rows()
        self._check_batch(q.shape[0], rows)
        pairs = self.bank.pairs(name, rows, q)
        silent = tuple(getattr(p, "uncond_tokens", None) is None for p in self.people)
        scale = self._scale(name, q, rows, silent)
        mask = self.masks.at(q, size, len(rows)) if self.masks.some else None
        return Branch(tuple(k for k, _ in pairs), tuple(v for _, v in pairs), scale, mask)

    def begin(self, timestep: Any) -> None:
        """Called before each forward of the UNet."""
        self.bank.begin()
        if self.plan is not None:
            self._begin_step(timestep)

    def begin_traced(self, timestep: Any) -> None:
        """The same inside of a graph that is being traced."""
        if self.plan is None:
            return
        if self.plan.fixed is None or self._table is None or self.tensor is not None:
            raise InputError(
                "id schedule: a graph that holds the UNet's hooks cannot ask a pipeline; give "
                "handle.schedule(..., timesteps=scheduler.timesteps) on the UNet's device, and scales as numbers"
            )
        self._table.copy_(self._base * self.plan.row_on_device(timestep))

    def fill(self, dtype: torch.dtype, device: torch.device) -> None:
        """Put everything where the layers will ask for it, so that mistakes show before anything is attached."""
        self.device = device
        self.masks = self.masks.to(device)
        if self.floats is not None:
            self._scale_table(device)
        self.bank.fill(dtype, device)

    def data(self, device: torch.device) -> list[Tensor]:
        """What passes read where scales are data: the scales as set, and the schedule's timesteps and factors.

        They are changed in place as long as their shapes stay, and are others afterwards.
        """
        tensors = [] if self.plan is None else [self.plan.steps, self.plan.table]
        if self.floats is not None:
            self._scale_table(device)
            tensors.append(self._base)
        return tensors

    def constants(self) -> Any:
        """What passes read besides and nobody writes: to be kept by who goes on reading it."""
        return self._table, dict(self._heard_kept)

    # -- inside ---------------------------------------------------------------------------------

    def _expanded(self, scale: Any, count: int) -> tuple[dict[str, tuple[float, ...]] | None, Tensor | None]:
        wide = expand(scale, tuple(self.sites.values()), count)
        return (None, wide) if isinstance(wide, Tensor) else (wide, None)

    def _rows_of_floats(self) -> Tensor:
        return torch.tensor([self.floats[name] for name in self.sites], dtype=torch.float32)

    def _check_batch(self, batch: int, rows: tuple[str, ...]) -> None:
        if batch % len(rows):
            raise InputError(
                f"id_attention: guidance says that a batch is made of {rows}, got a batch of {batch}, which "
                f"{len(rows)} does not divide; a UNet called without its pipeline needs attach(..., cfg=False)"
            )
        images = batch // len(rows)
        for j, person in enumerate(self.people):
            if images % person.tokens.shape[0]:
                raise InputError(
                    f"id_attention: identity {j} has rows for {person.tokens.shape[0]} images, which do not divide "
                    f"the {images} images of this batch; give one row, or one per image (Identity.batch)"
                )

    def _scale(
        self, name: str, q: Tensor, rows: tuple[str, ...], silent: tuple[bool, ...]
    ) -> tuple[float, ...] | Tensor:
        mute = any(silent) and "uncond" in rows
        if self.tensor is None and not mute and not torch.compiler.is_compiling() and self._known():
            return self._floats_now(name)
        if self.tensor is not None:
            scale = self._given_scale(q, rows)
        else:
            scale = self._scale_row(name, q.device)
        if not mute:
            return scale
        heard = self._heard(rows, silent, q.shape[0] // len(rows), q.device)
        return (scale if scale.dim() == 2 else scale[:, None]) * heard

    def _given_scale(self, q: Tensor, rows: tuple[str, ...]) -> Tensor:
        """The user's tensor times the factors of the step. [n] or [n, B]"""
        scale = self.tensor.to(device=q.device, dtype=torch.float32)
        if scale.dim() < 2:
            scale = scale.expand(len(self.people))
            return scale if self.plan is None else scale * self._gain_now().to(q.device)
        images = q.shape[0] // len(rows)
        if scale.shape[1] not in (1, images):
            raise InputError(f"id_scale: a tensor for {scale.shape[1]} images, this batch has {images}; give one each")
        scale = scale.expand(-1, images).repeat(1, len(rows))
        return scale if self.plan is None else scale * self._gain_now().to(q.device)[:, None]

    def _heard(self, rows: tuple[str, ...], silent: tuple[bool, ...], images: int, device: torch.device) -> Tensor:
        """1 where an identity acts on a sample, 0 on the uncond parts of those without uncond tokens. [n, B]"""
        key = (rows, silent, images, device)
        if torch.compiler.is_compiling() or key not in self._heard_kept:
            lists = [[0.0 if quiet and row == "uncond" else 1.0 for row in rows] for quiet in silent]
            with normal_mode():
                heard = torch.tensor(lists, device=device).repeat_interleave(images, 1)
            if torch.compiler.is_compiling():
                return heard
            self._heard_kept = {key: heard}
        return self._heard_kept[key]

    def _known(self) -> bool:
        """Whether the scales of this step may be read as numbers."""
        return not self.as_data and (self.plan is None or self._factors() is not None)

    def _factors(self) -> tuple[float, ...] | None:
        """Of this thread's pass, where the CPU knows them."""
        step = self._step.get()
        return None if step is None else step[0]

    def _gain_now(self) -> Tensor:
        """Factors of this thread's pass, float32 [n]; compiled graphs take those of the latest."""
        return self._gain if torch.compiler.is_compiling() else self._step.get()[1]

    def _begin_anew(self) -> None:
        self._step, self._gain = PerThread(), None

    def _floats_now(self, name: str) -> tuple[float, ...]:
        factors = self._factors()
        if factors is None:
            return self.floats[name]
        return tuple(s * f for s, f in zip(self.floats[name], factors))

    def _begin_step(self, timestep: Any) -> None:
        tensor = isinstance(timestep, Tensor)
        if tensor and timestep.numel() != 1:
            raise InputError(
                f"id schedule: one timestep for the whole batch is needed, got {timestep.numel()}; "
                "take the schedule off with handle.schedule()"
            )
        plan, device = self.plan, self.device if self._table is None else self._table.device
        with self._step.lock, normal_mode():  # another thread's run has other timesteps
            plan.prepare(device)
            if self.as_data or (tensor and timestep.device.type != "cpu"):
                factors, gain = None, plan.row_on_device(torch.as_tensor(timestep).to(device))
            else:
                place = plan.at(timestep)
                factors, gain = plan.rows[place], plan.table[place].clone()
            self._step.set((factors, gain))
            self._gain = gain
            self._write_table()

    def _write_table(self) -> None:
        """Scales of this step, in place."""
        if self._table is None:
            return
        if self._gain is None:
            self._table.copy_(self._base)
        else:
            self._table.copy_(self._base * self._gain)

    def _scale_row(self, name: str, device: torch.device) -> Tensor:
        """Scales of this step at a layer, float32 [n]."""
        table, place = self._scale_table(device), self.places[name]
        if torch.compiler.is_compiling() or self.plan is None or self.as_data:  # first: a graph that asks is made anew
            return table[place]
        return self._base[place] * self._gain_now().to(device)  # the table may be at another thread's step

    def _scale_table(self, device: torch.device) -> Tensor:
        """float32 [sites, n], written in place by `set_scale` and by steps: compiled graphs see data."""
        if self._table is None or self._table.device != device:
            with normal_mode():
                self._base = self._rows_of_floats().to(device)
                gain = 1 if self._gain is None else self._gain.to(device)
                self._table = self._base * gain
        return self._table
