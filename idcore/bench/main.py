"""The command line of the benchmarks. The JSON goes to standard output, everything else to standard error."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from ..env import command_line, machine
from . import handover, id_attention, ops, peak, roofline, rows
from .gpu import main as gpu

# Benchmarks of whole models: they need diffusers, which the others do not.
MODELS = {
    "e2e": "one pass of a whole UNet, with and without identity",
    "stages": "a cross-attention layer whose text changes by stage, against plain text",
    "vae": "the decode of latents at full size, diffusers' against ours",
    "latency": "whole pictures by part and batch size, and a photo's enrolment",
    "train": "memory and work of a training step through four steps of SDXL, by shapes alone",
    "serving": "requests of different people at once, one by one against batches",
}


def _model_bench(name: str) -> ModuleType:
    return importlib.import_module(f".{name}", __package__)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m idcore.bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in (*ops.OPS, *ops.OWN_ROWS, "ops"):
        p = commands.add_parser(name, help="all ops" if name == "ops" else f"the op {name}")
        p.add_argument("--backend", default="cpu", help="the backend that is timed (default: cpu)")
        p.add_argument(
            "--against", type=rows.some_of(rows.RIVALS), default=("eager", "compiled"),
            help=f"what it is compared with, of {', '.join(rows.RIVALS)}",
        )  # fmt: skip
        p.add_argument("--cases", type=rows.some_of(id_attention.CASES), default=tuple(id_attention.DEFAULT_CASES))
        p.add_argument("--dtype", type=rows.some_of(("fp32", "bf16", "fp16")), default=("fp32", "bf16"))
        p.add_argument("--merge", type=rows.some_of(id_attention.MERGES), default=id_attention.MERGES)
        both = rows.PASSES if name == "ops" else ("fwd",)
        p.add_argument(
            "--passes", type=rows.some_of(rows.PASSES), default=both, help="fwd, bwd (all gradients), or both"
        )
        p.add_argument("--batch", type=rows.numbers, default=(1,) if name == "ops" else (1, 2),
                       help="batch sizes of id_attention, such as 1,2")  # fmt: skip
        p.add_argument("--num-zero", type=int, default=8, help="zero tokens (8: PuLID's fidelity preset)")
        p.add_argument(
            "--clock", choices=("wall", "cpu"), default="wall",
            help="cpu: the process's CPU time, for a machine that others use too; needs --threads 1",
        )  # fmt: skip
        p.add_argument("--rounds", type=int, default=20, help="interleaved turns per case")
    commands.add_parser("peak", help="what the machine reaches: multiply-adds in registers, copy bandwidth")
    turns = commands.add_parser("handover", help="what changing between PyTorch's OpenMP loops and ours costs")
    turns.add_argument("--rounds", type=int, default=15)
    roofline.add_arguments(commands.add_parser("roofline", help="plot and table of reports that are there"))
    gpu.add_arguments(commands.add_parser("gpu", help="build, test, sanitize and time the GPU kernels"))
    for name, about in MODELS.items() if importlib.util.find_spec("diffusers") else ():
        _model_bench(name).add_arguments(commands.add_parser(name, help=about))
    for p in commands.choices.values():
        p.add_argument("--threads", type=int, default=None, help="torch threads (default: torch's own choice)")
        p.add_argument("--json", action="store_true", help="one JSON object on standard output")
    return parser


def _print_table(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items()))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 1 when a backend was wrong: then no time is printed for that row."""
    options = _parser().parse_args(argv)
    if getattr(options, "clock", "wall") == "cpu" and options.threads != 1:
        raise SystemExit("bench: --clock cpu adds up all threads and their waiting; use it with --threads 1")
    threads = torch.get_num_threads()
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        if options.command in ("gpu", "roofline"):
            return (gpu if options.command == "gpu" else roofline).run(options)
        with torch.no_grad():
            return _report(options)
    finally:
        torch.set_num_threads(threads)


def _report(options: argparse.Namespace) -> int:
    report: dict[str, Any] = {"machine": machine(), "command": command_line(), "threads": torch.get_num_threads()}
    if options.command == "peak":
        report["rows"] = peak.rows(torch.get_num_threads())
    elif options.command == "handover":
        report.update(handover.run(options.rounds))
    elif options.command in MODELS:
        report.update(_model_bench(options.command).run(options))
    else:
        names = (*ops.OPS, *ops.OWN_ROWS) if options.command == "ops" else (options.command,)
        report.update(ops.run(options, names))
    if options.json:
        json.dump(report, sys.stdout, indent=1)
        print()
    else:
        _print_table(report["rows"])
    return 0 if all(row.get("parity", True) for row in report["rows"]) else 1
