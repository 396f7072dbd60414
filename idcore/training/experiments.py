"""What the experiments behind the pages in docs have in common: their command line, and a page's table and files."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..env import command_line, machine
from ..errors import told
from ..workflows import write_text
from .commands import Say

Row = Mapping[str, Any]


def parser_of(module: str, about: str | None, out: str, changes: str = "") -> argparse.ArgumentParser:
    """Arguments of `python -m idcore.training.MODULE`: --out, --docs, --seeds, --threads and, where `changes` says what
    they are, --set.

    Args:
        module: below `idcore.training`.
        about: the module's text.
        out: where the runs are kept unless --out says otherwise.
        changes: help of --set.
    """
    parser = argparse.ArgumentParser(prog=f"python -m idcore.training.{module}", description=about)
    parser.add_argument("--out", type=Path, default=Path(out), help="folder of the runs; a second call goes on")
    parser.add_argument("--docs", type=Path, default=None, help="write the page into this folder")
    parser.add_argument("--seeds", default="0,1,2")
    if changes:
        parser.add_argument("--set", action="append", default=[], dest="changes", help=changes)
    parser.add_argument("--threads", type=int, default=1)
    return parser


def carry_out(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace, Say], list[dict[str, Any]]],
    report: Callable[[Path, list[dict[str, Any]], Path], Iterable[Path]],
    argv: Sequence[str] | None = None,
) -> int:
    """Run an experiment by its command line and print what was written; the exit status.

    Args:
        parser: of `parser_of`.
        run: (arguments, say) to the rows; `arguments.seeds` is a list of numbers.
        report: (out, rows, docs) to the files of the page.
        argv: in place of the process's own arguments.
    """
    import torch

    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    options.seeds = [int(s) for s in options.seeds.split(",")]

    def all_of_it() -> None:
        rows = run(options, lambda text: print(text, file=sys.stderr, flush=True))
        for path in report(options.out, rows, options.docs or options.out / "report"):
            print(path)

    return told(all_of_it)


def mean_of(rows: Sequence[Row], name: str, seed: int, key: str) -> float | None:
    """Of the rows of one run and seed that have the figure; None where none has."""
    values = [r[key] for r in rows if r["run"] == name and r["seed"] == seed and r.get(key) is not None]
    return float(np.mean(values)) if values else None


def half_range(values: Sequence[float]) -> float:
    """Half of what lies between the least and the largest."""
    return (max(values) - min(values)) / 2


def deviation(values: Sequence[float]) -> float:
    """The standard deviation of these values (not of what they are drawn from)."""
    return float(np.std(values))


def cell(
    values: Sequence[float | None], digits: int | None = None, spread: Callable[[Sequence[float]], float] = half_range
) -> str:
    """The mean over the seeds; of several, behind ± how far they lie apart.

    Args:
        values: one per seed; None where a seed has none.
        digits: behind the point; None: 2, or 0 for values from 10 on.
        spread: `half_range` or `deviation`, as the page says.
    """
    known = [float(v) for v in values if v is not None]
    if not known:
        return "–"
    if digits is None:
        digits = 2 if max(map(abs, known)) < 10 else 0
    apart = f" ± {spread(known):.{digits}f}" if len(known) > 1 else ""
    return f"{np.mean(known):.{digits}f}{apart}"


def table(columns: Mapping[str, str], rows: Iterable[tuple[str, Iterable[str]]]) -> list[str]:
    """Lines of a Markdown table: headings by key, then a name and its cells each."""
    head = ["| | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    return [*head, *(f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows)]


def write_page(docs: Path, name: str, facts: Mapping[str, Any], rows: Sequence[Row], page: str) -> list[Path]:
    """DOCS/results/NAME.json (command, machine, facts, rows) and DOCS/NAME.md."""
    (docs / "results").mkdir(parents=True, exist_ok=True)
    written = [docs / "results" / f"{name}.json", docs / f"{name}.md"]
    data = {"command": command_line(), "machine": machine(), **facts, "runs": list(rows)}
    write_text(written[0], json.dumps(data, indent=1))
    write_text(written[1], page)
    return written
