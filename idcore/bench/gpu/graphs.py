"""Times of GPU work inside captured graphs, where Python and launches cost nothing, with a cold or a warm L2 cache."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from ...testing.timing import percentile
from .place import place
from .steps import context_works

Call = Callable[[], object]


def copies_for_cold_cache(bytes_per_call: int) -> int:
    """So many sets of inputs used in turn that each has left the L2 cache before it comes again."""
    if place().dry:
        return 2
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(256, math.ceil(2.5 * cache / max(1, bytes_per_call))))


class Plain:
    """Stands for a graph where there is no GPU."""

    def __init__(self, calls: Sequence[Call]):
        self.calls = calls

    def replay(self) -> None:
        for call in self.calls:
            call()


def captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph | Plain:
    """The calls one after another in a graph; each runs once before, for compilation and workspaces."""
    if place().dry:
        return Plain(calls)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for call in calls:  # all: another shape may take a kernel that is not loaded yet
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def event_ms(run: Call) -> float:
    """Milliseconds of the work that `run` enqueues, between two events."""
    if place().dry:
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def microseconds(groups: Mapping[str, Sequence[Call]], rounds: int = 15) -> dict[str, dict[str, float]]:
    """Per group: microseconds of one call, median and 10th and 90th percentile; the groups' graphs take turns.

    A group that cannot be captured is left out, and said to be: one rival's fault leaves the others their times.
    """
    graphs = {}
    for name, calls in groups.items():
        try:
            graphs[name] = captured(calls)
        except Exception as e:
            if not context_works():
                raise
            print(f"not captured: {name}: {type(e).__name__}: {str(e)[:500]}", file=sys.stderr, flush=True)
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(rounds + 2):
        for name, graph in graphs.items():
            ms = event_ms(graph.replay)
            if turn >= 2:
                samples[name].append(ms * 1e3 / len(groups[name]))
    return {name: _summary(found) for name, found in samples.items()}


def launched_microseconds(calls: Mapping[str, Call], rounds: int = 30, batch: int = 10) -> dict[str, float]:
    """Microseconds of one call when Python launches it, as without a graph: medians of `batch` calls in a row."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 3):
        for name, call in calls.items():
            with torch.no_grad():
                ms = event_ms(lambda c=call: [c() for _ in range(batch)])
            if turn >= 3:
                samples[name].append(ms * 1e3 / batch)
    return {name: round(statistics.median(found), 2) for name, found in samples.items()}


def _summary(found: list[float]) -> dict[str, float]:
    return {
        "us": round(statistics.median(found), 2),
        "p10": round(percentile(found, 0.1), 2),
        "p90": round(percentile(found, 0.9), 2),
    }


def launches(call: Call) -> int | None:
    """Kernels that one call runs on the GPU, by the profiler; None where it records none."""
    if place().dry:
        return None
    with torch.no_grad():
        call()
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            call()
            torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA and "mem" not in e.name]
    return len(kernels) or None
