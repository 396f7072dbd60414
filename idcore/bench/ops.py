"""`python -m idcore.bench ops`: every op, forward and backward, against eager PyTorch and torch.compile."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._functorch.config

from ..testing.loss_cases import SEMANTIC_CASES, TOKEN_LOSS_CASES
from ..testing.stage_cases import STAGE_CASES
from ..testing.timing import copy_bandwidth
from . import align_face, id_attention, kv_bank, peak, rows
from .arguments import count, numbers, some_of


def _of(known: tuple[Any, ...]) -> Callable[[argparse.Namespace], Iterator[Any]]:
    """The op's own cases, by dtype."""
    return lambda options: (case.with_(dtype=dtype) for dtype in options.dtype for case in known)


OPS: dict[str, Callable[[argparse.Namespace], Iterator[Any]]] = {
    "id_attention": id_attention.cases,
    "semantic_alignment": _of(SEMANTIC_CASES),
    "stage_tokens": _of(STAGE_CASES),
    "token_attention_loss": _of(TOKEN_LOSS_CASES),
}

# Ops without gradients of their own, with rivals of their own: all their rows at once.
OWN_ROWS = {"align_face": align_face.rows, "kv_bank": kv_bank.rows}


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Of the op `name`, or of "ops", all of them."""
    add = parser.add_argument
    add("--backend", default="cpu", help="what is timed: cuda, triton, cpu, sdpa or reference")
    add("--against", type=some_of(rows.RIVALS), default=("eager", "compiled"),
        help=f"what it is compared with, of {', '.join(rows.RIVALS)}")  # fmt: skip
    add("--cases", type=some_of(id_attention.CASES), default=tuple(id_attention.DEFAULT_CASES),
        help=f"layers of id_attention, of {', '.join(id_attention.CASES)}")  # fmt: skip
    add("--dtype", type=some_of(("fp32", "bf16", "fp16")), default=("fp32", "bf16"), help="of fp32, bf16, fp16")
    add("--merge", type=some_of(id_attention.MERGES), default=id_attention.MERGES,
        help=f"how an identity joins in id_attention, of {', '.join(id_attention.MERGES)}")  # fmt: skip
    both = rows.PASSES if name == "ops" else ("fwd",)
    add("--passes", type=some_of(rows.PASSES), default=both, help="fwd, bwd (all gradients), or fwd,bwd")
    add("--batch", type=numbers, default=(1,) if name == "ops" else (1, 2), help="batch sizes of id_attention")
    add("--num-zero", type=int, default=8, help="zero tokens of id_attention (8: PuLID's fidelity preset)")
    add("--clock", choices=("wall", "cpu"), default="wall",
        help="cpu: the process's CPU time, for a machine that others use too; needs --threads 1")  # fmt: skip
    add("--rounds", type=count, default=20, help="interleaved turns per case; more take longer, and spread less")


def run(options: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    """All rows of the named ops.

    share_of_peak: useful floating-point operations a second over the multiply-add rate measured in this run (for bf16
    that of the bf16 dot product where the instruction set in use has one). floor_ms: the time at that rate; on a GPU,
    and where nothing is multiplied, the time of the bytes at copy bandwidth.
    """
    device = "cuda" if options.backend in ("cuda", "triton") else "cpu"
    torch._dynamo.config.recompile_limit = 256  # one shape and dtype per row
    torch._functorch.config.donated_buffer = False  # a compiled backward runs many times on what one forward saved
    bandwidth = copy_bandwidth(device=device)
    # On a GPU the floor is its bandwidth's; its multiply-add peak is not measured here.
    peaks = {d: peak.gflops(torch.get_num_threads(), d) if device == "cpu" else None for d in options.dtype}
    found = [
        rows.measure(case, direction, options, device, peaks, bandwidth)
        for name in names
        if name in OPS
        for case in OPS[name](options)
        for direction in options.passes
    ]
    for name in names:
        found += OWN_ROWS[name](options, device, peaks, bandwidth) if name in OWN_ROWS else []
    measured = {dtype: rate and round(rate, 1) for dtype, rate in peaks.items()}
    return {"peak_gflops": measured, "copy_gb_per_s": round(bandwidth, 1), "clock": options.clock, "rows": found}
