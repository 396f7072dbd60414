"""Typed settings (`settings.py`) as plain values, as YAML with comments, and compared with those of another run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .settings import about


def as_dict(settings: Any) -> dict[str, Any]:
    """Nested plain values (numbers, texts, lists, None), as JSON and YAML hold them."""
    return {f.name: _to_plain(getattr(settings, f.name)) for f in dataclasses.fields(settings)}


def _to_plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return as_dict(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_to_plain(v) for v in value]
    return {k: _to_plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def as_text(settings: Any) -> str:
    """YAML with a comment above every key: what it is, its range, where the default is from. `load` reads it."""
    return "\n".join(_lines(settings, "")) + "\n"


def _lines(settings: Any, indent: str) -> Iterator[str]:
    hints = get_type_hints(type(settings))
    for f in dataclasses.fields(settings):
        a, value = about(f), getattr(settings, f.name)
        inside = dataclasses.is_dataclass(value)
        notes = [a.range(), " | ".join(map(str, _choices(hints[f.name]))), "" if inside else a.source]
        note = "; ".join(n for n in notes if n)
        doc = a.doc.rstrip(".")
        yield f"{indent}# {doc + ' ' if doc else ''}{f'({note})' if note else ''}".rstrip()
        if inside:
            yield f"{indent}{f.name}:"
            yield from _lines(value, indent + "  ")
        else:
            yield f"{indent}{f.name}: {json.dumps(_to_plain(value), ensure_ascii=False)}"


def _choices(hint: Any) -> tuple:
    return get_args(hint) if get_origin(hint) is Literal else ()


def differences(old: Mapping[str, Any], settings: Any, place: str = "") -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) of what differs between plain values and settings, `free` fields left out."""
    out = []
    for f in dataclasses.fields(settings):
        if about(f).free:
            continue
        value, was = getattr(settings, f.name), old.get(f.name, MISSING)
        if dataclasses.is_dataclass(value) and isinstance(was, Mapping):
            out += differences(was, value, f"{place}{f.name}.")
        elif was is MISSING or json.dumps(was, sort_keys=True) != json.dumps(_to_plain(value), sort_keys=True):
            out.append((place + f.name, None if was is MISSING else was, _to_plain(value)))
    return out
