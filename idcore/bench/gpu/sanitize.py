"""compute-sanitizer's four tools over 40 calls of each backend."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from . import calls

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
ERRORS = 86  # our exit status for findings, so that a crash of the program itself is told apart


def find() -> str | None:
    """compute-sanitizer of the PATH, or of the CUDA toolkit that nvcc belongs to."""
    found = shutil.which("compute-sanitizer")
    nvcc = shutil.which("nvcc")
    if found or nvcc is None:
        return found
    beside = Path(nvcc).resolve().parent / "compute-sanitizer"
    return str(beside) if beside.exists() else None


def findings(text: str) -> int | None:
    """Errors and hazards that the tool counted; None where it printed no summary."""
    counts = re.findall(r"(?:ERROR SUMMARY: (\d+) error)|(?:RACECHECK SUMMARY: (\d+) hazard)", text)
    return sum(int(a or b) for a, b in counts) if counts else None


def judged(text: str, status: int | None) -> dict[str, Any]:
    """One tool's verdict from its output and exit status (None: stopped for time)."""
    count = findings(text)
    ok = status == 0 and count == 0
    verdict: dict[str, Any] = {"ok": ok, "findings": count, "status": status}
    return verdict if ok else {**verdict, "output": text[:1500] + "\n...\n" + text[-1500:]}


def run(_: Any = None, seconds: float = 70) -> dict[str, Any]:
    """Every tool on every backend, side by side."""
    tool = find()
    if tool is None:
        return {"ok": False, "error": "compute-sanitizer is neither on the PATH nor beside nvcc"}
    report: dict[str, Any] = {"calls": len(calls.LISTS["sanitized"])}
    report["warming_failed"] = calls.warm("sanitized", "triton", seconds=40)
    # Without PyTorch's cache each tensor is an allocation of its own: nothing hides between two tensors.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
    running = {}
    for backend in ("cuda", "triton"):
        for name in TOOLS:
            command = [
                tool, "--tool", name, "--error-exitcode", str(ERRORS), "--print-limit", "20",
                sys.executable, "-W", "ignore", "-m", "idcore.bench.gpu.calls", "sanitized", backend, "0/1",
            ]  # fmt: skip
            running[f"{backend} {name}"] = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
    end = time.monotonic() + seconds
    report["verdicts"] = {name: _outcome(process, end - time.monotonic()) for name, process in running.items()}
    report["ok"] = all(v["ok"] for v in report["verdicts"].values())
    return report


def _outcome(process: subprocess.Popen, seconds: float) -> dict[str, Any]:
    try:
        text, _ = process.communicate(timeout=max(0.1, seconds))
        return judged(text, process.returncode)
    except subprocess.TimeoutExpired:
        process.kill()
        return judged(process.communicate()[0], None)
