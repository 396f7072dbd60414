"""The command line of the benchmarks. The JSON goes to standard output, everything else to standard error."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from .arguments import count

# By command: the line in --help, and the module that holds its arguments. Nothing of it is imported, PyTorch neither,
# before its command is called. Where each op's kernels are: docs/perf.md.
OPS = {
    "id_attention": "text and identities in one attention (csrc/cpu/id_attention_*, csrc/cuda/, kernels/triton/)",
    "semantic_alignment": "PuLID's L_align of two passes (csrc/cpu/token_losses.cpp, kernels/triton/semantic.py)",
    "stage_tokens": "words of a person by stage (csrc/cpu/stage_tokens.cpp, kernels/triton/tokens.py)",
    "token_attention_loss": "a word in its mask (csrc/cpu/token_losses.cpp, kernels/triton/token_loss.py)",
    "align_face": "face chips out of photos (csrc/cpu/align_face.cpp, csrc/cuda/align_face.cu)",
    "kv_bank": "keys and values of all layers by one GEMM (idcore/ops/kv_bank.py)",
    "ops": "all of these, forward and backward, with floors and shares of the machine's peak",
}
MACHINE = {
    "peak": "what the machine reaches: multiply-adds in registers, copy bandwidth",
    "handover": "what changing between PyTorch's OpenMP loops and ours costs",
    "roofline": "plot and table of reports that are there",
    "gpu": "build, test, sanitize and time the GPU kernels",
}
# Of whole models.
MODELS = {
    "e2e": "one pass of a whole UNet, with and without identity",
    "stages": "a cross-attention layer whose text changes by stage, against plain text",
    "vae": "the decode of latents at full size, diffusers' against ours",
    "latency": "whole pictures by part and batch size, and a photo's enrolment",
    "train": "memory and work of a training step through four steps of SDXL, by shapes alone",
    "serving": "requests of different people at once, one by one against batches",
}
COMMANDS = OPS | MACHINE | MODELS
ABOUT = (
    "Times of ops and whole models. Each row of an op passes a parity check first; one that fails prints no time, "
    "and the exit status is 1. Results go to standard output (--json: one JSON object), progress to standard error."
)


def _module(name: str) -> ModuleType:
    home = "ops" if name in OPS else "gpu.main" if name == "gpu" else name
    return importlib.import_module(f".{home}", __package__)


def _parser(asked: str | None) -> argparse.ArgumentParser:
    """All commands by name; arguments of the one that is asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m idcore.bench", description=ABOUT, epilog="COMMAND --help lists what a command takes."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, about in COMMANDS.items():
        p = commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
        if name != asked:
            continue
        _add_arguments(p, name)
        p.add_argument("--threads", type=count, help="torch threads (default: torch's own choice)")
        p.add_argument("--json", action="store_true", help="one JSON object on standard output")
        _tell_defaults(p)
    return parser


def _add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    if name in OPS:
        _module(name).add_arguments(parser, name)
    elif name != "peak":
        _module(name).add_arguments(parser)


def _tell_defaults(parser: argparse.ArgumentParser) -> None:
    """Help that does not speak of its default gets it at its end."""
    for action in parser._actions:
        value = action.default
        if action.help != argparse.SUPPRESS and value not in (None, False, argparse.SUPPRESS):
            value = ",".join(map(str, value)) if isinstance(value, tuple) else value
            if "default" not in (action.help or ""):
                action.help = f"{action.help or ''} (default: {value})".strip().replace("%", "%%")


def _print_table(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items()))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 1 when a backend was wrong: then no time is printed for that row."""
    argv = sys.argv[1:] if argv is None else list(argv)
    asked = next((a for a in argv if not a.startswith("-")), None)
    options = _parser(asked).parse_args(argv)
    if getattr(options, "clock", "wall") == "cpu" and options.threads != 1:
        raise SystemExit("bench: --clock cpu adds up all threads and their waiting; use it with --threads 1")
    import torch

    threads = torch.get_num_threads()
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        if options.command in ("gpu", "roofline"):
            return _module(options.command).run(options)
        with torch.no_grad():
            return _report(options, torch.get_num_threads())
    finally:
        torch.set_num_threads(threads)


def _report(options: argparse.Namespace, threads: int) -> int:
    from ..env import command_line, machine

    report: dict[str, Any] = {"machine": machine(), "command": command_line(), "threads": threads}
    module = _module(options.command)
    if options.command == "peak":
        report["rows"] = module.rows(threads)
    elif options.command in OPS:
        names = tuple(n for n in OPS if n != "ops") if options.command == "ops" else (options.command,)
        report.update(module.run(options, names))
    else:
        report.update(module.run(options))
    if options.json:
        json.dump(report, sys.stdout, indent=1)
        print()
    else:
        _print_table(report["rows"])
    return 0 if all(row.get("parity", True) for row in report["rows"]) else 1
