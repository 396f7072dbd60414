"""Which places of the global batch a process draws at a step, and reading its samples in threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ...errors import InputError

T = TypeVar("T")


def places_of(step: int, rank: int, world: int, size: int, count: int) -> list[list[int]]:
    """Places in the global batch of each of a process's `count` micro batches of `size`; see `contract.Source`.

    Raises:
        InputError: numbers out of range.
    """
    if min(world, size, count) < 1 or not 0 <= rank < world or step < 0:
        raise InputError(
            f"data: wanted world, size, count of 1 or more and a rank below world, got world {world}, size {size}, "
            f"count {count}, rank {rank}, step {step}"
        )
    return [[(m * world + rank) * size + i for i in range(size)] for m in range(count)]


def in_threads(
    pool: ThreadPoolExecutor, read: Callable[[int], T], parts: Sequence[Sequence[int]]
) -> Iterator[tuple[Sequence[int], list[T]]]:
    """The places of each part with what `read` gives for them; all begin at once, and end with the iterator."""
    jobs = [[pool.submit(read, place) for place in places] for places in parts]
    try:
        for places, futures in zip(parts, jobs):
            yield places, [f.result() for f in futures]
    finally:
        for f in (f for futures in jobs for f in futures):
            f.cancel()
