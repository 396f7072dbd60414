"""60 calls, each 250 times into poisoned memory beside other work on the GPU: every time the same bits."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from ...ops import id_attention
from ...testing.cases import Case
from ...testing.parity import cotangent, poisoned, recorded
from . import calls, shapes
from .place import Save, few, nothing_saved, place
from .steps import Steps

REPEATS, BACKWARD_REPEATS = 250, 50


def _bits(t: Tensor) -> Tensor:
    return t.contiguous().view({2: torch.int16, 4: torch.int32}[t.element_size()])


def _noise(device: str) -> Callable[[int], None]:
    """Work of changing length on another stream, so that blocks of the repeats meet another schedule each time."""
    if device == "cpu":
        return lambda turn: None
    stream, a = torch.cuda.Stream(), torch.randn(2048, 2048, device=device, dtype=torch.bfloat16)

    def disturb(turn: int) -> None:
        if turn % 3:
            size = 256 << (turn % 4)
            with torch.cuda.stream(stream):
                torch.mm(a[:size], a)

    return disturb


def forward_differences(case: Case, backend: str, repeats: int = REPEATS, device: str = "cuda") -> int:
    """How many of the repeats gave other bits than the first run."""
    given = case.inputs(device=device)
    out = poisoned(given["q"])
    first = _bits(id_attention(**given, backend=backend, out=out)).clone()
    wrong, disturb = torch.zeros((), dtype=torch.int64, device=device), _noise(device)
    for turn in range(repeats):
        disturb(turn)
        out.fill_(float("nan"))
        wrong += (_bits(id_attention(**given, backend=backend, out=out)) != first).any()
    return int(wrong)


def backward_differences(case: Case, backend: str, repeats: int = BACKWARD_REPEATS, device: str = "cuda") -> int:
    """As `forward_differences`, for all gradients."""
    given, leaves = recorded(case.inputs(device=device), case.gradients)
    out = case.run(given, backend)
    g, wanted = cotangent(out, 0), list(leaves.values())
    first, disturb = None, _noise(device)
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    for turn in range(repeats + 1):
        disturb(turn)
        bits = [_bits(t) for t in torch.autograd.grad(out, wanted, g, retain_graph=True)]
        if first is None:
            first = bits
        wrong += torch.stack([(x != y).any() for x, y in zip(bits, first, strict=True)]).any()
    return int(wrong)


def run(
    save: Save = nothing_saved, seconds: float = 85, cases: Sequence[Case] = shapes.RACES, past: Collection[str] = ()
) -> dict[str, Any]:
    """Differences by backend and call, or what went wrong; empty where all repeats agree. Calls that there was no time
    for are not_run."""
    end, at = time.monotonic() + seconds, place()
    different: dict[str, dict[str, int | str]] = {}
    report: dict[str, Any] = {"calls": len(cases), "repeats": REPEATS, "different": different, "not_run": 0}
    steps = Steps(save, report, past)
    if steps.begin("warming", seconds):
        report["warming_failed"] = calls.warm(("races", False), ("races_trained", True), seconds=0.55 * seconds)

    def every(name: str, some: Sequence[Case], count: Callable[[Case], int]) -> None:
        different[name] = {}
        for case in some:
            if time.monotonic() > end:
                report["not_run"] += f"{name} {case.name}" not in steps.past
            elif steps.begin(f"{name} {case.name}"):
                tell = functools.partial(different[name].__setitem__, case.name)
                found = steps.guarded(functools.partial(count, case), tell)
                if found:
                    tell(found)

    repeats = (REPEATS, BACKWARD_REPEATS) if not at.dry else (5, 3)
    for backend in at.backends:
        with torch.no_grad():
            every(backend, few(cases), lambda c, b=backend: forward_differences(c, b, repeats[0], at.device))
    trained = few(shapes.TRAINED)
    every(f"{at.trains} backward", trained, lambda c: backward_differences(c, at.trains, repeats[1], at.device))
    steps.end()
    report["ok"] = not any(different.values()) and not report["not_run"]
    return report
