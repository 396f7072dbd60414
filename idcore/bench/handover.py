"""What changing between PyTorch's OpenMP loops and ours costs: calls in turn against the sum of both alone."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..ops import id_attention
from ..testing.cases import Case

# Text only: the shortest calls of ours between two of PyTorch's. The last has fewer pieces of work than a large
# machine has threads.
CASES = (
    Case("sdxl-256x1280", "SDXL at 512 px", heads=20, lq=256, merge="none"),
    Case("sdxl-1024x640", "SDXL at 512 px", heads=10, lq=1024, merge="none"),
    Case("two-heads", "small", heads=2, lq=64, merge="none"),
)


def runtimes() -> list[str]:
    """Files of the OpenMP runtimes in this process. More than one: each has threads of its own, which disturb another.

    Empty where the system does not say.
    """
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    files = {line.split()[-1] for line in maps.read_text().splitlines() if "/" in line}
    return sorted(f for f in files if any(n in Path(f).name for n in ("libgomp", "libiomp", "libomp")))


def threads() -> set[str]:
    """Threads of this process by id; empty where the system does not say."""
    return set(os.listdir("/proc/self/task")) if Path("/proc/self/task").exists() else set()


def replaced(ours: Callable[[], object], theirs: Callable[[], object], turns: int = 20) -> int:
    """Threads that are gone after `turns` of ours, theirs."""
    theirs()
    before, lost = threads(), 0
    for _ in range(turns):
        ours()
        theirs()
        now = threads()
        lost += len(before - now)
        before = now
    return lost


def _seconds(calls: list[Callable[[], object]], turns: int) -> float:
    start = time.perf_counter()
    for _ in range(turns):
        for call in calls:
            call()
    return (time.perf_counter() - start) / turns


def _row(case: Case, name: str, theirs: Callable[[], object], rounds: int, turns: int) -> dict[str, Any]:
    given = case.inputs()

    def ours() -> object:
        return id_attention(**given, backend="cpu")

    samples: dict[str, list[float]] = {"ours": [], "theirs": [], "in_turn": []}
    for _ in range(rounds + 1):
        samples["ours"].append(_seconds([ours], turns))
        samples["theirs"].append(_seconds([theirs], turns))
        samples["in_turn"].append(_seconds([ours, theirs], turns))
    # Of each round, so that a change of the machine's pace meets all three.
    cost = [t - a - b for a, b, t in zip(*(s[1:] for s in samples.values()), strict=True)]
    us = {n: round(1e6 * statistics.median(s[1:]), 1) for n, s in samples.items()}
    return {
        "case": case.name, "with": name, "threads": torch.get_num_threads(), "us": us,
        "handover_us": round(1e6 * statistics.median(cost), 1), "threads_replaced": replaced(ours, theirs),
    }  # fmt: skip


def run(rounds: int, turns: int = 100) -> dict[str, Any]:
    """A row per case and PyTorch call: an addition (its own loops) and a product (its BLAS)."""
    x, w = torch.randn(256, 1280), torch.randn(1280, 1280)
    others = {"add": lambda: x + 1.0, "matmul": lambda: x @ w}
    rows = [_row(case, name, call, rounds, turns) for case in CASES for name, call in others.items()]
    return {"runtimes": [Path(f).name for f in runtimes()], "rows": rows}
