"""The GPU tests, in several processes at a time: what they wait for is Triton's compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from .build import ROOT


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
                failed.append(f"{case.get('name')}: {(problem.get('message') or '')[:300]}")
    return {**totals, "failed": failed}


def _processes(folder: Path, shards: int) -> list[subprocess.Popen]:
    started = []
    for i in range(shards):
        command = [
            sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={folder / f'{i}.xml'}",
            str(ROOT / "python_tests" / "kernels"),
        ]  # fmt: skip
        environment = {**os.environ, "IDCORE_TEST_SHARD": f"{i}/{shards}", "OMP_NUM_THREADS": "2"}
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL))
    # CUDA kernels need no compiling, so random calls are cheap.
    fuzz = [sys.executable, "-m", "idcore.testing.fuzz", "id_attention", "--backend", "cuda", "--seeds", "0:600",
            "--backward-every", "0"]  # fmt: skip
    started.append(subprocess.Popen(fuzz, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    return started


def run(_: Any = None, seconds: float = 100) -> dict[str, Any]:
    """Counts over all processes; ok where every test passed and the random calls were right."""
    if not (ROOT / "python_tests").exists():
        return {"ok": False, "error": "not a checkout: the tests are not installed"}
    shards = max(1, min(12, (os.cpu_count() or 2) - 2))
    totals: dict[str, Any] = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0, "failed": []}
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as name:
        *running, fuzz = _processes(Path(name), shards)
        for i, process in enumerate(running):
            try:
                process.wait(timeout=max(0.1, end - time.monotonic()))
                found = counted((Path(name) / f"{i}.xml").read_text())
            except (subprocess.TimeoutExpired, OSError) as e:
                process.kill()
                found = {"errors": 1, "failed": [f"process {i}: {type(e).__name__}: {str(e)[:200]}"]}
            for key, value in found.items():
                totals[key] += value
        try:
            text = fuzz.communicate(timeout=max(0.1, end - time.monotonic()))[0]
        except subprocess.TimeoutExpired:
            fuzz.kill()
            text = fuzz.communicate()[0]
    right = fuzz.returncode == 0
    ok = right and totals["tests"] > totals["skipped"] and not totals["failures"] + totals["errors"]
    return {"ok": ok, **totals, "fuzz_of_cuda": text.strip()[-2000:]}
