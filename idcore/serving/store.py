"""Enrolled people, in memory, under names that cannot be guessed."""

from __future__ import annotations

import secrets
import tempfile
import threading
from pathlib import Path
from typing import Any

from ..errors import IdcoreError, InputError
from ..identity import Identity


class StoreFull(IdcoreError):
    """No room for one more identity."""


class UnknownIdentity(InputError):
    """No identity of that name is enrolled."""


class IdentityStore:
    """Identities by name. They describe faces: they live in memory alone, and only who knows a name gets at one.

    Args:
        limit: identities at most; nothing is dropped to make room.
    """

    def __init__(self, limit: int = 1000) -> None:
        self.limit = limit
        self._people: dict[str, Identity] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._people)

    def add(self, identity: Identity) -> str:
        """Keep an identity; returns its new name.

        Raises:
            StoreFull: the limit is reached.
        """
        name = secrets.token_urlsafe(12)
        with self._lock:
            if len(self._people) >= self.limit:
                raise StoreFull(f"{self.limit} identities are enrolled, which is the limit; delete some first")
            self._people[name] = identity
        return name

    def get(self, name: str) -> Identity:
        """Raises UnknownIdentity."""
        try:
            return self._people[name]
        except KeyError:
            raise UnknownIdentity(f"no identity {name[:40]!r} is enrolled; enrol the photo or file again") from None

    def remove(self, name: str) -> None:
        """Raises UnknownIdentity."""
        with self._lock:
            self.get(name)
            del self._people[name]


def identity_bytes(identity: Identity) -> bytes:
    """What `Identity.save` writes."""
    return _through_file(lambda path: identity.save(path) or path.read_bytes())


def identity_from_bytes(data: bytes) -> Identity:
    """What `Identity.load` reads; its errors."""

    def load(path: Path) -> Identity:
        path.write_bytes(data)
        try:
            return Identity.load(path)
        except IdcoreError as e:
            raise type(e)(str(e).replace(str(path), "the file")) from e

    return _through_file(load)


def _through_file(use: Any) -> Any:
    with tempfile.TemporaryDirectory(prefix="idcore-") as folder:
        return use(Path(folder) / "identity.safetensors")
