"""A pytest plugin that says, test by test, what begins and how it ends: a process that hangs or dies leaves what it
found, and another one goes on behind it.

    IDCORE_TEST_PROGRESS=FILE python -m pytest -p idcore.bench.gpu.progress ...

FILE receives a JSON line {"began": id} before a test and {"ended": id, "outcome": .., "text": ..} after it. Tests that
it already names are left out. A process whose CUDA context no longer works leaves at once, with status 70: in it every
later test would fail as well.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from .place import LOST

TRACE = 1500  # characters of a failed test's trace that are kept


def _file() -> Path:
    return Path(os.environ["IDCORE_TEST_PROGRESS"])


def _add(line: dict[str, Any]) -> None:
    with _file().open("a") as f:
        f.write(json.dumps(line) + "\n")


def lines(path: Path) -> list[dict[str, Any]]:
    """What a file holds; a line cut off by the end of its process is left out."""
    whole = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in whole if line.endswith("}")]


@pytest.hookimpl(trylast=True)  # shards are counted on the whole list
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out what an earlier process began."""
    begun = {line["began"] for line in lines(_file()) if "began" in line}
    items[:] = [item for item in items if item.nodeid not in begun]


def pytest_runtest_logstart(nodeid: str) -> None:
    """Before a test's set-up."""
    _add({"began": nodeid})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """After each phase of a test: one line a test, the call's, or that of a set-up or tear-down that went wrong."""
    if report.when == "call" or not report.passed:
        text = report.longreprtext[-TRACE:] if report.failed else ""
        _add({"ended": report.nodeid, "outcome": report.outcome, "text": text})
    if report.failed and not _context_works():
        os._exit(LOST)


def _context_works() -> bool:
    if "torch" not in sys.modules:
        return True
    from .steps import context_works

    return context_works()
