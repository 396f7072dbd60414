"""The batches of a run's steps, the next step's read while this one computes."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from ..errors import InputError
from .config import LoopConfig
from .contract import Batch, Source


class Batches:
    """This process's micro batches, step by step.

    Args:
        source: the data.
        config: `batch`, `accumulate`, `seed`, `steps`, and whether to read ahead (`prefetch`).
        rank, world: this process among all.
    """

    def __init__(self, source: Source, config: LoopConfig, rank: int, world: int) -> None:
        self.source, self.config, self.rank, self.world = source, config, rank, world
        self._reader = ThreadPoolExecutor(1) if config.prefetch else None
        self._next: tuple[int, Future] | None = None

    def of(self, step: int) -> list[Batch]:
        """The micro batches of a step, from 0. Raises InputError where the data gives others than asked for."""
        got = self._next[1].result() if self._next and self._next[0] == step else self._read(step)
        self._next = None
        if self._reader and step + 1 < self.config.steps:
            self._next = (step + 1, self._reader.submit(self._read, step + 1))
        return got

    def close(self) -> None:
        """End the reading thread."""
        if self._reader:
            self._reader.shutdown(wait=True, cancel_futures=True)

    def _read(self, step: int) -> list[Batch]:
        c = self.config
        got = list(self.source.micro_batches(step, c.seed, self.rank, self.world, c.batch, c.accumulate))
        sizes = [len(b) for b in got]
        if sizes != [c.batch] * c.accumulate:
            raise InputError(
                f"the data gave micro batches of {sizes} samples at step {step}; wanted {c.accumulate} of {c.batch}"
            )
        return got
