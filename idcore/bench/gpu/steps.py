"""What a part goes through, call by call, so that one call that hangs or takes the GPU's context with it costs only
itself: the part says what it begins, and its next process goes on behind it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from typing import Any

import torch

from .place import DRY_TIMES, LOST, Save, place

PATIENCE = 30.0  # seconds that a call may take, if it is not told otherwise (our choice)


def context_works() -> bool:
    """False after an illegal access or the like: then every later call in this process fails as well."""
    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except Exception:
        return False
    return True


class Steps:
    """The steps of one process. `found["begun"]` names those begun; `found["under_way"]` is the name of the last and
    the time (`time.monotonic`, one clock for all processes) at which it counts as hanging.

    Args:
        save: receives `found` before every step.
        past: steps of earlier processes of the part, which are not done again.
    """

    def __init__(self, save: Save, found: dict[str, Any], past: Collection[str] = ()):
        self.save, self.found, self.past = save, found, frozenset(past)
        found["begun"] = []

    def begin(self, name: str, seconds: float = PATIENCE) -> bool:
        """Before a step; False where an earlier process did it, or ended in it."""
        if name in self.past:
            return False
        self.found["begun"].append(name)
        self.found["under_way"] = [name, time.monotonic() + seconds * (DRY_TIMES if place().dry else 1)]
        self.save(self.found)
        return True

    def guarded(self, make: Callable[[], Any], failed: Callable[[str], Any]) -> Any:
        """The step's result, or `failed` of what went wrong. Leaves the process where the CUDA context is lost."""
        try:
            return make()
        except Exception as e:
            made = failed(f"{type(e).__name__}: {str(e)[:500]}")
        if not context_works():
            self.save(self.found)
            os._exit(LOST)
        return made

    def end(self) -> None:
        """Behind the last step."""
        self.found.pop("under_way", None)
