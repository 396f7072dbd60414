"""The order of the parts, their time limits, and what is written."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...env import command_line, machine
from . import build, place, report

# In order, with the seconds that each may take: 539 together. What one leaves over goes to the next.
PARTS = {"build": 90, "tests": 120, "races": 85, "sanitize": 105, "timings": 139}
JSON, PAST = "gpu.json", "past.json"
TICK = 2.0  # seconds between looks at what a part has found so far
AGAIN = 20.0  # a part goes on behind a step that hung or killed it where at least so many seconds are left (our choice)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--out, --parts, --dry; --inside runs one part in this process, as the command itself does."""
    parser.add_argument("--out", type=Path, default=Path("gpu_results"), help="folder of the results")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}, with commas between")
    parser.add_argument("--dry", action="store_true", help="a few small calls of each part on the CPU: no figures")
    parser.add_argument("--inside", choices=tuple(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=1e9, help=argparse.SUPPRESS)


def chosen(text: str) -> list[str]:
    """Parts in their order; exits with the choices where a name is unknown."""
    names = [name for name in text.split(",") if name]
    wrong = [name for name in names if name not in PARTS]
    if wrong or not names:
        raise SystemExit(f"bench gpu: --parts {text!r}: choose from {', '.join(PARTS)}")
    return [name for name in PARTS if name in names]


def without_gpu() -> str | None:
    """Why nothing can be measured here, or None."""
    if place.place().dry or torch.cuda.is_available():
        return None
    why = "it is built without CUDA" if torch.version.cuda is None else "there is no driver or no GPU"
    return f"bench gpu: PyTorch {torch.__version__} sees no CUDA device ({why}); nothing was built, run or measured"


def inside(name: str, out: Path, seconds: float) -> int:
    """One part, in this process; it writes what it has found whenever there is more."""
    build.use_checkout()

    def save(found: dict[str, Any]) -> None:
        _write(out / f"{name}.json", found)

    past = _read(out / PAST)
    result = importlib.import_module(f".{name}", __package__).run(save, seconds, **past)
    save(result)
    return 0 if result["ok"] else 1


def _write(path: Path, found: dict[str, Any]) -> None:
    """Whole or not at all."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps(found, indent=1) + "\n")
    beside.replace(path)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _command(name: str, out: Path, seconds: float) -> list[str]:
    head = [sys.executable, "-u", "-W", "ignore", "-m", "idcore.bench", "gpu"]
    return [*head, "--out", str(out), "--inside", name, "--seconds", str(seconds)]


def _ended(command: list[str], log: Path, seconds: float, give_up: Callable[[], bool]) -> int | None:
    """Exit status; None where time ran out or `give_up`, asked every TICK, said so: then what the process started goes
    with it. Its output goes behind the log's."""
    end = time.monotonic() + seconds
    with log.open("a") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True)
        while True:
            try:
                return process.wait(timeout=max(0.01, min(TICK, end - time.monotonic())))
            except subprocess.TimeoutExpired:
                pass
            if give_up() or time.monotonic() >= end:
                os.killpg(process.pid, signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=5)  # one that waits for a driver may not go at once
                return None


def _merged(a: Any, b: Any) -> Any:
    """What two processes of a part have found: lists one behind the other, of other things the later one's."""
    if isinstance(a, dict) and isinstance(b, dict):
        return {**a, **{k: _merged(a[k], v) if k in a else v for k, v in b.items()}}
    return a + b if isinstance(a, list) and isinstance(b, list) else b


class _Part:
    """One part, in as many processes as it takes: the next one goes on behind the step that the last one died of."""

    def __init__(self, name: str, out: Path, folder: Path, seconds: float):
        self.name, self.out, self.folder, self.end = name, out, folder, time.monotonic() + seconds
        self.result: dict[str, Any] = {}
        self.log = out / "gpu.log"

    def _now(self) -> dict[str, Any]:
        return _merged(self.result, _read(self.folder / f"{self.name}.json"))

    def _hangs(self) -> bool:
        now = self._now()
        under_way = now.pop("under_way", None)
        gather(self.out, {self.name: {**now, "ok": False, "error": "under way"}}, _read(self.out / JSON).get("machine"))
        return under_way is not None and time.monotonic() > under_way[1]

    def once(self) -> bool:
        """One process. True where another one may find more."""
        begin, left = self.log.stat().st_size, self.end - time.monotonic()
        # The part may end by itself a little before it is stopped.
        status = _ended(_command(self.name, self.folder, left - 4), self.log, left, self._hangs)
        again = time.monotonic() + AGAIN < self.end
        self.result = self._now()
        (self.folder / f"{self.name}.json").unlink(missing_ok=True)
        under_way = self.result.pop("under_way", None)
        if status in (0, 1) and "ok" in self.result:
            return False
        self.result["ok"] = False
        why = f"ended with status {status}" if status is not None else "hung" if again else "stopped for time"
        said = self.log.read_bytes()[begin:].decode(errors="replace")[-3000:]
        if under_way is None or not again:
            self.result["error"] = f"{why}{f' in {under_way[0]}' if under_way else ''}\n{said}"
            return False
        self.result.setdefault("lost", {})[under_way[0]] = f"{why}\n{said}"
        del self.result["ok"]
        _write(self.folder / PAST, {"past": self.result["begun"]})
        return True


def part(name: str, out: Path, seconds: float) -> dict[str, Any]:
    """One part in processes of its own; a crash or a time-out becomes its result, beside what it had found by then."""
    start = time.perf_counter()
    with (out / "gpu.log").open("a") as f:
        f.write(f"\n===== {name}\n")
    with tempfile.TemporaryDirectory() as folder:
        whole = _Part(name, out, Path(folder), seconds)
        while whole.once():
            pass
    result = whole.result
    result["ok"] = result["ok"] and not result.get("lost")
    result["seconds"] = round(time.perf_counter() - start, 1)
    return result


def run(options: argparse.Namespace) -> int:
    """0: all parts were right. 1: one was not. 2: no GPU here."""
    if options.dry:
        os.environ[place.DRY] = "1"
    missing = without_gpu()
    if missing:
        print(missing, file=sys.stderr)
        return 2
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    if options.inside:
        return inside(options.inside, out, options.seconds)
    ok, spare = True, 0.0
    for name in chosen(options.parts):
        limit = PARTS[name] * (place.DRY_TIMES if options.dry else 1) + spare
        result = part(name, out, limit)
        spare = max(0.0, limit - result["seconds"])
        ok &= result["ok"]
        print(f"bench gpu: {name}: {'right' if result['ok'] else 'WRONG'}, {result['seconds']} s", flush=True)
        gather(out, {name: result})  # after every part: whoever is cut off keeps what there is
    return 0 if ok else 1


def gather(out: Path, found: dict[str, Any], at: dict[str, Any] | None = None) -> dict[str, Any]:
    """Adds parts to those in gpu.json, in their order, and writes it and gpu.md. at: the machine line, if known."""
    parts = {**_read(out / JSON).get("parts", {}), **found}
    whole = {"machine": at or machine(), "command": command_line(), "dry": place.place().dry,
             "parts": {name: parts[name] for name in PARTS if name in parts}}  # fmt: skip
    _write(out / JSON, whole)
    (out / "gpu.md").write_text(report.markdown(whole))
    return whole
