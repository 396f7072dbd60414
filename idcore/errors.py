"""Errors that idcore raises. Every message names what was wanted, what came, and what to do."""

from __future__ import annotations

import sys
from collections.abc import Callable


class IdcoreError(Exception):
    """Base of all errors that idcore raises on purpose."""


class InputError(IdcoreError, ValueError):
    """An argument or a file does not fit: wrong shape, dtype, device, range, format."""


class NoFaceError(InputError):
    """A photo in which no face was found."""


class SeveralFacesError(InputError):
    """A photo with more than one face where the policy wants exactly one."""


class WeightsError(IdcoreError):
    """A weights file is missing, corrupt, or does not hold the keys and shapes that were wanted."""


class NoBackendError(IdcoreError, RuntimeError):
    """No backend, or not the named one, can run a call; the message gives each one's reasons."""


class MissingDependencyError(IdcoreError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""


def told(command: Callable[[], int | None]) -> int:
    """Run a command. An error of ours becomes one line on standard error and its exit code (above 128: stopped)."""
    try:
        return command() or 0
    except IdcoreError as e:
        code = getattr(e, "exit_code", 1)
        print(str(e) if code > 128 else f"error: {e}", file=sys.stderr, flush=True)
        return code
