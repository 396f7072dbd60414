"""How many bytes of tensors are alive, counted at every operation; for real tensors and for fake ones alike."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveMemory(TorchDispatchMode):
    """Counts storages that are made inside of this block: alive now, and the most at any time.

    A storage counts once however many tensors share it, from the operation that made it until nothing refers to it any
    more. What an operation allocates and frees inside of itself (workspaces) is not seen.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def ignore(self, *tensors: Any) -> None:
        """These were there before."""
        for t in tree_iter(tensors):
            if isinstance(t, Tensor):
                self._see(t, counts=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        # Inputs that no operation in here has made come from outside.
        self.ignore(args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        for t in tree_iter(result):
            if isinstance(t, Tensor):
                self._see(t, counts=True)
        return result

    def _see(self, t: Tensor, counts: bool) -> None:
        storage = t.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if counts else 0

        def gone(_: Any) -> None:
            self._known.pop(key, None)
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def allocator_peak(run: Any) -> int:
    """The most bytes that PyTorch's CPU allocator had handed out beyond those before, while `run()` ran."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
