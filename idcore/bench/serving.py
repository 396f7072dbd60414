"""Pictures per second of a server's queue: requests of different people at once, one by one against batches."""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
import torch

from ..demo import PHOTO
from ..identity import Identity
from ..serving import Batcher, DrawRequest, Ticket, TinyEngine
from .arguments import count, numbers

PEOPLE = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `python -m idcore.bench serving`."""
    parser.add_argument("--batch", type=numbers, default=(1, 2, 4, 8, 16), help="sizes of a batch")
    parser.add_argument("--requests", type=count, default=32, help="at once, each of another person, prompt and seed")
    parser.add_argument("--steps", type=count, default=4, help="denoising steps of a picture")
    parser.add_argument("--rounds", type=count, default=3, help="interleaved turns per size")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Rows with pictures per second and p50, p90 of the waiting in ms, medians over the rounds; `parity`: every picture
    is within 1/255 of the one that its request gives alone."""
    engine = TinyEngine()
    requests = _requests(engine, options.requests, options.steps)
    alone = [_pixels(engine.draw([r], lambda: False)[0]) for r in requests]
    taken: dict[int, list[tuple[float, list[float], bool]]] = {size: [] for size in options.batch}
    for _ in range(options.rounds):
        for size in options.batch:
            taken[size].append(_turn(engine, requests, alone, size))
    rows = []
    for size, turns in taken.items():
        delays = [d for _, ds, _ in turns for d in ds]
        rows.append(
            {
                "batch": size,
                "pictures_per_s": round(len(requests) / statistics.median(t for t, _, _ in turns), 2),
                "p50_ms": round(1e3 * float(np.quantile(delays, 0.5)), 1),
                "p90_ms": round(1e3 * float(np.quantile(delays, 0.9)), 1),
                "parity": all(same for _, _, same in turns),
            }
        )
    return {"base": "tiny", "requests": len(requests), "steps": options.steps, "rows": rows}


def _requests(engine: TinyEngine, count: int, steps: int) -> list[DrawRequest]:
    me = engine.encode([PHOTO])
    g = torch.Generator().manual_seed(0)
    # Drawn from one person's tokens: how much an identity costs does not depend on whose it is.
    people = [
        Identity(me.tokens + 0.1 * i * torch.randn(me.tokens.shape, generator=g), None, me.system)
        for i in range(PEOPLE)
    ]
    prompts = ("a photo of a person, blue background", "a pencil drawing of a person", "an oil painting of a person")
    return [
        DrawRequest(prompts[i % 3], people=(people[i % PEOPLE],), scales=(1.0,), seed=i, steps=steps)
        for i in range(count)
    ]


def _turn(
    engine: TinyEngine, requests: list[DrawRequest], alone: list[np.ndarray], size: int
) -> tuple[float, list[float], bool]:
    """Seconds for all, seconds from request to result of each, whether all are right."""
    batcher = Batcher(engine.draw, key=engine.key, max_batch=size, window=0.02, max_queue=len(requests))
    ended: dict[Ticket, float] = {}
    start = time.perf_counter()
    tickets = [batcher.submit(r) for r in requests]
    for ticket in tickets:
        ticket.add_done_callback(lambda t: ended.__setitem__(t, time.perf_counter()))
    made = [_pixels(t.result()) for t in tickets]
    batcher.close()
    same = all(np.abs(a - b).max() <= 1 for a, b in zip(made, alone))
    return max(ended.values()) - start, [ended[t] - start for t in tickets], same


def _pixels(pictures: Any) -> np.ndarray:
    return np.stack([np.asarray(p).astype(int) for p in pictures])
