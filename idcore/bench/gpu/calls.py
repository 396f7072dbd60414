"""Runs some calls once, in a process of its own: what compute-sanitizer watches, and what fills Triton's cache.

    python -m idcore.bench.gpu.calls sanitized triton 3/12 [bwd]

runs every 12th call of a list, from the fourth on, forward on a backend (and backward).
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
from .place import few, place

LISTS = {
    "sanitized": shapes.SANITIZED, "races": shapes.RACES, "races_trained": shapes.TRAINED, "timed": shapes.TIMED,
    "ops": shapes.OPS,
}  # fmt: skip


def part(items: Sequence, share: str) -> list:
    """The i-th of n parts, "i/n", i from 0."""
    index, count = map(int, share.split("/"))
    return list(items)[index::count]


def once(case, backend: str, backward: bool, device: str = "cuda") -> torch.Tensor:
    """Forward of one call, and its gradients."""
    given = case.inputs(device=device)
    if not backward:
        with torch.no_grad():
            return case.run(given, backend)
    given, leaves = recorded(given, case.gradients)
    out = case.run(given, backend)
    torch.autograd.grad(out, list(leaves.values()), cotangent(out, 0), allow_unused=True)
    return out.detach()


def _started(name: str, backward: bool, workers: int) -> list[subprocess.Popen]:
    workers = min(workers, len(LISTS[name]))
    head = [sys.executable, "-W", "ignore", "-m", "idcore.bench.gpu.calls", name, place().trains]
    tail = ["bwd"] if backward else []
    return [subprocess.Popen([*head, f"{i}/{workers}", *tail], stdout=subprocess.DEVNULL) for i in range(workers)]


def warm(*lists: tuple[str, bool], workers: int | None = None, seconds: float = 40) -> int:
    """Fills Triton's cache for lists of calls, on many processes at a time. Returns how many of them failed.

    Args:
        lists: names in `LISTS`, each with whether its calls run backward too.
    """
    workers = workers or max(1, min(12, (os.cpu_count() or 2) - 2))
    running = [process for name, backward in lists for process in _started(name, backward, workers)]
    failed, end = 0, time.monotonic() + seconds
    for process in running:
        try:
            failed += process.wait(timeout=max(0.1, end - time.monotonic())) != 0
        except subprocess.TimeoutExpired:
            process.kill()
            failed += 1
    return failed


def main(arguments: Sequence[str]) -> int:
    """Exit status 1 where a call fails or its result is not finite; the others run all the same."""
    name, backend, share, *rest = arguments
    build.use_checkout()
    ok = True
    for case in part(few(LISTS[name]), share):
        try:
            for backward in (False, True)[: 1 + ("bwd" in rest)]:
                out = once(case, backend, backward, place().device)
                ok &= bool(torch.isfinite(out.cpu()).all())
        except Exception as e:
            print(f"{case.op} {case.name} {backend}: {type(e).__name__}: {str(e)[-1500:]}", file=sys.stderr, flush=True)
            ok = False
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
