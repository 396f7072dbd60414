"""Times one pass of a whole UNet with and without identity, and the cross-attention layers' own part of it."""

from __future__ import annotations

import argparse
import copy
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..attach import attach
from ..attention.sites import attention_of, find_sites
from ..attention.types import AttentionOptions, Site
from ..identity import Identity
from ..testing.cases import DTYPES
from .arguments import count, numbers
from .launches import count_launches
from .rivals import EagerIdProcessor, TextOnlyProcessor
from .unets import BASES, base_model

VARIANTS = ("stock", "own_text_only", "id", "id_eager")
WIDTH = 2048  # of an identity token, as in PuLID


class RandomSystem:
    """Random projections of identity tokens for every cross-attention layer, float32 as published adapters are."""

    name = "bench"
    options = AttentionOptions("ortho_v2", num_zero=8)

    def __init__(self, unet: nn.Module, device: str) -> None:
        g = torch.Generator(device).manual_seed(1)
        self.weights: dict[str, tuple[Tensor, Tensor]] = {}
        for site in find_sites(unet):
            shape = (site.hidden, WIDTH)
            pair = [torch.empty(shape, device=device).uniform_(-1, 1, generator=g) * WIDTH**-0.5 for _ in range(2)]
            self.weights[site.name] = (pair[0], pair[1])

    def sites(self, unet: nn.Module) -> list[Site]:
        """All cross-attention layers."""
        return find_sites(unet)

    def project(self, site: Site, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[Bi, Li, E] -> keys and values [Bi, Li, C]"""
        k, v = self.weights[site.name]
        return tokens @ k.T, tokens @ v.T


class Clock:
    """Seconds spent in each cross-attention layer of the last pass, projections included."""

    def __init__(self, unet: nn.Module, device: str) -> None:
        self.seconds: list[float] = []
        self._start, self._device = 0.0, device
        for site in find_sites(unet):
            layer = attention_of(unet, site)
            layer.register_forward_pre_hook(self._enter)
            layer.register_forward_hook(self._leave)

    def _now(self) -> float:
        if self._device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _enter(self, *_: Any) -> None:
        self._start = self._now()

    def _leave(self, *_: Any) -> None:
        self.seconds.append(self._now() - self._start)

    def one_pass(self, forward: Callable[[], object]) -> list[float]:
        """Seconds of the pass, and behind it of each cross-attention layer in the order of the pass."""
        self.seconds = []
        start = self._now()
        forward()
        return [self._now() - start, *self.seconds]


def variants(unet: nn.Module, system: RandomSystem, person: Identity) -> dict[str, nn.Module]:
    """One UNet for each of VARIANTS, all on the same weights, so that each keeps what it may keep from step to step."""
    weights = {id(t): t for t in (*unet.parameters(), *unet.buffers())}
    unets = {v: copy.deepcopy(unet, dict(weights)) for v in VARIANTS}
    attach(unets["id"], system, person, id_scale=0.8, cfg=False)
    for site in find_sites(unet):
        attention_of(unets["own_text_only"], site).processor = TextOnlyProcessor()
        eager = EagerIdProcessor(*system.weights[site.name], person.tokens, system.options)
        attention_of(unets["id_eager"], site).processor = eager
    return unets


def _measure(unets: dict[str, nn.Module], clocks: dict[str, Clock], inputs: dict[str, Any], options):
    """Medians of interleaved passes: {variant: (unet seconds, processors' seconds)}, and the results.

    The processors' seconds are the sum of each layer's own median: what disturbs a moment of a pass disturbs one layer.
    """
    samples: dict[str, list[list[float]]] = {v: [] for v in VARIANTS}
    results: dict[str, Tensor] = {}
    for turn in range(options.warmup + options.rounds):
        for variant in VARIANTS[:: -1 if turn % 2 else 1]:  # so that none always follows the same one
            took = clocks[variant].one_pass(lambda v=variant: results.__setitem__(v, unets[v](**inputs).sample))
            line = f"turn {turn} {variant}: {took[0]:.2f} s, processors {sum(took[1:]):.3f} s"
            print(line, file=sys.stderr, flush=True)
            if turn >= options.warmup:
                samples[variant].append(took)
    medians = {v: [statistics.median(x) for x in zip(*s, strict=True)] for v, s in samples.items()}
    return {v: (m[0], sum(m[1:])) for v, m in medians.items()}, results


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max() / b.float().abs().max())


def _peak_gb(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _row(options, threads: int, medians, results, launches: dict[str, float]) -> dict[str, Any]:
    whole = {v: round(m[0], 4) for v, m in medians.items()}
    own = {v: round(m[1], 5) for v, m in medians.items()}
    stock = medians["stock"][0]

    def over(a: str, b: str) -> float:
        return round((medians[a][1] - medians[b][1]) / stock, 5)

    return {
        "base": options.base, "size": options.size, "steps": 1, "batch": options.batch, "dtype": options.dtype,
        "threads": threads, "unet_s": whole, "processors_s": own, "overhead": over("id", "stock"),
        "overhead_own": over("id", "own_text_only"), "overhead_eager": over("id_eager", "stock"),
        "launches_per_layer": {v: round(n, 2) for v, n in launches.items()},
        "peak_gb": round(_peak_gb(options.device), 2), "rounds": options.rounds,
        "distance_to_eager": _distance(results["id"], results["id_eager"]),
        "distance_of_identity": _distance(results["id"], results["stock"]),
    }  # fmt: skip


def run(options: argparse.Namespace) -> dict[str, Any]:
    """One row per number of threads. Overheads are shares of the stock UNet's time, from the layers' own times."""
    device, dtype = options.device, DTYPES[options.dtype]
    unet, inputs = base_model(options.base, options.size, options.batch, dtype, device)
    system = RandomSystem(unet, device)
    g = torch.Generator().manual_seed(2)
    person = Identity(torch.randn(1, options.tokens, WIDTH, generator=g).to(device), None, system.name)
    unets = variants(unet, system, person)
    clocks = {v: Clock(u, device) for v, u in unets.items()}
    launches, rows = {}, []
    small = {**inputs, "sample": inputs["sample"][..., :8, :8]}  # launches do not depend on the picture's size
    for v, u in unets.items():
        u(**small)  # what is kept from step to step is made in the first pass
        layers = [attention_of(u, site) for site in find_sites(u)]
        launches[v] = count_launches(lambda u=u: u(**small), layers) / len(layers)
    before = torch.get_num_threads()
    try:
        for threads in options.threads_list or (before,):
            torch.set_num_threads(threads)
            medians, results = _measure(unets, clocks, inputs, options)
            rows.append(_row(options, threads, medians, results, launches))
    finally:
        torch.set_num_threads(before)
    return {"rows": rows}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m idcore.bench e2e`."""

    parser.add_argument("--base", choices=BASES, default="sdxl-random", help="SDXL of random weights, or a tiny one")
    parser.add_argument("--size", type=count, default=512, help="pixels, a multiple of 64")
    parser.add_argument("--batch", type=count, default=1, help="pictures in a pass")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="of the weights")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where it runs")
    parser.add_argument("--tokens", type=count, default=32, help="identity tokens (32: PuLID v1.1; 10: v1)")
    parser.add_argument("--rounds", type=count, default=5, help="interleaved passes of each variant")
    parser.add_argument("--warmup", type=int, default=1, help="untimed turns before")
    parser.add_argument("--threads-list", type=numbers, default=None, help="torch threads, such as 1,2: a row each")
