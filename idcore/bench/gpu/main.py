"""The order of the parts, their time limits, and what is written."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...env import command_line, machine
from . import build, report

# In order, with the most seconds that each may take: 530 together.
PARTS = {"build": 100, "tests": 115, "races": 60, "sanitize": 115, "timings": 140}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--out, --parts; --inside runs one part in this process, as the command itself does."""
    parser.add_argument("--out", type=Path, default=Path("gpu_results"), help="folder of the results")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}, with commas between")
    parser.add_argument("--inside", choices=tuple(PARTS), help=argparse.SUPPRESS)


def chosen(text: str) -> list[str]:
    """Parts in their order; exits with the choices where a name is unknown."""
    names = [name for name in text.split(",") if name]
    wrong = [name for name in names if name not in PARTS]
    if wrong or not names:
        raise SystemExit(f"bench gpu: --parts {text!r}: choose from {', '.join(PARTS)}")
    return [name for name in PARTS if name in names]


def without_gpu() -> str | None:
    """Why nothing can be measured here, or None."""
    if torch.cuda.is_available():
        return None
    why = "it is built without CUDA" if torch.version.cuda is None else "there is no driver or no GPU"
    return f"bench gpu: PyTorch {torch.__version__} sees no CUDA device ({why}); nothing was built, run or measured"


def inside(name: str, out: Path) -> int:
    """One part, in this process."""
    build.use_checkout()
    result = importlib.import_module(f".{name}", __package__).run()
    _write(out, name, result)
    return 0 if result["ok"] else 1


def _write(out: Path, name: str, result: dict[str, Any]) -> None:
    (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def _command(name: str, out: Path) -> list[str]:
    return [sys.executable, "-m", "idcore.bench", "gpu", "--out", str(out), "--inside", name]


def _ended(command: list[str], log: Path, seconds: float) -> int | None:
    """Exit status, None where time ran out; what the process started goes with it."""
    with log.open("w") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None


def part(name: str, out: Path, seconds: float) -> dict[str, Any]:
    """One part in a process of its own; a crash or a time-out becomes its result."""
    path, log = out / f"{name}.json", out / f"{name}.log"
    path.unlink(missing_ok=True)
    start = time.perf_counter()
    status = _ended(_command(name, out), log, seconds)
    if path.exists():
        result = json.loads(path.read_text())
    else:
        why = f"stopped after {seconds:.0f} s" if status is None else f"ended with status {status}"
        result = {"ok": False, "error": f"{why}\n{log.read_text()[-3000:]}"}
    result["seconds"] = round(time.perf_counter() - start, 1)
    _write(out, name, result)
    return result


def run(options: argparse.Namespace) -> int:
    """0: all parts were right. 1: one was not. 2: no GPU here."""
    missing = without_gpu()
    if missing:
        print(missing, file=sys.stderr)
        return 2
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    if options.inside:
        return inside(options.inside, out)
    ok = True
    for name in chosen(options.parts):
        result = part(name, out, PARTS[name])
        ok &= result["ok"]
        print(f"bench gpu: {name}: {'right' if result['ok'] else 'WRONG'}, {result['seconds']} s", flush=True)
        summary(out)  # after every part: whoever is cut off keeps what there is
    return 0 if ok else 1


def summary(out: Path, names: Sequence[str] = tuple(PARTS)) -> dict[str, Any]:
    """Gathers the parts that are there into gpu.json and gpu.md."""
    parts = {n: json.loads((out / f"{n}.json").read_text()) for n in names if (out / f"{n}.json").exists()}
    whole = {"machine": machine(), "command": command_line(), "parts": parts}
    (out / "gpu.json").write_text(json.dumps(whole, indent=1) + "\n")
    (out / "gpu.md").write_text(report.markdown(whole))
    return whole
