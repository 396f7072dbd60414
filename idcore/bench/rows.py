"""One row of a report: parity first, then interleaved medians of one op's forward or backward and of its rivals."""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, NoBackendError
from ..ops import id_attention
from ..testing.cases import Case
from ..testing.parity import Parity, check_gradients, check_parity, cotangent, poisoned, recorded
from ..testing.timing import Timing, interleaved

# eager: the op in ordinary PyTorch; compiled: torch.compile of it; the others are idcore's own backends.
RIVALS = ("eager", "compiled", "sdpa", "reference")
PASSES = ("fwd", "bwd")
# What runs on a CPU where the backend asked for does not know the op yet; the row says so.
PLAIN = {"semantic_alignment": "sdpa"}
Calls = dict[str, Callable[[], object]]


@functools.cache
def _compiled(kind: type) -> Callable[[Any, dict[str, Any]], Tensor]:
    return torch.compile(kind.eager, dynamic=False)


def _function(case: Any, name: str, backend: str) -> Callable[[dict[str, Any]], Tensor]:
    if name == "eager":
        return case.eager
    if name == "compiled":
        return functools.partial(_compiled(type(case)), case)
    return lambda given: case.run(given, backend if name == "ours" else name)


def _forward_calls(case: Any, names: tuple[str, ...], backend: str, device: str) -> Calls:
    given = case.inputs(device=device)
    calls = {name: functools.partial(_function(case, name, backend), given) for name in names}
    if isinstance(case, Case):
        out, plain = poisoned(given["q"]), case.with_(merge="none").inputs(device=device)
        calls["ours"] = lambda: id_attention(**given, backend=backend, out=out)
        calls["own_text_only"] = lambda: id_attention(**plain, backend=backend, out=out)
    return calls


def _backward_call(case: Any, call: Callable[[dict[str, Any]], Tensor], device: str) -> Callable[[], object]:
    """Forward once, with what it saves; the gradient of all leaves again and again."""
    given, leaves = recorded(case.inputs(device=device), case.gradients)
    with torch.enable_grad():
        out = call(given)
    g, wanted = cotangent(out, 0), list(leaves.values())
    return lambda: torch.autograd.grad(out, wanted, g, retain_graph=True, allow_unused=True)


def _calls(case: Any, options: argparse.Namespace, direction: str, backend: str, device: str) -> Calls:
    names = ("ours", *options.against)
    if direction == "fwd":
        return _forward_calls(case, names, backend, device)
    calls = {name: _backward_call(case, _function(case, name, backend), device) for name in names}
    if isinstance(case, Case) and case.merge != "none":
        plain = case.with_(merge="none")
        calls["own_text_only"] = _backward_call(plain, _function(plain, "ours", backend), device)
    return calls


def work(case: Any, direction: str) -> dict[str, int]:
    """Operations and bytes that cannot be avoided.

    Backward reads the inputs and the gradient and writes as many gradients: twice forward's bytes.
    """
    if direction == "fwd":
        return {"flops": case.flops, "bytes": case.bytes}
    return {"flops": case.backward_flops, "bytes": 2 * case.bytes}


def floor_ms(case: Any, direction: str, gflops: float | None, gb_per_s: float) -> float:
    """What the machine needs at the least: on a CPU, whose caches hold a layer, arithmetic; with gflops None bytes."""
    done = work(case, direction)
    if gflops and done["flops"]:
        return done["flops"] / gflops * 1e-6
    return done["bytes"] / gb_per_s * 1e-6


def _figures(times: dict[str, Timing], floor: float, share: bool) -> dict[str, Any]:
    ours = times["ours"]
    ratios = {n: round(t.ms / ours.ms, 2) for n, t in times.items() if n not in ("ours", "own_text_only")}
    if "own_text_only" in times:
        ratios["own_text_only"] = round(ours.ms / times["own_text_only"].ms, 2)
    return {
        "ms": round(ours.ms, 4),
        "spread": [round(ours.p10, 4), round(ours.p90, 4)],
        "ratio": ratios,
        "share_of_peak": round(floor / ours.ms, 3) if share else None,
        "floor_ms": float(f"{floor:.3g}"),
    }


def _able(case: Any, backend: str, device: str) -> tuple[str, dict[str, str]]:
    """The backend that the row is about, and, where it is not the one asked for, why."""
    try:
        case.run(case.inputs(device=device), backend)
    except (InputError, NoBackendError) as e:
        if isinstance(case, Case) or device != "cpu":
            raise
        return PLAIN.get(case.op, "reference"), {"asked": backend, "why_not": str(e).splitlines()[0]}
    return backend, {}


def _verdict(case: Any, backend: str, direction: str, device: str) -> Parity:
    if direction == "fwd":
        return check_parity(case, backend, device=device)
    verdicts = check_gradients(case, backend, device=device)
    return max(verdicts, key=lambda v: (not v.ok, v.error / max(v.limit, 1e-30)))


def measure(
    case: Any, direction: str, options: argparse.Namespace, device: str, peaks: dict[str, float | None], gb_per_s: float
) -> dict[str, Any]:  # fmt: skip
    """One row, in the form of the figures that commands print. A row whose parity is red has no time.

    Args:
        case: of any op.
        direction: "fwd" or "bwd" (the gradients of all inputs, forward not counted).
        peaks: multiply-add rate by dtype, in GFLOP/s; None: only bytes are held against the machine.
    """
    backend, asked = _able(case, options.backend, device)
    row = {
        "op": case.op, "case": case.name, "backend": backend, **asked, "dtype": case.dtype,
        "merge": getattr(case, "merge", None), "batch": case.batch, "pass": direction,
    }  # fmt: skip
    if isinstance(case, Case):
        row["num_zero"] = case.num_zero
    parity = _verdict(case, backend, direction, device)
    row["parity"] = parity.ok
    if parity.ok:
        clock = time.process_time if options.clock == "cpu" else time.perf_counter
        calls = _calls(case, options, direction, backend, device)
        times = interleaved(calls, rounds=options.rounds, device=device, clock=clock)
        floor = floor_ms(case, direction, peaks[case.dtype], gb_per_s)
        row |= work(case, direction)
        row |= _figures(times, floor, bool(peaks[case.dtype] and case.flops))
    else:
        row |= {"what": parity.what, "error": parity.error, "limit": parity.limit}
    print(row, file=sys.stderr, flush=True)
    return row


def figures(
    head: dict[str, Any], error: float, limit: float, calls: Calls, floor: float, options: argparse.Namespace,
    device: str = "cpu",
) -> dict[str, Any]:  # fmt: skip
    """A row of an op with cases of its own: as `measure`, with the parity judged by the caller.

    Args:
        device: where the calls run; times on "cuda" wait for its work.
    """
    row = {**head, "parity": error <= limit}
    if row["parity"]:
        clock = time.process_time if options.clock == "cpu" else time.perf_counter
        times = interleaved(calls, rounds=options.rounds, device=device, clock=clock)
        row |= _figures(times, floor, bool(floor))
    else:
        row |= {"error": error, "limit": limit}
    print(row, file=sys.stderr, flush=True)
    return row
