"""Dynamic batching: requests that fit together wait a moment for each other and run in one pass, in one thread."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Any

from ..errors import IdcoreError, InputError

Run = Callable[[list[Any], Callable[[], bool]], Sequence[Any]]


class QueueFull(IdcoreError):
    """No room to wait; `retry_after` says in how many seconds there may be some."""

    def __init__(self, limit: int, retry_after: float) -> None:
        self.retry_after = retry_after
        super().__init__(f"{limit} requests are waiting already; try again in {retry_after:.0f} s")


class Closed(IdcoreError):
    """The batcher takes no more requests."""


class Stopped(Exception):
    """Raised by `run` where nobody waits for any of its results any more."""


class Ticket(Future):
    """The result of one request, to come.

    Attributes:
        request: as submitted.
        batch_size: requests of the batch that it ran in; 0 before.
        waited, took: seconds in the queue, and of the batch; 0 before.
    """

    def __init__(self, request: Any, key: Hashable, weight: int) -> None:
        super().__init__()
        self.request, self.key, self.weight = request, key, weight
        self.arrived = time.monotonic()
        self.abandoned = False
        self.batch_size = 0
        self.waited = self.took = 0.0


class Batcher:
    """Runs requests in batches of equal `key`, the longest waiting first.

    A batch starts when it is full, or `window` seconds after its first request arrived. Where a batch of several fails,
    its requests run once more one by one, so that each fails by itself (`stats()["split"]` counts that).

    Args:
        run: `run(requests, stop) -> results`, one per request, in the batcher's own thread. It should ask `stop()` from
            time to time, and raise `Stopped` when it says True: everybody who asked has gone.
        key: what must be equal in a batch.
        weight: how much of a batch a request takes, e.g. pictures.
        max_batch: total weight of a batch.
        window: seconds; 0 batches only what waits already.
        max_queue: requests that may wait.

    Raises:
        InputError: limits below 1, or a negative window.
    """

    def __init__(
        self,
        run: Run,
        *,
        key: Callable[[Any], Hashable] = lambda request: None,
        weight: Callable[[Any], int] = lambda request: 1,
        max_batch: int = 8,
        window: float = 0.02,
        max_queue: int = 64,
    ) -> None:
        if max_batch < 1 or max_queue < 1 or not 0 <= window < math.inf:
            raise InputError(
                f"Batcher: wanted max_batch and max_queue from 1 and a window from 0 s, got {max_batch}, {max_queue} "
                f"and {window}"
            )
        self.max_batch, self.window, self.max_queue = max_batch, window, max_queue
        self._run, self._key, self._weight = run, key, weight
        self._queue: deque[Ticket] = deque()
        self._running: list[Ticket] = []
        self._cond = threading.Condition()
        self._closing = False
        self._counts = dict.fromkeys(("requests", "refused", "abandoned", "failed", "batches", "weight", "split"), 0)
        self._busy = 0.0
        self._thread = threading.Thread(target=self._serve, name="idcore-batcher", daemon=True)
        self._thread.start()

    # -- from any thread ----------------------------------------------------------------------------------------------

    def submit(self, request: Any) -> Ticket:
        """Queue a request.

        Raises:
            QueueFull: as many as may wait are waiting.
            Closed: after `close`.
            InputError: it weighs more than a batch holds.
        """
        weight = self._weight(request)
        if not 1 <= weight <= self.max_batch:
            raise InputError(f"a request may ask for 1 to {self.max_batch} pictures, got {weight}; split it")
        ticket = Ticket(request, self._key(request), weight)
        with self._cond:
            if self._closing:
                raise Closed("shutting down; no new requests are taken")
            if len(self._queue) >= self.max_queue:
                self._counts["refused"] += 1
                raise QueueFull(self.max_queue, self._until_room())
            self._counts["requests"] += 1
            self._queue.append(ticket)
            self._cond.notify_all()
        return ticket

    def abandon(self, ticket: Ticket) -> None:
        """Nobody wants the result any more: it leaves the queue, or its batch stops if all of it is abandoned."""
        with self._cond:
            if ticket.done() or ticket.abandoned:
                return
            ticket.abandoned = True
            self._counts["abandoned"] += 1
            if ticket in self._queue:
                self._queue.remove(ticket)
                ticket.cancel()

    def close(self, timeout: float | None = None) -> bool:
        """Take nothing new, finish what was taken, end the thread. After `timeout` seconds the rest is cancelled.

        Returns:
            Whether everything was finished in time.
        """
        with self._cond:
            self._closing = True
            self._cond.notify_all()
        self._thread.join(timeout)
        in_time = not self._thread.is_alive()
        for ticket in () if in_time else (*self._queue, *self._running):
            self.abandon(ticket)
        return in_time

    def stats(self) -> dict[str, float]:
        """Counters since the start (requests, refused, abandoned, failed, batches, weight, split), seconds in `run`
        (busy), and requests that wait and run now."""
        with self._cond:
            now = {"busy": self._busy, "waiting": len(self._queue), "running": len(self._running)}
            return self._counts | now

    # -- in the batcher's thread --------------------------------------------------------------------------------------

    def _serve(self) -> None:
        while batch := self._next():
            self._run_batch(batch)

    def _next(self) -> list[Ticket]:
        """The next batch, once it may start; empty: the end."""
        with self._cond:
            self._running = []
            while True:
                if not self._queue:
                    if self._closing:
                        return []
                    self._cond.wait()
                    continue
                batch, full = self._together()
                left = batch[0].arrived + self.window - time.monotonic()
                if full or left <= 0 or self._closing:
                    break
                self._cond.wait(left)
            for ticket in batch:
                self._queue.remove(ticket)
                ticket.set_running_or_notify_cancel()
            self._running = batch
        return batch

    def _together(self) -> tuple[list[Ticket], bool]:
        """The requests that may run with the first of the queue, and whether no more fit."""
        batch: list[Ticket] = []
        room = self.max_batch
        for ticket in self._queue:
            if ticket.key != self._queue[0].key:
                continue
            if ticket.weight > room:
                return batch, True
            batch.append(ticket)
            room -= ticket.weight
        return batch, room == 0

    def _run_batch(self, batch: list[Ticket]) -> None:
        start = time.monotonic()
        try:
            results = list(self._run([t.request for t in batch], lambda: all(t.abandoned for t in batch)))
            if len(results) != len(batch):
                raise RuntimeError(f"run gave {len(results)} results for {len(batch)} requests")
        except Exception as e:
            self._count(batch, start, failed=len(batch) == 1 and not isinstance(e, Stopped))
            self._failed(batch, e)
            return
        self._count(batch, start)
        for ticket, result in zip(batch, results):
            ticket.batch_size, ticket.waited, ticket.took = len(batch), start - ticket.arrived, self._latest
            ticket.set_result(result)

    def _failed(self, batch: list[Ticket], error: Exception) -> None:
        if isinstance(error, Stopped) or len(batch) == 1:
            for ticket in batch:
                ticket.set_exception(error)
            return
        with self._cond:
            self._counts["split"] += 1
        for ticket in batch:
            if ticket.abandoned:
                ticket.set_exception(Stopped())
            else:
                self._run_batch([ticket])

    def _count(self, batch: list[Ticket], start: float, failed: bool = False) -> None:
        self._latest = time.monotonic() - start
        with self._cond:
            self._busy += self._latest
            self._counts["batches"] += 1
            self._counts["weight"] += sum(t.weight for t in batch)
            self._counts["failed"] += failed

    def _until_room(self) -> float:
        """Seconds until a batch of those that wait may be done, at least 1; by the mean of what ran so far."""
        done = self._counts["batches"]
        return max(1.0, math.ceil(self._busy / done)) if done else 1.0
