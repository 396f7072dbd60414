"""What a recorded loop reads of the identities on its UNet, and how it is filled before each play."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..attention.conditioning import Conditioning
from ..attention.masks import to_tokens


class ConditioningInputs:
    """The tensors of one conditioning that a recording reads. What stands in them is copied anew before each play.

    Args:
        conditioning: with scales as data.
        guided: whether the batch has two halves.
        like: its dtype and device are those of keys and values.
    """

    def __init__(self, conditioning: Conditioning, guided: bool, like: Tensor) -> None:
        self.conditioning = conditioning
        self._rows, self._like = ("uncond", "cond") if guided else ("cond",), like
        self._given: Tensor | None = None
        self._data: list[Tensor] = []
        self._grids: dict[Any, Tensor] = {}
        self._masks: Any = None
        self._pairs: list[Tensor] = []
        self._constants: Any = None

    @staticmethod
    def key(c: Conditioning) -> Any:
        """What a recording takes for granted."""
        people = tuple((p.tokens.shape, getattr(p, "uncond_tokens", None) is None) for p in c.people)
        masks = tuple(None if m is None else m.shape[0] for m in c.masks.given)
        plan = None if c.plan is None else c.plan.table.shape
        return id(c), masks, c.options, c.backend, plan, None if c.tensor is None else c.tensor.shape, people

    @contextlib.contextmanager
    def read(self) -> Iterator[None]:
        """While the loop is recorded: the conditioning reads tensors that are this recording's own."""
        c, given = self.conditioning, self.conditioning.tensor
        if given is not None:
            c.tensor = self._given = given.detach().to(self._like.device, torch.float32, copy=True)
        c.masks.grids.clear()
        try:
            yield
        finally:
            c.tensor = given
        self._data, self._pairs = c.data(self._like.device), self._keys_values()
        # From now on this recording's: the next one, and other masks, make grids of their own.
        self._grids, self._masks = dict(c.masks.grids), c.masks
        c.masks.grids.clear()
        self._constants = c.constants()

    def fill(self) -> None:
        """Copy what the conditioning holds now to where the recording reads."""
        c = self.conditioning
        if self._given is not None:
            self._given.copy_(c.tensor)
        _copy(self._data, c.data(self._like.device))
        _copy(self._pairs, self._keys_values())
        if self._masks is not c.masks:
            for (j, grid, device), mine in self._grids.items():
                mine.copy_(to_tokens(c.masks.given[j].to(device), grid))
            self._masks = c.masks

    def _keys_values(self) -> list[Tensor]:
        c = self.conditioning
        return [t for name in c.sites for pair in c.bank.pairs(name, self._rows, self._like) for t in pair]


def _copy(mine: list[Tensor], theirs: list[Tensor]) -> None:
    pairs = [(a, b) for a, b in zip(mine, theirs, strict=True) if a is not b]
    if pairs:
        torch._foreach_copy_([a for a, _ in pairs], [b for _, b in pairs])
