"""Runs some calls once, in a process of its own: what compute-sanitizer watches, and what fills Triton's cache.

    python -m idcore.bench.gpu.calls sanitized triton 3/12 [bwd]

runs every 12th call of a list, from the third on, forward on a backend (and backward).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence

import torch

from ...testing.parity import cotangent, recorded
from . import build, shapes

LISTS = {"sanitized": shapes.SANITIZED, "races": shapes.RACES, "timed": shapes.TIMED}


def part(items: Sequence, share: str) -> list:
    """The i-th of n parts, "i/n", i from 0."""
    index, count = map(int, share.split("/"))
    return list(items)[index::count]


def once(case, backend: str, backward: bool, device: str = "cuda") -> torch.Tensor:
    """Forward of one call, and its gradients."""
    given = case.inputs(device=device)
    if not backward:
        return case.run(given, backend)
    given, leaves = recorded(given, case.gradients)
    out = case.run(given, backend)
    torch.autograd.grad(out, list(leaves.values()), cotangent(out, 0), allow_unused=True)
    return out.detach()


def warm(name: str, backend: str, *, backward: bool = False, workers: int | None = None, seconds: float = 40) -> int:
    """Fills Triton's cache for a list of calls, on many processes at a time. Returns how many of them failed."""
    workers = workers or max(1, min(12, (os.cpu_count() or 2) - 2))
    head = [sys.executable, "-W", "ignore", "-m", "idcore.bench.gpu.calls", name, backend]
    tail = ["bwd"] if backward else []
    running = [subprocess.Popen([*head, f"{i}/{workers}", *tail], stdout=subprocess.DEVNULL) for i in range(workers)]
    failed, end = 0, time.monotonic() + seconds
    for process in running:
        try:
            failed += process.wait(timeout=max(0.1, end - time.monotonic())) != 0
        except subprocess.TimeoutExpired:
            process.kill()
            failed += 1
    return failed


def main(arguments: Sequence[str]) -> int:
    """Exit status 1 where a result is not finite."""
    name, backend, share, *rest = arguments
    build.use_checkout()
    ok = True
    for case in part(LISTS[name], share):
        out = once(case, backend, "bwd" in rest)
        torch.cuda.synchronize()
        ok &= bool(torch.isfinite(out.cpu()).all())
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
