"""`idcore doctor`: per recipe which files are here, which are missing, where was looked, and what to do."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from idcore.env import home as default_home
from idcore.hub import problem_of, read_manifest
from idcore.recipes import RECIPES, File, fetch_command, recipe


@dataclass
class FileReport:
    """State of one file: "here", "elsewhere" (the hub's cache has it), "to convert", "damaged" or "missing"."""

    path: str
    state: str
    found: str = ""
    looked: list[str] = field(default_factory=list)
    advice: str = ""
    optional: bool = False


@dataclass
class RecipeReport:
    """State of one recipe; complete when every file that it must have can be read by idcore."""

    name: str
    what: str
    licence: str
    complete: bool
    files: list[FileReport]
    needs: list[str]


def examine(
    names: Sequence[str] = (), *, home: str | os.PathLike | None = None, verify: bool = False
) -> list[RecipeReport]:
    """Look for the files of these recipes (all by default) and of what they need; nothing is downloaded or changed.

    Args:
        names: Recipes.
        home: As in `idcore.hub.fetch`.
        verify: Read and hash every file that is here.

    Raises:
        InputError: an unknown name.
    """
    root = Path(home or default_home())
    wanted: dict[str, None] = {}
    for name in names or RECIPES:
        wanted |= dict.fromkeys([name, *recipe(name).needs])
    return [_recipe(root, name, verify) for name in wanted]


def _recipe(root: Path, name: str, verify: bool) -> RecipeReport:
    r, noted = recipe(name), read_manifest(root / name)
    files = [_file(root, name, f, noted, verify) for f in r.files]
    complete = all(f.state == "here" or f.optional for f in files)
    return RecipeReport(name, r.what, r.licence, complete, files, list(r.needs))


def _file(root: Path, name: str, file: File, noted: dict[str, dict[str, Any]], verify: bool) -> FileReport:
    folder = root / name
    places = [folder / p for p in (file.converted, file.path) if p]
    report = FileReport(file.path, "missing", "", [str(p) for p in places], fetch_command(name), file.optional)
    published, ready = folder / file.path, folder / (file.converted or file.path)
    if published.is_file() and (wrong := problem_of(published, file, noted, read=verify)):
        report.state, report.found = "damaged", str(published)
        report.advice = f"{wrong}; run `{fetch_command(name)}`"
        if ready == published or not ready.is_file():
            return report
    if ready.is_file():
        report.state, report.found, report.advice = "here", str(ready), ""
    elif published.is_file():
        report.state, report.found = "to convert", str(published)
        report.advice = f"{fetch_command(name, '--convert')} (or idcore convert {published} --out {ready} --unpickle)"
    else:
        _elsewhere(report, file, ready)
    return report


def _elsewhere(report: FileReport, file: File, ready: Path) -> None:
    """The hub's own cache, where another program may have put the same file."""
    if not file.repo:
        return
    from huggingface_hub import constants, try_to_load_from_cache

    cache = f"{constants.HF_HUB_CACHE} ({file.repo})"
    report.looked.append(cache)
    found = try_to_load_from_cache(file.repo, file.source or file.path, revision=file.revision or None)
    if isinstance(found, str):
        report.state, report.found = "elsewhere", found
        report.advice = f"idcore convert {found} --out {ready} --unpickle" if file.converted else f"use {found}"


def as_json(reports: Sequence[RecipeReport], home: str | os.PathLike | None = None) -> dict[str, Any]:
    """What `idcore doctor --json` prints."""
    return {"home": str(home or default_home()), "recipes": [asdict(r) for r in reports]}


def as_text(reports: Sequence[RecipeReport], home: str | os.PathLike | None = None, long: bool = False) -> str:
    """The report for people; `long`: also where was looked, for recipes of which nothing is here."""
    lines = [f"weights in {home or default_home()}"]
    for r in reports:
        here = sum(f.state == "here" for f in r.files)
        state = "complete" if r.complete else f"{here} of {len(r.files)} files here"
        lines += ["", f"{r.name}: {state}", f"  {r.what}; licence: {r.licence}"]
        if r.needs:
            lines.append(f"  needs {', '.join(r.needs)}")
        if not long and all(f.state == "missing" for f in r.files):
            lines.append(f"  {fetch_command(r.name)}")
            continue
        for f in r.files:
            lines.append(f"  {f.state:10} {f.path}{' (optional)' if f.optional else ''}")
            if f.state != "here":
                lines += [f"             looked in {place}" for place in f.looked]
                lines.append(f"             {f.advice}")
    return "\n".join(lines)
