"""The GPU tests, in several processes at a time: what they wait for is Triton's compiler. A test that hangs or ends its
process costs itself; another process goes on behind it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .build import ROOT
from .place import DRY_TIMES, LOST, Save, nothing_saved, place
from .progress import lines

PATIENCE = 45.0  # seconds that a test may take, imports and Triton's compiler included (our choice)
ENDED = (0, 1, 5)  # pytest's exit statuses: all passed, some failed, none was left


def counted(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Tests of one process's lines by outcome, and the texts of those that failed."""
    ended = [line for line in found if "ended" in line]
    bad = [line for line in ended if line["outcome"] == "failed"]
    return {
        "tests": len({line["ended"] for line in ended}),
        "failures": len({line["ended"] for line in bad}),
        "skipped": sum(line["outcome"] == "skipped" for line in ended),
        "failed": [f"{line['ended']}: {line['text']}".strip() for line in bad],
    }


class _Shard:
    """Every nth test, in one process at a time."""

    def __init__(self, folder: Path, which: str):
        self.which, self.file = which, folder / f"{which.replace('/', '-')}.jsonl"
        self.lost: list[str] = []
        self.patience = PATIENCE * (DRY_TIMES if place().dry else 1)
        self.start()

    def start(self) -> None:
        """A process for the tests that no earlier one began."""
        command = [
            sys.executable, "-W", "ignore", "-m", "pytest", "-m", "gpu", "--tb=short", "-p", "no:cacheprovider", "-q",
            "-p", "idcore.bench.gpu.progress", str(ROOT / "python_tests" / "kernels"),
        ]  # fmt: skip
        more = {"IDCORE_TEST_SHARD": self.which, "IDCORE_TEST_PROGRESS": str(self.file), "OMP_NUM_THREADS": "2"}
        self.before = self.count = len(lines(self.file))
        self.since, self.said = time.monotonic(), self.file.with_suffix(".txt").open("w+")
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | more, stdout=self.said, stderr=subprocess.STDOUT
        )

    def look(self) -> bool:
        """True where all is done. Ends a process whose test hangs, and starts another one where a test was lost."""
        status, now = self.process.poll(), time.monotonic()
        found = lines(self.file)  # behind the look at the process, which may have written more before it ended
        if len(found) != self.count:
            self.count, self.since = len(found), now
        if status is None and now - self.since < self.patience:
            return False
        if status in ENDED:
            return True
        self.kill()
        under_way = found[-1].get("began") if len(found) > self.before else None
        if status != LOST:  # then the failed test has told already
            why = f"hung for {self.patience:.0f} s" if status is None else f"its process ended with status {status}"
            self.lost.append(f"{under_way or f'process {self.which}'}: {why}\n{self._end_of_output()}")
        if under_way is None and (status != LOST or len(found) == self.before):
            return True  # nothing was begun: another process would not get further
        self.start()
        return False

    def _end_of_output(self) -> str:
        self.said.seek(0)
        return self.said.read()[-1500:]

    def kill(self) -> None:
        """At once; one that waits for a driver may not go in time."""
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=2)

    def result(self) -> dict[str, Any]:
        """Counts of what ended, and of what was lost."""
        found = counted(lines(self.file))
        return {**found, "errors": len(self.lost), "failed": found["failed"] + self.lost}


def _fuzz(folder: Path, seconds: float) -> subprocess.Popen:
    """Random calls. CUDA kernels need no compiling, so they are cheap."""
    at = place()
    command = [sys.executable, "-W", "ignore", "-m", "idcore.testing.fuzz", "id_attention", "--backend", at.backends[0],
               "--seeds", "0:8" if at.dry else "0:600", "--backward-every", "0", "--seconds", str(seconds)]  # fmt: skip
    with (folder / "fuzz.txt").open("w") as output:
        return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)


def _together(shards: list[_Shard], unfinished: int) -> dict[str, Any]:
    totals: dict[str, Any] = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0, "failed": []}
    for shard in shards:
        for key, value in shard.result().items():
            totals[key] += value
    return {**totals, "unfinished": unfinished}


def run(save: Save = nothing_saved, seconds: float = 120) -> dict[str, Any]:
    """Counts over all processes; ok where every test passed and the random calls were right."""
    if not (ROOT / "python_tests").exists():
        return {"ok": False, "error": "not a checkout: the tests are not installed"}
    at, end = place(), time.monotonic() + seconds - 10
    count = 2 if at.dry else max(1, min(12, (os.cpu_count() or 2) - 2))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = [_Shard(folder, f"{i}/{count}") for i in range(count)]
        fuzz = _fuzz(folder, seconds - 20)
        running = list(shards)
        while (running or fuzz.poll() is None) and time.monotonic() < end:
            running = [shard for shard in running if not shard.look()]
            save(_together(shards, len(running)))
            time.sleep(0.5)
        for shard in running:
            shard.process.kill()  # all, before any is waited for
        fuzz.kill()
        for shard in running:
            shard.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            fuzz.wait(timeout=2)
        totals = _together(shards, len(running))
        totals["fuzz_of_cuda"] = (folder / "fuzz.txt").read_text().strip()[-4000:] or "stopped for time"
    ran = at.dry or totals["tests"] > totals["skipped"]  # dry, they find no GPU and are skipped
    bad = totals["failures"] + totals["errors"] + totals["unfinished"]
    return {"ok": fuzz.returncode == 0 and ran and not bad, **totals}
