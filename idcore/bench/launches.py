"""Counts what a module would launch on a GPU: operations that compute, not views, and our kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..ops import dispatch

# Only memory or views: no kernel runs.
FREE = frozenset(
    "empty empty_like empty_strided new_empty view _unsafe_view expand transpose permute slice select unsqueeze "
    "squeeze split unbind chunk as_strided detach alias t _reshape_alias lift_fresh unfold split_with_sizes unflatten "
    "flatten reshape is_same_size".split()
)
TWO_LAUNCHES = ("ortho", "ortho_v2")  # merges whose kernels run twice over the image tokens


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.inside, self.count = False, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[-1]
        if self.inside and name not in FREE:
            self.count += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def _counting_backend(name: str, counter: _Counter) -> Iterator[None]:
    """Calls of a compiled backend go past the dispatcher; count them where they enter."""
    module = dispatch.load(name)
    forward = module.forward

    def counted(a: Any, out: Any = None) -> Any:
        counter.count += counter.inside * (2 if a.merge in TWO_LAUNCHES and a.k_id else 1)
        inside, counter.inside = counter.inside, False
        try:
            return forward(a, out)
        finally:
            counter.inside = inside

    module.forward = counted
    try:
        yield
    finally:
        module.forward = forward


def count_launches(call: Callable[[], object], layers: Sequence[nn.Module]) -> int:
    """Launches inside `layers` during one call.

    A call of a compiled `id_attention` counts as what its GPU form launches: one kernel, two where a merge sums over
    the image tokens first. Everything else counts as PyTorch's dispatcher sees it, views and allocations left out.
    """
    counter = _Counter()

    def enter(*_: Any) -> None:
        counter.inside = True

    def leave(*_: Any) -> None:
        counter.inside = False

    hooks = [h for m in layers for h in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))]
    try:
        with ExitStack() as stack:
            for name in ("cuda", "triton", "cpu"):
                stack.enter_context(_counting_backend(name, counter))
            stack.enter_context(counter)
            call()
    finally:
        for h in hooks:
            h.remove()
    return counter.count
