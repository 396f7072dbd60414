"""A folder that data is made into belongs to one run of one command with the same settings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import IdcoreError, InputError
from ...files import first_few, replace_text

FOLDERS = ("chunks", "faces", "latents", "texts")  # of prepared data


@contextmanager
def alone(out: Path, command: str = "idcore prepare") -> Iterator[None]:
    """Nobody else writes into a prepared folder meanwhile; what a killed run left half written is removed."""
    try:
        import fcntl
    except ImportError:  # not on Windows: two at once are the caller's to avoid there
        yield
        return
    try:
        lock = open(out / ".lock", "a")
    except OSError as e:
        raise IdcoreError(f"cannot write into {out}: {e.strerror or e}; choose another --out folder") from e
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise InputError(f"another {command} is writing into {out}; wait for it, or choose another --out") from e
        for half in (p for folder in (out, *(out / name for name in FOLDERS)) for p in folder.glob(".*.part")):
            half.unlink(missing_ok=True)
        yield


def claim(file: Path, settings: dict[str, Any], verb: str) -> None:
    """Write settings.json into a folder that is empty yet; where it stands, refuse other settings.

    Raises:
        InputError: other settings (named), a file that cannot be read, or a folder with other things in it.
    """
    if file.exists():
        try:
            was = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise InputError(f"{file} cannot be read: {e}; remove the folder or choose another --out") from e
        require_same(was, settings, f"{file.parent} {verb}", "choose another --out, or remove the folder")
        return
    if any(p for p in file.parent.iterdir() if not p.name.startswith(".")):
        raise InputError(f"{file.parent} holds other things and no settings.json; choose an empty folder for --out")
    replace_text(file, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")


def require_same(was: dict[str, Any], now: dict[str, Any], what: str, advice: str) -> None:
    """Raise InputError naming what differs between settings."""
    differ = [k for k in {**was, **now} if was.get(k) != now.get(k)]
    if differ:
        told = first_few([f"{k} = {was.get(k)!r}, now {now.get(k)!r}" for k in differ], 3)
        raise InputError(f"{what} with other settings: {told}; {advice}")
