"""Interleaved timing: A B A B ... in one process, so that a change of the machine's pace meets all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median, and the 10th and 90th percentile."""

    ms: float
    p10: float
    p90: float


def percentile(samples: Sequence[float], share: float) -> float:
    """The sample that stands nearest to `share` (0..1) of the way from the least to the largest one."""
    return sorted(samples)[round(share * (len(samples) - 1))]


def _summary(samples: list[float]) -> Timing:
    return Timing(statistics.median(samples), percentile(samples, 0.1), percentile(samples, 0.9))


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def interleaved(
    calls: Mapping[str, Callable[[], object]], *, rounds: int = 30, warmup: int = 3, device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:  # fmt: skip
    """Median time of each call over `rounds` turns.

    Args:
        calls: by name; called without arguments.
        rounds: turns; each runs every call once, in order.
        warmup: turns that are not counted (compilation, caches, workspaces).
        device: "cuda" waits for the device before and after each call.
        clock: seconds; wall time, or `time.process_time` for single-threaded calls on a machine that others use too.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + rounds):
        for name, call in calls.items():
            _wait(device)
            start = clock()
            call()
            _wait(device)
            if turn >= warmup:
                samples[name].append((clock() - start) * 1e3)
    return {name: _summary(s) for name, s in samples.items()}


def copy_bandwidth(megabytes: int = 128, rounds: int = 7, device: str = "cpu") -> float:
    """Bytes read plus written per second by a large copy, median, in GB/s."""
    source = torch.ones(megabytes << 18, device=device)
    target = torch.empty_like(source)
    t = interleaved({"copy": lambda: target.copy_(source)}, rounds=rounds, warmup=2, device=device)["copy"]
    return 2 * source.numel() * 4 / t.ms * 1e-6
