"""What was measured already: one SQLite file, a row per picture's content and measure. Killed at any time, it is whole.

Pictures are known by the hash of their file, so that renamed or repeated ones are not measured again and changed ones
are. Results carry the measure's key, which names the network's weights: another network measures anew.
"""

from __future__ import annotations

import hashlib
import io
import json
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from ..errors import IdcoreError, InputError

Result = tuple[dict, np.ndarray | None]
_TABLES = """
CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, size INTEGER, changed INTEGER, hash TEXT);
CREATE TABLE IF NOT EXISTS results (hash TEXT, measure TEXT, said TEXT, vector BLOB, PRIMARY KEY (hash, measure));
"""
_AT_ONCE = 500  # values in one question; SQLite's oldest limit is 999


class Store:
    """Results by (content of a picture, measure). Use as a context manager; one process at a time writes."""

    def __init__(self, path: str | Path) -> None:
        """Opens or makes the file. Raises InputError where it is something else, or cannot be written."""
        self.path = Path(path)
        try:
            self._db = sqlite3.connect(self.path, timeout=30)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.executescript(_TABLES)
        except sqlite3.DatabaseError as e:
            raise InputError(
                f"{self.path} cannot be used as the store of an evaluation ({e}); choose another --out, or delete it"
            ) from e

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc: object) -> None:
        self._db.close()

    def hash_of(self, path: Path) -> str:
        """SHA-256 of a file's content; remembered by path, size and time of change.

        Raises InputError where it cannot be read.
        """
        try:
            stat = path.stat()
            known = self._db.execute("SELECT size, changed, hash FROM files WHERE path = ?", (str(path),)).fetchone()
            if known and known[:2] == (stat.st_size, stat.st_mtime_ns):
                return known[2]
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as e:
            raise InputError(f"{path} cannot be read: {e.strerror or e}") from e
        row = (str(path), stat.st_size, stat.st_mtime_ns, digest)
        self._db.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", row)
        return digest

    def get(self, hashes: Iterable[str], measure: str) -> dict[str, Result]:
        """The results that are there."""
        wanted, found = list(dict.fromkeys(hashes)), {}
        for i in range(0, len(wanted), _AT_ONCE):
            part = wanted[i : i + _AT_ONCE]
            marks = ",".join("?" * len(part))
            query = f"SELECT hash, said, vector FROM results WHERE measure = ? AND hash IN ({marks})"
            for name, said, vector in self._db.execute(query, (measure, *part)):
                found[name] = (json.loads(said), None if vector is None else _array(vector))
        return found

    def put(self, measure: str, results: Mapping[str, Result]) -> None:
        """Add results and commit them (with the hashes of files that were asked for before)."""
        rows = [(h, measure, json.dumps(said), _bytes(vector)) for h, (said, vector) in results.items()]
        try:
            with self._db:
                self._db.executemany("INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?)", rows)
        except sqlite3.OperationalError as e:
            raise IdcoreError(
                f"{self.path} cannot be written ({e}); free some space, then run again: it goes on"
            ) from e


def _bytes(vector: np.ndarray | None) -> bytes | None:
    if vector is None:
        return None
    out = io.BytesIO()
    np.save(out, np.asarray(vector, np.float32), allow_pickle=False)
    return out.getvalue()


def _array(blob: bytes) -> np.ndarray:
    return np.load(io.BytesIO(blob), allow_pickle=False)
