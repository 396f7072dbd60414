"""Values of the pass that runs, for UNets that several threads run at once."""

from __future__ import annotations

import threading
from typing import Any


class PerThread:
    """A value for each thread; one that set none reads the latest of all: autograd recomputes in threads of its own.

    Attributes:
        lock: for who changes what threads share.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._here = threading.local()
        self._latest: Any = None

    def __reduce__(self) -> tuple:
        """Copies begin with nothing."""
        return PerThread, ()

    def get(self) -> Any:
        """This thread's value; None before any was set."""
        return getattr(self._here, "value", self._latest)

    def set(self, value: Any) -> None:
        """Set this thread's value."""
        self._here.value = self._latest = value
