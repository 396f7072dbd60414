"""Which records a step draws: a function of (records, seed, step, size of the global batch) and of nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np


def shuffled(count: int, *key: int) -> np.ndarray:
    """0..count-1 in an order that hangs on the key; the same in every version of numpy (its raw bits are fixed)."""
    bits = np.random.Philox(np.random.SeedSequence([int(k) for k in key])).random_raw(count)
    return np.argsort(bits, kind="stable")


class Order:
    """Global batches of one bucket each, from epochs that draw every record once.

    A bucket's epochs are written one behind the other and cut into batches, so that nothing is left over: what does
    not fill a batch begins the next epoch's first. A bucket smaller than a batch waits until epochs have filled one.
    Within an epoch the batches of all buckets are mixed.

    Args:
        buckets: the records' numbers, bucket by bucket.
        seed: of the run. batch: samples of a global batch.
    """

    def __init__(self, buckets: Sequence[np.ndarray], seed: int, batch: int) -> None:
        self.buckets, self.seed, self.batch = [np.asarray(b) for b in buckets], seed, batch
        self._epoch = lru_cache(maxsize=2)(self._mixed)
        self._drawn = lru_cache(maxsize=2 * len(self.buckets) + 2)(self._permuted)

    def _before(self, epoch: int) -> int:
        """Batches in the epochs before this one."""
        return sum(epoch * len(b) // self.batch for b in self.buckets)

    def _mixed(self, epoch: int) -> list[tuple[int, int]]:
        """(bucket, number of the batch within the bucket) in the order of this epoch."""
        found = []
        for i, b in enumerate(self.buckets):
            found += [(i, j) for j in range(epoch * len(b) // self.batch, (epoch + 1) * len(b) // self.batch)]
        return [found[k] for k in shuffled(len(found), self.seed, epoch, 0)]

    def _permuted(self, bucket: int, epoch: int) -> np.ndarray:
        return self.buckets[bucket][shuffled(len(self.buckets[bucket]), self.seed, epoch, bucket + 1)]

    def epoch_of(self, step: int) -> int:
        """The epoch that a step is in."""
        low, high = 0, 1
        while self._before(high) <= step:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._before(middle) <= step else (low, middle)
        return low

    def at(self, step: int) -> np.ndarray:
        """The records of one step's global batch, [batch]."""
        epoch = self.epoch_of(step)
        bucket, number = self._epoch(epoch)[step - self._before(epoch)]
        size, places = len(self.buckets[bucket]), np.arange(number * self.batch, (number + 1) * self.batch)
        return np.array([self._drawn(bucket, int(p // size))[p % size] for p in places])
