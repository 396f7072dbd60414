"""Errors that idcore raises. Every message names what was wanted, what came, and what to do."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable


class IdcoreError(Exception):
    """Base of all errors that idcore raises on purpose. `said_elsewhere`: another process of the launch prints it."""

    said_elsewhere = False


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


# What a user mends without a traceback: where to write, not what the program does.
_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def told(command: Callable[[], int | None]) -> int:
    """Run a command. An error of ours becomes one line on standard error and its exit code (above 128: stopped), as do
    a full disk, a folder that cannot be written, and Ctrl-C (130)."""
    quiet_libraries()
    try:
        return command() or 0
    except IdcoreError as e:
        code = getattr(e, "exit_code", 1)
        if not e.said_elsewhere:
            print(str(e) if code > 128 else f"error: {e}", file=sys.stderr, flush=True)
        return code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr, flush=True)
        return 130
    except OSError as e:
        if e.errno not in _PLACE:
            raise
        print(f"error: {e}; free some space there, or choose a folder that can be written", file=sys.stderr, flush=True)
        return 1


def quiet_libraries() -> None:
    """Hold transformers and diffusers to errors unless their own variables say otherwise: their warnings speak to who
    calls them, not to who types a command."""
    for name in ("transformers", "diffusers"):
        variable = f"{name.upper()}_VERBOSITY"
        if variable in os.environ:
            continue
        os.environ[variable] = "error"  # for what is imported later, and in processes of ours
        if f"{name}.utils.logging" in sys.modules:
            sys.modules[f"{name}.utils.logging"].set_verbosity_error()
