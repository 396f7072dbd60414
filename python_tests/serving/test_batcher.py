"""The queue: what runs together, in which order, what is refused, what happens to those who leave."""

import threading
import time

import pytest

from idcore.errors import InputError
from idcore.serving import Batcher, Closed, QueueFull, Stopped


class Runner:
    """Doubles numbers; `hold()` keeps it busy until `go()`."""

    def __init__(self):
        self.batches, self.free, self.entered = [], threading.Event(), threading.Event()
        self.free.set()

    def hold(self):
        self.free.clear()
        self.entered.clear()

    def __call__(self, requests, stop):
        self.batches.append(requests)
        self.entered.set()
        while not self.free.wait(0.005):
            if stop():
                raise Stopped
        if "bad" in requests:
            raise ValueError("bad request")
        return [r * 2 for r in requests]


@pytest.fixture
def runner():
    return Runner()


@pytest.fixture
def make(runner):
    made = []

    def go(**how):
        made.append(Batcher(runner, **({"window": 0.0} | how)))
        return made[-1]

    yield go
    runner.free.set()
    for batcher in made:
        assert batcher.close(60)


def busy(batcher, runner, request=0):
    """The batcher works on `request` until the runner is let go."""
    runner.hold()
    ticket = batcher.submit(request)
    assert runner.entered.wait(60)
    return ticket


def test_what_waits_runs_together_by_key_and_in_order(runner, make):
    batcher = make(key=lambda r: r % 2, max_batch=3)
    first = busy(batcher, runner)
    tickets = [batcher.submit(r) for r in (1, 2, 3, 4, 5, 7, 6)]
    runner.free.set()
    assert first.result(60) == 0 and [t.result(60) for t in tickets] == [2, 4, 6, 8, 10, 14, 12]
    assert runner.batches == [[0], [1, 3, 5], [2, 4, 6], [7]]
    assert [t.batch_size for t in tickets] == [3, 3, 3, 3, 3, 1, 3] and all(t.took >= 0 for t in tickets)
    stats = batcher.stats()
    assert (stats["requests"], stats["batches"], stats["weight"], stats["waiting"]) == (8, 4, 8, 0)


def test_the_window_waits_for_company_and_no_longer(runner, make):
    batcher = make(window=1.0, max_batch=2)
    start = time.monotonic()
    alone = batcher.submit(1)
    assert alone.result(60) == 2 and 0.95 <= time.monotonic() - start
    start = time.monotonic()
    tickets = [batcher.submit(r) for r in (1, 2)]
    assert [t.result(60) for t in tickets] == [2, 4] and time.monotonic() - start < 0.95
    assert runner.batches == [[1], [1, 2]]


def test_weights_fill_a_batch(runner, make):
    batcher = make(weight=lambda r: r, max_batch=4)
    busy(batcher, runner, 1)
    tickets = [batcher.submit(r) for r in (3, 2, 1)]
    runner.free.set()
    assert [t.result(60) for t in tickets] == [6, 4, 2] and runner.batches == [[1], [3], [2, 1]]
    for weight in (0, 5):
        with pytest.raises(InputError, match=f"may ask for 1 to 4 pictures, got {weight}; split it"):
            batcher.submit(weight)


def test_the_queue_is_bounded_and_says_when_to_come_back(runner, make):
    batcher = make(max_queue=2)
    busy(batcher, runner)
    tickets = [batcher.submit(r) for r in (1, 2)]
    with pytest.raises(QueueFull, match="2 requests are waiting already; try again in 1 s") as refused:
        batcher.submit(3)
    assert refused.value.retry_after >= 1 and batcher.stats()["refused"] == 1
    runner.free.set()
    assert [t.result(60) for t in tickets] == [2, 4]


def test_who_leaves_the_queue_makes_room_and_is_not_run(runner, make):
    batcher = make(max_queue=1)
    busy(batcher, runner)
    gone = batcher.submit(1)
    batcher.abandon(gone)
    stays = batcher.submit(2)
    runner.free.set()
    assert stays.result(60) == 4 and gone.cancelled() and runner.batches == [[0], [2]]
    batcher.abandon(stays)
    assert batcher.stats()["abandoned"] == 1


def test_a_batch_that_nobody_wants_any_more_stops(runner, make):
    batcher = make(max_batch=2)
    busy(batcher, runner)
    pair = [batcher.submit(r) for r in (1, 2)]
    runner.free.set()
    pair[0].result(60)
    runner.batches.clear()
    alone = busy(batcher, runner, 5)
    batcher.abandon(alone)
    with pytest.raises(Stopped):
        alone.result(60)
    runner.free.set()
    assert batcher.submit(4).result(60) == 8 and batcher.stats()["failed"] == 0


def test_a_batch_goes_on_for_those_who_stay(runner, make):
    batcher = make(max_batch=2)
    busy(batcher, runner)
    gone, stays = batcher.submit(1), batcher.submit(2)
    runner.entered.clear()
    runner.free.set()
    assert runner.entered.wait(60)
    batcher.abandon(gone)
    assert stays.result(60) == 4


def test_a_request_bears_its_own_error_alone(runner, make):
    batcher = make(max_batch=3)
    busy(batcher, runner)
    tickets = [batcher.submit(r) for r in (1, "bad", 3)]
    runner.free.set()
    assert tickets[0].result(60) == 2 and tickets[2].result(60) == 6
    with pytest.raises(ValueError, match="bad request"):
        tickets[1].result(60)
    stats = batcher.stats()
    assert stats["split"] == 1 and stats["failed"] == 1
    assert batcher.submit(9).result(60) == 18


def test_a_wrong_number_of_results_is_an_error():
    batcher = Batcher(lambda requests, stop: [], window=0)
    with pytest.raises(RuntimeError, match="run gave 0 results for 1 requests"):
        batcher.submit(1).result(60)
    assert batcher.close(60)


def test_closing_finishes_what_was_taken_and_refuses_more(runner):
    batcher = Batcher(runner, window=30, max_batch=2)
    runner.hold()
    tickets = [batcher.submit(r) for r in (1, 2, 3)]
    assert runner.entered.wait(60)
    closing = threading.Thread(target=batcher.close, args=(60,))
    closing.start()
    while not batcher._closing:
        time.sleep(0.001)
    with pytest.raises(Closed, match="shutting down"):
        batcher.submit(4)
    runner.free.set()
    closing.join(60)
    assert [t.result(0) for t in tickets] == [2, 4, 6]


def test_closing_in_a_hurry_cancels_the_rest(runner):
    batcher = Batcher(runner, window=0)
    running = busy(batcher, runner)
    waiting = batcher.submit(1)
    assert not batcher.close(0.05)
    with pytest.raises(Stopped):
        running.result(60)
    assert waiting.cancelled()


@pytest.mark.parametrize("how", [{"max_batch": 0}, {"max_queue": 0}, {"window": -1.0}, {"window": float("inf")}])
def test_wrong_limits(runner, how):
    with pytest.raises(InputError, match="wanted max_batch and max_queue from 1 and a window from 0 s"):
        Batcher(runner, **how)
