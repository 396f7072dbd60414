"""The GPU tests, in several processes at a time: what they wait for is Triton's compiler."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from .build import ROOT
from .place import Save, nothing_saved, place

TRACE = 1500  # characters of a failed test's trace that are kept


def counted(xml: str) -> dict[str, Any]:
    """Tests of one JUnit report, and the names of those that failed."""
    suites = ElementTree.fromstring(xml).iter("testsuite")
    totals, failed = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}, []
    for suite in suites:
        for key in totals:
            totals[key] += int(suite.get(key, 0))
        for case in suite.iter("testcase"):
            problem = case.find("failure") if case.find("failure") is not None else case.find("error")
            if problem is not None:
                said = (problem.get("message") or "")[:300], (problem.text or "")[-TRACE:]
                failed.append(f"{case.get('name')}: {said[0]}\n{said[1]}".strip())
    return {**totals, "failed": failed}


def _processes(folder: Path, shards: int, seconds: float) -> list[subprocess.Popen]:
    """The last one runs random calls."""
    at, started = place(), []
    for i in range(shards):
        command = [
            sys.executable, "-W", "ignore", "-m", "pytest", "-m", "gpu", "--tb=short", "-p", "no:cacheprovider",
            f"--junitxml={folder / f'{i}.xml'}", str(ROOT / "python_tests" / "kernels"),
        ]  # fmt: skip
        environment = {**os.environ, "IDCORE_TEST_SHARD": f"{i}/{shards}", "OMP_NUM_THREADS": "2"}
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL))
    # CUDA kernels need no compiling, so random calls are cheap.
    fuzz = [sys.executable, "-W", "ignore", "-m", "idcore.testing.fuzz", "id_attention", "--backend", at.backends[0],
            "--seeds", "0:8" if at.dry else "0:600", "--backward-every", "0", "--seconds", str(seconds)]  # fmt: skip
    output = (folder / "fuzz.txt").open("w")
    started.append(subprocess.Popen(fuzz, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT))
    return started


def _ended(process: subprocess.Popen, end: float) -> bool:
    """True where it ended by itself; else it is asked to end, so that pytest writes what it has, then made to."""
    try:
        process.wait(timeout=max(0.1, end - time.monotonic()))
        return True
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=4)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return False


def run(save: Save = nothing_saved, seconds: float = 120) -> dict[str, Any]:
    """Counts over all processes; ok where every test passed and the random calls were right."""
    if not (ROOT / "python_tests").exists():
        return {"ok": False, "error": "not a checkout: the tests are not installed"}
    at, end = place(), time.monotonic() + seconds - 10
    shards = 2 if at.dry else max(1, min(12, (os.cpu_count() or 2) - 2))
    totals: dict[str, Any] = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0, "unfinished": 0, "failed": []}
    with tempfile.TemporaryDirectory() as name:
        *running, fuzz = _processes(Path(name), shards, seconds - 20)
        for i, process in enumerate(running):
            totals["unfinished"] += not _ended(process, end)
            try:
                found = counted((Path(name) / f"{i}.xml").read_text())
            except (ElementTree.ParseError, OSError) as e:
                found = {"errors": 1, "failed": [f"process {i}, status {process.returncode}: {str(e)[:200]}"]}
            for key, value in found.items():
                totals[key] += value
            save(totals)
        _ended(fuzz, end)
        totals["fuzz_of_cuda"] = (Path(name) / "fuzz.txt").read_text().strip()[-4000:]
    ran = at.dry or totals["tests"] > totals["skipped"]  # dry, they find no GPU and are skipped
    bad = totals["failures"] + totals["errors"] + totals["unfinished"]
    return {"ok": fuzz.returncode == 0 and ran and not bad, **totals}
