"""Where the parts run: on the GPU; with --dry on the CPU, a few small calls that show that every part's flow holds."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

DRY = "IDCORE_BENCH_DRY"  # set by --dry, so that processes of the parts know
DRY_TIMES = 10  # as much time for --dry: its machine may be a small one that others use too
LOST = 70  # exit status of a process whose CUDA context no longer works; none of pytest's own

Save = Callable[[dict[str, Any]], None]  # what a part has found so far


class Place(NamedTuple):
    """device; backends that are looked at, and the one of them that has gradients; dry: nothing of it is a figure."""

    device: str
    backends: tuple[str, ...]
    trains: str
    dry: bool


def place() -> Place:
    """Of this process."""
    if os.environ.get(DRY) == "1":
        return Place("cpu", ("cpu",), "cpu", True)
    return Place("cuda", ("cuda", "triton"), "triton", False)


def few(cases: Sequence[Any], most: int = 2) -> tuple[Any, ...]:
    """All cases; dry the first ones, small."""
    if not place().dry:
        return tuple(cases)
    return tuple(c.with_(lq=33, batch=1, **_single(c)) if hasattr(c, "lq") else c for c in cases[:most])


def _single(case: Any) -> dict[str, int]:
    return {name: 1 for name in ("text_batch", "id_batch", "ref_batch") if hasattr(case, name)}


def nothing_saved(_: dict[str, Any]) -> None:
    """For a part that is run by itself."""
