"""Which backend runs a call: the first in ORDER with no reason against it."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

from ..backends.call import Call, constant_in_traces
from ..errors import InputError, NoBackendError

ORDER = ("cuda", "triton", "cpu", "sdpa", "reference")


@functools.cache
def load(name: str) -> ModuleType | None:
    """The backend's module, or None where the installation does not hold it."""
    check_name(name)
    full = f"idcore.backends.{name}"
    try:
        return importlib.import_module(full)
    except ModuleNotFoundError as e:
        if e.name != full:
            raise
        return None


def check_name(backend: str | None) -> None:
    """Raise `InputError` unless the name is None or in ORDER."""
    if backend is not None and backend not in ORDER:
        raise InputError(f"backend must be one of {', '.join(ORDER)} or None, got {backend!r}")


def why_not(name: str, call: Call) -> list[str]:
    """Reasons why the named backend cannot run the call; empty if it can."""
    module = load(name)
    if module is None:
        return ["not part of this installation"]
    reasons = list(module.why_not(call))
    if call.mask_needs_grad and not module.DIFFERENTIABLE:
        reasons.append("gradients of id_mask or text_bias (only sdpa and reference give them)")
    return reasons


@functools.lru_cache(maxsize=4096)
def _choose(call: Call, backend: str | None) -> str:
    refusals = {}
    for name in (backend,) if backend else ORDER:
        refusals[name] = why_not(name, call)
        if not refusals[name]:
            return name
    lines = [f"  {name}: {'; '.join(reasons)}" for name, reasons in refusals.items()]
    fix = "leave backend=None to take the first that can run it" if backend else "see `idcore env`"
    head = f"id_attention: {'backend ' + repr(backend) if backend else 'no backend'} cannot run this call"
    raise NoBackendError("\n".join([head, f"  call: {call.describe()}", *lines, f"  fix: {fix}"]))


@constant_in_traces
def only_torch(device: str) -> bool:
    """True where no compiled backend of ours is usable on the device, so that a traced call inlines PyTorch's ops.

    Asked with a call that any usable compiled backend takes; a constant while tracing.
    """
    easy = Call(device, torch.float32, 1, 1, 64, 77, 64, (32,), "add", False, False, False, False, True)
    return all(why_not(name, easy) for name in ORDER if name not in ("sdpa", "reference"))


def choose(call: Call, backend: str | None = None) -> str:
    """Name of the backend that runs the call.

    Args:
        call: facts of the call.
        backend: take this one or fail; None: the first in ORDER that can.

    Raises:
        NoBackendError: none can; the text lists each backend's reasons.
        InputError: no backend of that name.
    """
    check_name(backend)
    return _choose(call, backend)


def explain(call: Call) -> str:
    """Text: the backend that would run the call, and what speaks against each one before it."""
    lines = []
    for name in ORDER:
        reasons = why_not(name, call)
        lines.append(f"{name}: {'; '.join(reasons) if reasons else 'runs this call'}")
        if not reasons:
            break
    return "\n".join(lines)


def choose_for_loss(plain: str, op: str, q: torch.Tensor, keys: tuple[torch.Tensor, ...], backend: str | None) -> str:
    """For ops with Triton and C++ kernels and a path in PyTorch's own ops named `plain`: which of the three runs.

    Args:
        q: [B, H, Lq, D]; keys: each [Bt, H, Lt, D]; checked.
        backend: "triton", "cpu", `plain`, or None: "triton" on a GPU and "cpu" on the CPU if they can, else `plain`.

    Raises:
        InputError: no backend of that name.
        NoBackendError: the named backend cannot run this call; says why.
    """
    if backend not in (None, "triton", "cpu", plain):
        raise InputError(f"backend must be one of triton, cpu, {plain} or None, got {backend!r}")
    if backend == plain:
        return plain
    name = backend or ("cpu" if q.device.type == "cpu" else "triton")
    b, h, lq, d = q.shape
    dense = all(t.stride(3) == 1 or d == 1 for t in (q, *keys))
    reasons = _against_loss(name, q.device.type, q.dtype, (b, h, lq, keys[0].shape[2], d), dense)
    if backend is None:
        return plain if reasons else name
    if reasons:
        raise NoBackendError(f"{op}: backend {name!r} cannot run this call: {'; '.join(reasons)}")
    return name


@constant_in_traces
def _against_loss(name: str, device: str, dtype: torch.dtype, sizes: tuple[int, ...], dense: bool) -> list[str]:
    """Reasons, a constant while tracing. sizes: B, H, Lq, Lt, D"""
    return why_not(name, Call(device, dtype, *sizes, (), "add", False, False, False, False, dense))
