"""Times a cross-attention layer whose text changes by stage (SeFi-IDE) against the same layer with plain text.

`ours` reads a bank of all stages, the stage of the pass by an index in memory; `own_text_only` is the same op on plain
text; `stock` is diffusers' own processor on plain text, which projects the prompt's keys and values at every pass.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.processors import make_processor
from ..attention.stack import IdStack
from ..attention.staged import StagedText, joined_text
from ..attention.types import Site
from ..ops import id_attention
from ..testing.cases import DTYPES
from ..testing.eager import eager_id_attention
from .arguments import count, numbers, some_of
from .launches import count_launches
from .rivals import TextOnlyProcessor

# Image tokens, channels, heads: SDXL's two kinds of cross-attention at 1024 pixels, and one that tests can afford.
CASES = {"N=4096 C=640": (4096, 640, 10), "N=1024 C=1280": (1024, 1280, 20), "tiny": (64, 64, 2)}
FLOORS = {"fp32": 1e-6, "bf16": 1e-5, "fp16": 1e-5}
WIDTH, LENGTH = 2048, 77  # of SDXL's text
STEP = 300  # a timestep inside of the run


class Layers:
    """One cross-attention layer three times on the same weights, and its inputs."""

    def __init__(self, case: str, dtype: str, stages: int, batch: int) -> None:
        tokens, hidden, heads = CASES[case]
        g = torch.Generator().manual_seed(0)
        self.stages, kind = stages, DTYPES[dtype]

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g).to(kind)

        self.states = normal(batch, tokens, hidden)
        parts = [normal(batch, LENGTH, WIDTH) for _ in range(1 + 2 * stages)]
        self.plain, self.wide = parts[0], joined_text(parts[0], parts[1 : 1 + stages], parts[1 + stages :])
        self.stack, site = IdStack(), Site("attn2.processor", 0, hidden, heads, hidden // heads)
        self.stack.staged = StagedText([site], WIDTH, stages)
        self.by_name = {n: _layer(hidden, heads, kind) for n in ("ours", "own_text_only", "stock")}
        ours = self.by_name["ours"]
        ours.set_processor(make_processor(self.stack, site, ours.processor))
        self.by_name["own_text_only"].set_processor(TextOnlyProcessor())
        self.begin(STEP)

    def begin(self, timestep: int) -> None:
        """What the UNet's hook does before each pass."""
        self.stack.staged.begin(torch.tensor(timestep), torch.device("cpu"))

    def calls(self) -> dict[str, Callable[[], Tensor]]:
        """A call per variant."""
        texts = {n: self.wide if n == "ours" else self.plain for n in self.by_name}
        return {n: partial(m, self.states, texts[n]) for n, m in self.by_name.items()}

    def op_calls(self) -> dict[str, Callable[[], Tensor]]:
        """The op alone: a bank and a stage against plain keys and values."""
        q, k, v = self._heads(self.by_name["ours"])
        stage = self.stack.staged.stage
        at = int(stage)
        k1, v1 = k[at].clone(), v[at].clone()
        return {
            "ours": lambda: id_attention(q, k, v, stage=stage),
            "own_text_only": lambda: id_attention(q, k1, v1),
            "stock": lambda: nn.functional.scaled_dot_product_attention(q, k1, v1),
        }

    def errors(self) -> tuple[float, float]:
        """Ours and eager's largest error against float64, over all stages."""
        q, k, v = self._heads(self.by_name["ours"])
        worst = [0.0, 0.0]
        for at in range(self.stages):
            stage = torch.tensor([at], dtype=torch.int32)
            wide = [t.double() for t in (q, k[at], v[at])]
            truth = nn.functional.scaled_dot_product_attention(*wide)
            eager = eager_id_attention(q, k, v, [], [], id_scale=[], stage=stage)
            for i, made in enumerate((id_attention(q, k, v, stage=stage), eager)):
                worst[i] = max(worst[i], float((made.double() - truth).abs().max()))
        return worst[0], worst[1]

    def _heads(self, attn: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        k, v = self.stack.staged.project(attn, self.wide, fused=False)
        return tuple(t.unflatten(-1, (attn.heads, -1)).transpose(-3, -2) for t in (attn.to_q(self.states), k, v))


def _layer(hidden: int, heads: int, dtype: torch.dtype) -> nn.Module:
    from diffusers.models.attention_processor import Attention

    with torch.random.fork_rng():
        torch.manual_seed(1)
        made = Attention(hidden, WIDTH, heads=heads, dim_head=hidden // heads)
    return made.to(dtype).eval().requires_grad_(False)


def forth_and_back(
    calls: dict[str, Callable[[], object]], rounds: int, warmup: int = 3, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median milliseconds of each call; every second turn runs them in the other order, so that none always follows the
    same one."""
    samples: dict[str, list[float]] = {n: [] for n in calls}
    for turn in range(warmup + rounds):
        for name in list(calls)[:: -1 if turn % 2 else 1]:
            start = clock()
            calls[name]()
            if turn >= warmup:
                samples[name].append(1e3 * (clock() - start))
    return {n: statistics.median(s) for n, s in samples.items()}


def _row(what: str, case: str, dtype: str, layers: Layers, options: argparse.Namespace) -> dict[str, Any]:
    error, eager = layers.errors()
    limit = 2 * eager + FLOORS[dtype]
    row: dict[str, Any] = {
        "what": what, "case": case, "dtype": dtype, "batch": options.batch, "stages": layers.stages,
        "threads": torch.get_num_threads(), "rounds": options.rounds, "parity": error <= limit,
    }  # fmt: skip
    if not row["parity"]:
        return row | {"error": error, "limit": limit}
    calls = layers.calls() if what == "layer" else layers.op_calls()
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    ms = forth_and_back(calls, options.rounds, clock=clock)
    row["ms"] = {n: round(t, 4) for n, t in ms.items()}
    row["over_text"] = round(ms["ours"] / ms["own_text_only"] - 1, 4)
    row["stock_over_ours"] = round(ms["stock"] / ms["ours"], 2)
    if what == "layer":
        row["launches"] = {n: count_launches(calls[n], [m]) for n, m in layers.by_name.items()}
    return row


def run(options: argparse.Namespace) -> dict[str, Any]:
    """A row per case, dtype and number of threads for the op and for the layer. `over_text` is what the stages cost
    over our own plain text attention; `launches` counts a layer's kernels once its text is projected. The stage itself
    is found once per pass of the UNet, by one more launch for all layers together."""
    rows, before = [], torch.get_num_threads()
    try:
        for threads in options.threads_list or (before,):
            torch.set_num_threads(threads)
            for dtype in options.dtype:
                for case in options.cases:
                    layers = Layers(case, dtype, options.stages, options.batch)
                    for what in ("op", "layer"):
                        rows.append(_row(what, case, dtype, layers, options))
                        print(rows[-1], file=sys.stderr, flush=True)
    finally:
        torch.set_num_threads(before)
    return {"rows": rows}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m idcore.bench stages`."""
    cases, dtypes = tuple(CASES), tuple(DTYPES)
    parser.add_argument("--cases", type=some_of(cases), default=cases[:2], help=f"some of {', '.join(cases)}")
    parser.add_argument("--dtype", type=some_of(dtypes), default=("fp32", "bf16"), help=f"some of {', '.join(dtypes)}")
    parser.add_argument("--stages", type=int, choices=range(1, 11), default=5, help="1 to 10")
    parser.add_argument("--batch", type=count, default=2, help="2: both halves of guidance")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall",
        help="cpu: the process's CPU time, for a machine that others use too; needs --threads 1",
    )  # fmt: skip
    parser.add_argument("--rounds", type=count, default=15, help="turns of each variant")
    parser.add_argument("--threads-list", type=numbers, default=None, help="torch threads, such as 1,2: a row each")
