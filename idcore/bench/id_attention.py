"""Times `id_attention` on a backend against eager PyTorch and torch.compile, per layer of the SDXL UNet."""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..ops import id_attention
from ..testing.cases import MERGES, MODEL_CASES, SDXL_LAYERS, Case, make_inputs
from ..testing.eager import eager_id_attention
from ..testing.parity import check_parity, poisoned
from ..testing.timing import Timing, copy_bandwidth, interleaved
from . import peak

CASES = {case.name: case for case in MODEL_CASES}
DEFAULT_CASES = tuple(case.name for case in SDXL_LAYERS)
# eager: PuLID's processor in ordinary PyTorch; compiled: torch.compile of it; the others are idcore's own backends.
RIVALS = ("eager", "compiled", "sdpa", "reference")
__all__ = ["CASES", "DEFAULT_CASES", "MERGES", "RIVALS", "run"]


def _cases(options: argparse.Namespace) -> Iterator[Case]:
    for dtype in options.dtype:
        for name in options.cases:
            for batch in options.batch:
                for merge in options.merge:
                    zeros = 0 if merge == "none" else options.num_zero
                    yield CASES[name].with_(dtype=dtype, batch=batch, merge=merge, num_zero=zeros, text_batch=batch)


@functools.cache
def _compiled() -> Callable[..., torch.Tensor]:
    return torch.compile(eager_id_attention, dynamic=False)


def _rival(name: str, given: dict[str, Any]) -> Callable[[], object]:
    if name == "eager":
        return lambda: eager_id_attention(**given)
    if name == "compiled":
        return lambda: _compiled()(**given)
    return lambda: id_attention(**given, backend=name)


def _calls(case: Case, options: argparse.Namespace, device: str) -> dict[str, Callable[[], object]]:
    given, plain = make_inputs(case, device=device), make_inputs(case.with_(merge="none"), device=device)
    out = poisoned(given["q"])
    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: id_attention(**given, backend=options.backend, out=out),
        "own_text_only": lambda: id_attention(**plain, backend=options.backend, out=out),
    }
    for name in options.against:
        calls[name] = _rival(name, given)
    return calls


def _row(case: Case, times: dict[str, Timing], gflops: float | None, gb_per_s: float) -> dict[str, Any]:
    ours = times["ours"]
    ratios = {n: round(t.ms / ours.ms, 2) for n, t in times.items() if n not in ("ours", "own_text_only")}
    ratios["own_text_only"] = round(ours.ms / times["own_text_only"].ms, 2)
    # On a CPU arithmetic bounds: a layer's tensors stay in the last-level cache. On a GPU the bytes do.
    floor = (case.flops / gflops if gflops else case.bytes / gb_per_s) * 1e-6
    return {
        "ms": round(ours.ms, 3),
        "spread": [round(ours.p10, 3), round(ours.p90, 3)],
        "ratio": ratios,
        "share_of_peak": round(floor / ours.ms, 3) if gflops else None,
        "floor_ms": round(floor, 3),
    }


def _head(case: Case, backend: str) -> dict[str, Any]:
    return {
        "op": "id_attention", "case": case.name, "backend": backend, "dtype": case.dtype, "merge": case.merge,
        "batch": case.batch, "pass": "fwd", "num_zero": case.num_zero,
    }  # fmt: skip


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All rows. A row whose parity is red has no time.

    share_of_peak: useful floating-point operations a second over the multiply-add rate measured in this run (for bf16
    that of the bf16 dot product where the instruction set in use has one). floor_ms: the time at that rate; on a GPU
    the time of its bytes at copy bandwidth.
    """
    device = "cuda" if options.backend in ("cuda", "triton") else "cpu"
    torch._dynamo.config.recompile_limit = 256  # one shape and dtype per row
    bandwidth = copy_bandwidth(device=device)
    # On a GPU the floor is its bandwidth's; its multiply-add peak is not measured here.
    peaks = {d: peak.gflops(torch.get_num_threads(), d) if device == "cpu" else None for d in options.dtype}
    rows = []
    for case in _cases(options):
        parity = check_parity(case, options.backend, device=device)
        row = {**_head(case, options.backend), "parity": parity.ok}
        if parity.ok:
            clock = time.process_time if options.clock == "cpu" else time.perf_counter
            times = interleaved(_calls(case, options, device), rounds=options.rounds, device=device, clock=clock)
            row |= _row(case, times, peaks[case.dtype], bandwidth)
        else:
            row |= {"error": parity.error, "limit": parity.limit}
        print(row, file=sys.stderr, flush=True)
        rows.append(row)
    measured = {dtype: rate and round(rate, 1) for dtype, rate in peaks.items()}
    return {"peak_gflops": measured, "copy_gb_per_s": round(bandwidth, 1), "clock": options.clock, "rows": rows}
