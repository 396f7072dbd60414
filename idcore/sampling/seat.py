"""The identities of a pipeline's calls, and how they sit on its UNet between and during them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from ..attach import Handle, attach
from ..attention.sites import unwrap
from ..attention.stack import stack_of
from ..errors import InputError
from ..identity import Identity


class Seat:
    """Keeps the identities of the latest call projected, but off outside of calls.

    Args:
        owner: the pipeline that `attach` asks for guidance and timesteps.
        system, backend: as in `attach`.
        as_data: scales as tensors in every call (see `Conditioning.as_data`).
    """

    def __init__(self, owner: Any, system: Any, backend: str | None, as_data: bool) -> None:
        self.owner, self.system, self.backend, self.as_data = owner, system, backend, as_data
        self.handle: Handle | None = None
        self._people: tuple[Any, ...] = ()
        self._masks: Any = None

    @property
    def conditionings(self) -> list[Any]:
        """Everything that is attached to the UNet, by us or by others."""
        return list(stack_of(unwrap(self.owner.unet)).layers)

    def leave(self) -> None:
        """Take the identities off and drop their keys and values."""
        if self.handle is not None:
            self.handle.detach()
        self.handle, self._people, self._masks = None, (), None

    @contextlib.contextmanager
    def taken(self, people: tuple[Any, ...], scale: Any, masks: Any, window: tuple[Any, Any, Any]) -> Iterator[None]:
        """For the time of one call."""
        try:
            if people:
                self._sit(people)
                self._set_masks(masks)
                self.handle.schedule(*window)
                self.handle.scale(scale)
            yield
        finally:
            if self.handle is not None:
                self.handle.scale(0.0)
                self.handle.schedule()

    def _sit(self, people: tuple[Any, ...]) -> None:
        others = len(people) != len(self._people) or any(a is not b for a, b in zip(people, self._people))
        # Without a system, what stands for it is made of the people themselves.
        if self.handle is None or not self.handle.attached or (others and self.system is None):
            self.leave()
            self.handle = attach(self.owner, self.system, list(people), id_scale=0.0, backend=self.backend)
            self.handle._conditioning.as_data = self.as_data
        elif others:
            self._set_masks(None)
            self.handle.schedule()
            self.handle.identity(list(people))
        self._people = people

    def _set_masks(self, masks: Any) -> None:
        if masks is not self._masks:
            self.handle.masks(masks)
            self._masks = masks


def people_of(pipe: Any, image: Any, embeds: Any) -> tuple[Identity, ...]:
    """The identities of a call, from its `id_image` or its `id_embeds`.

    Raises:
        InputError: both are given, or identities that the pipeline cannot use without a system.
    """
    if image is not None and embeds is not None:
        raise InputError("give id_image or id_embeds, not both; encode photos once with pipe.encode(...)")
    if image is not None:
        several = isinstance(image, (list, tuple)) and image and all(isinstance(p, (list, tuple)) for p in image)
        return tuple(pipe.encode(p) for p in (image if several else [image]))
    if embeds is None:
        return ()
    several = embeds if isinstance(embeds, (list, tuple)) else [embeds]
    people = tuple(Identity.load(e) if isinstance(e, (str, os.PathLike)) else e for e in several)
    if pipe.system is None and not all(getattr(p, "banks", ()) for p in people):
        raise InputError(
            "IDPipeline without a system cannot use id_embeds that hold no keys and values (Identity.with_bank); "
            "give it one, e.g. idcore.PuLID"
        )
    return people
