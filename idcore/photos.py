"""Photos that a command is given: files and folders, and what is said of several faces in one."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def photos_of(paths: Sequence[Path]) -> list[Path]:
    """Files as they are; of a folder the pictures in it, by name.

    Raises:
        InputError: a folder without pictures.
    """
    found: list[Path] = []
    for path in paths:
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        if not inside:
            raise InputError(f"{path} is a folder without pictures; wanted some of {', '.join(SUFFIXES)} in it")
        found += inside
    return found


@contextlib.contextmanager
def telling_faces(say: Callable[[str], Any]) -> Iterator[None]:
    """Says which face of a photo is taken where there are several."""

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(f"{record.getMessage()} (--choose takes another)")

    log, handler = logging.getLogger("idcore.encoders.face"), Told(logging.INFO)
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
