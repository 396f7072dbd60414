"""Which pipeline runs a UNet: several may share one (diffusers' `from_pipe`), each with a guidance and timesteps of its
own."""

from __future__ import annotations

import sys
import weakref
from typing import Any

from .sites import unwrap


class Running:
    """The pipeline whose call runs an attached UNet: the one that was attached, or another that shares its UNet.

    Pipelines are not kept alive. Who calls is looked up on the calling thread's stack when the UNet is entered: a
    pipeline's own state tells only how its last call was, not whether it is the one that runs now.
    """

    def __init__(self, pipe: Any = None) -> None:
        """pipe: what was attached; None for a UNet alone."""
        self.alone = pipe is None
        self._attached: Any = _nobody if pipe is None else weakref.ref(pipe)
        self._other: weakref.ref | None = None

    def __call__(self) -> Any:
        """The pipeline of the latest pass; None if it is gone, or a UNet alone ran outside of any."""
        other = None if self._other is None else self._other()
        return self._attached() if other is None else other

    def look(self, unet: Any) -> None:
        """Called when the UNet is entered."""
        found = _caller(unet)
        self._other = None if found is None or found is self._attached() else weakref.ref(found)


def _nobody() -> None:
    return None


def _caller(unet: Any) -> Any:
    """The innermost pipeline with this UNet that is being called on this thread's stack."""
    frame = sys._getframe(2)
    while frame is not None:
        # Reading a frame's variables costs more than its name.
        if frame.f_code.co_name == "__call__":
            owner = frame.f_locals.get("self")
            if hasattr(type(owner), "do_classifier_free_guidance") and unwrap(getattr(owner, "unet", None)) is unet:
                return owner
        frame = frame.f_back
    return None
