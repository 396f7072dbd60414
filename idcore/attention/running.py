"""Which pipeline runs a UNet or ControlNet: several may share one (diffusers' `from_pipe`), each with a guidance and
timesteps of its own, also at the same time in several threads."""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch

from .per_thread import PerThread
from .sites import unwrap


class Running:
    """The pipeline whose call runs an attached network: the one that was attached, or another that shares it.

    Pipelines are not kept alive. Who calls is looked up on the calling thread's stack when the network is entered: a
    pipeline's own state tells only how its last call was, not whether it is the one that runs now.
    """

    def __init__(self, pipe: Any = None) -> None:
        """pipe: what was attached; None for a network alone."""
        self.alone = pipe is None
        self._attached: Any = _nobody if pipe is None else weakref.ref(pipe)
        self._other = PerThread()  # weakref.ref, or None: the attached one

    def __reduce__(self) -> tuple:
        """A copied network's: which pipeline will have the copy shows when it runs."""
        return Running, ()

    def __call__(self) -> Any:
        """The pipeline of this thread's latest pass; None if it is gone, or a network alone ran outside of any."""
        if torch.compiler.is_compiling():
            return self._attached()  # threads cannot be traced
        ref = self._other.get()
        other = None if ref is None else ref()
        return self._attached() if other is None else other

    def look(self, network: Any) -> None:
        """Called when the network is entered."""
        if torch.compiler.is_compiling():
            return  # nor can frames
        found = _caller(network)
        self._other.set(None if found is None or found is self._attached() else weakref.ref(found))


def _nobody() -> None:
    return None


def _caller(network: Any) -> Any:
    """The innermost pipeline with this UNet or ControlNet that is being called on this thread's stack."""
    frame = sys._getframe(2)
    while frame is not None:
        # Reading a frame's variables costs more than its name.
        if frame.f_code.co_name == "__call__":
            owner = frame.f_locals.get("self")
            if hasattr(type(owner), "do_classifier_free_guidance") and _has(owner, network):
                return owner
        frame = frame.f_back
    return None


def _has(pipe: Any, network: Any) -> bool:
    control = unwrap(getattr(pipe, "controlnet", None))
    several = getattr(control, "nets", ())  # MultiControlNetModel
    return any(unwrap(n) is network for n in (getattr(pipe, "unet", None), control, *several))
