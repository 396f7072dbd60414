"""What `attach` is given, checked."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from ..errors import InputError
from .types import AttentionOptions


def check_system(system: Any) -> None:
    """Raise InputError for what is no system (`systems.base.System`, or one that acts through the prompt)."""
    able = hasattr(system, "put_on") or hasattr(system, "sites") and hasattr(system, "project")
    if system is None or able and not isinstance(system, type):
        return
    what = f"the class {system.__name__}" if isinstance(system, type) else f"{type(system).__name__} {system!r:.60}"
    raise InputError(
        "attach(pipe, system, identity): system must be a loaded system such as idcore.PuLID.from_weights(FILE), an "
        f"object with sites and project, or None for an identity that brings its keys and values; got {what}"
    )


def options_of(system: Any, given: dict[str, Any], attach: inspect.Signature) -> AttentionOptions:
    """The system's options with those that were given to `attach` beyond its own arguments.

    Raises:
        InputError: an unknown one, with the argument that may be meant; or a wrong value.
    """
    try:
        return system.options.updated(**given)
    except InputError as e:
        own = [n for n, p in attach.parameters.items() if p.kind is p.KEYWORD_ONLY]
        near = {n: difflib.get_close_matches(n, own, 1) or [k for k in own if k.endswith(f"_{n}")] for n in given}
        meant = "".join(f"; did you mean {found[0]} in place of {n}?" for n, found in near.items() if found)
        raise InputError(f"attach: {e}{meant}") from e
