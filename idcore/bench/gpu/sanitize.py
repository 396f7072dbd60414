"""compute-sanitizer's four tools over 40 calls of each backend."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from typing import IO, Any

from . import calls
from .build import toolkit
from .place import Save, nothing_saved, place

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
ERRORS = 86  # our exit status for findings, so that a crash of the program itself is told apart


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


def run(save: Save = nothing_saved, seconds: float = 105) -> dict[str, Any]:
    """Every tool on every backend, side by side. Dry, the calls run without a tool."""
    at, end = place(), time.monotonic() + seconds
    tool = toolkit("compute-sanitizer")
    if tool is None and not at.dry:
        return {"ok": False, "error": "compute-sanitizer is neither on the PATH nor beside nvcc"}
    report: dict[str, Any] = {"calls": len(calls.LISTS["sanitized"]), "verdicts": {}}
    report["warming_failed"] = calls.warm(("sanitized", False), seconds=0.38 * seconds)
    # Without PyTorch's cache each tensor is an allocation of its own: nothing hides between two tensors.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
    running = {}
    for backend in at.backends:
        for name in ("no tool",) if at.dry else TOOLS:
            watched = [] if at.dry else [tool, "--tool", name, "--error-exitcode", str(ERRORS), "--print-limit", "20"]
            command = [*watched, sys.executable, "-W", "ignore", "-m", "idcore.bench.gpu.calls", "sanitized", backend,
                       "0/1"]  # fmt: skip
            running[f"{backend} {name}"] = _started(command, environment)
    for name, (process, output) in running.items():
        text, status = _outcome(process, output, end - 5 - time.monotonic())
        report["verdicts"][name] = (
            {"ok": status == 0, "findings": 0, "status": status} if at.dry else judged(text, status)
        )
        save(report)
    report["ok"] = all(v["ok"] for v in report["verdicts"].values())
    return report


def _started(command: list[str], environment: dict[str, str]) -> tuple[subprocess.Popen, IO[str]]:
    """Output goes to a file: a pipe that nobody reads yet would stop the process when it is full."""
    output = tempfile.TemporaryFile("w+")
    process = subprocess.Popen(
        command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )
    return process, output


def _outcome(process: subprocess.Popen, output: IO[str], seconds: float) -> tuple[str, int | None]:
    """What it printed, and its status: None where time ran out."""
    try:
        status = process.wait(timeout=max(0.1, seconds))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the tool and what it watches
        process.wait()
        status = None
    output.seek(0)
    return output.read(), status
