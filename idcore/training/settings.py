"""Typed settings: dataclasses filled from YAML or JSON files and `a.b=value` texts, and printed with comments.

Every field says what it is, its range and where its default is from:

    @dataclass(frozen=True)
    class Mine:
        lr: float = setting(1e-5, "Learning rate", above=0, source="PuLID, section 4.1")
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ..errors import InputError, MissingDependencyError

T = TypeVar("T")


@dataclass(frozen=True)
class About:
    """What a field's metadata holds: `doc`, range (`low` <= value <= `high`, `above` < value < `below`), `source` of
    the default, and `free`: a resumed run may have another value, as it does not change the result."""

    doc: str
    low: float | None = None
    above: float | None = None
    high: float | None = None
    below: float | None = None
    source: str = "our choice"
    free: bool = False

    def range(self) -> str:
        parts = [
            f"{sign} {bound:g}"
            for sign, bound in ((">=", self.low), (">", self.above), ("<=", self.high), ("<", self.below))
            if bound is not None
        ]
        return " and ".join(parts)


def setting(default: Any = MISSING, doc: str = "", *, factory: Any = MISSING, **about: Any) -> Any:
    """A dataclass field with its documentation; `about` as in `About`. Without a default the field must be given."""
    metadata = {"about": About(doc, **about)}
    if factory is not MISSING:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class _Text(str):
    """The right side of `a.b=value`, read once the type that is wanted is known."""


def load(cls: type[T], path: str | Path | None = None, changes: Sequence[str] = ()) -> T:
    """Settings from a file and from `a.b=value` texts, which win; what neither names keeps its default.

    Raises:
        InputError: no such file, not YAML or JSON, an unknown key (the nearest known one is named), a wrong type or
            a value out of range; with the place.
    """
    values, where = ({}, "settings") if path is None else (read(path), str(path))
    for text in changes:
        insert(values, text)
    return build(cls, values, where)


def read(path: str | Path) -> dict[str, Any]:
    """A YAML or JSON file with a mapping in it."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"settings {path} cannot be read: {e}; wanted a YAML or JSON file") from e
    values = json.loads(text) if path.suffix == ".json" and _is_json(text) else _yaml(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"settings {path}: wanted `key: value` lines, got {_kind(values)}")
    return values


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _yaml(text: str, where: str) -> Any:
    try:
        import yaml
    except ImportError as e:
        raise MissingDependencyError("settings need PyYAML: pip install 'idcore[train]'") from e
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise InputError(f"{where} is not YAML: {' '.join(str(e).split())}") from e


def insert(values: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise InputError(f"--set wants KEY=VALUE with dots between names, such as loop.lr=1e-5; got {text!r}")
    for part in parts[:-1]:
        if not isinstance(values.setdefault(part, {}), dict):
            raise InputError(f"--set {text}: {part!r} holds {values[part]!r} in the file, no settings below it")
        values = values[part]
    values[parts[-1]] = _Text(value.strip())


def build(
    cls: type[T], values: Mapping[str, Any], where: str = "settings", place: str = "", below: T | None = None
) -> T:
    """A dataclass from nested plain values, each checked against its field's type and range; then its `check()`.

    What `values` lacks is as in `below`; without it, as the fields' own defaults.
    """
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    given: dict[str, Any] = {}
    for key, value in values.items():
        full = f"{place}{key}"
        if key not in fields:
            raise InputError(f"{where}: unknown key {full!r}; {_nearest(str(key), cls, place)}")
        inner = hints[key]
        if isinstance(inner, type) and dataclasses.is_dataclass(inner) and isinstance(value, Mapping):
            given[key] = build(inner, value, where, full + ".", _default(fields[key], below))
        else:
            given[key] = _convert(inner, value, where, full)
        _check_range(about(fields[key]), given[key], where, full)
    missing = [
        f"{place}{n}" for n, f in fields.items()
        if below is None and n not in given and f.default is MISSING and f.default_factory is MISSING
    ]  # fmt: skip
    if missing:
        raise InputError(f"{where}: no value for {', '.join(missing)}; add it to the file or --set {missing[0]}=")
    made = cls(**given) if below is None else dataclasses.replace(below, **given)
    check = getattr(made, "check", None)
    if check is not None:
        check()
    return made


def _default(field: dataclasses.Field, below: Any) -> Any:
    """What a field holding settings has by default; None: there is none."""
    if below is not None:
        return getattr(below, field.name)
    return None if field.default_factory is MISSING else field.default_factory()


def about(field: dataclasses.Field) -> About:
    return field.metadata.get("about", About(""))


def _nearest(key: str, cls: type, place: str) -> str:
    known = {name: name.rsplit(".", 1)[-1] for name in names(cls)}
    close = difflib.get_close_matches(key, known.values(), n=1, cutoff=0.5)
    if close:
        full = next(place + n for n, last in known.items() if last == close[0])
        return f"did you mean {full!r}?"
    return "known here: " + ", ".join(f.name for f in dataclasses.fields(cls))


def names(cls: type, place: str = "") -> Iterator[str]:
    """Dotted names of all settings of a dataclass."""
    hints = get_type_hints(cls)
    for f in dataclasses.fields(cls):
        yield place + f.name
        inner = _dataclass_of(hints[f.name])
        if inner is not None:
            yield from names(inner, f"{place}{f.name}.")


def _dataclass_of(hint: Any) -> type | None:
    for h in (hint, *get_args(hint)):
        if isinstance(h, type) and dataclasses.is_dataclass(h):
            return h
    return None


def _convert(hint: Any, value: Any, where: str, place: str) -> Any:
    """`value` as the type `hint`; numbers may stand for floats, texts such as 1e-5 (YAML's own reading) too."""
    if isinstance(value, _Text) and hint not in (str, Path):
        value = _unquoted(hint, value, f"--set {place}")
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise _wrong(where, place, f"settings below {place}", value)
        return build(hint, value, where, place + ".")
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert_any([a for a in args if a is not type(None)], value, where, place)
    if origin is Literal:
        if value not in args or isinstance(value, bool) != isinstance(args[0], bool):
            raise _wrong(where, place, "one of " + ", ".join(map(str, args)), value)
        return value
    if origin in (tuple, list):
        return _sequence(origin, args, value, where, place)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _wrong(where, place, "a mapping", value)
        return {str(k): _convert(args[1], v, where, f"{place}.{k}") for k, v in value.items()}
    return _plain(hint, value, where, place)


def _unquoted(hint: Any, value: _Text, where: str) -> Any:
    texts = {a for a in get_args(hint) if a is str or isinstance(a, str)}
    if texts and str(value) not in ("null", "~"):
        return str(value)
    return _yaml(str(value), where)


def _convert_any(hints: list[Any], value: Any, where: str, place: str) -> Any:
    for hint in hints[:-1]:
        try:
            return _convert(hint, value, where, place)
        except InputError:
            continue
    return _convert(hints[-1], value, where, place)


def _sequence(kind: type, args: tuple, value: Any, where: str, place: str) -> Any:
    if isinstance(value, str) and args[0] is str:
        value = [v.strip() for v in value.split(",") if v.strip()]
    if not isinstance(value, (list, tuple)):
        raise _wrong(where, place, "a list such as [a, b]", value)
    if kind is tuple and Ellipsis not in args:
        if len(value) != len(args):
            raise _wrong(where, place, f"{len(args)} values", value)
        hints = list(args)
    else:
        hints = [args[0]] * len(value)
    return kind(_convert(h, v, where, f"{place}[{i}]") for i, (h, v) in enumerate(zip(hints, value)))


def _plain(hint: Any, value: Any, where: str, place: str) -> Any:
    if hint is Any:
        return value
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, (int, float)) and not isinstance(value, bool) and float(value).is_integer():
        return int(value)
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if hint in (str, Path) and isinstance(value, (str, Path)):
        return hint(value)
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path"}
    raise _wrong(where, place, words.get(hint, str(hint)), value)


def _check_range(a: About, value: Any, where: str, place: str) -> None:
    for v in value if isinstance(value, (list, tuple)) else [value]:
        if not isinstance(v, (int, float)) or isinstance(v, bool):
            continue
        bad = (
            not math.isfinite(v)
            or (a.low is not None and v < a.low)
            or (a.above is not None and v <= a.above)
            or (a.high is not None and v > a.high)
            or (a.below is not None and v >= a.below)
        )
        if bad:
            raise InputError(f"{where}: {place} must be {a.range() or 'finite'}, got {v}")


def _kind(value: Any) -> str:
    return f"{value!r} ({type(value).__name__})" if value is not None else "nothing"


def _wrong(where: str, place: str, wanted: str, value: Any) -> InputError:
    value = str(value) if isinstance(value, _Text) else value
    return InputError(f"{where}: {place} must be {wanted}, got {_kind(value)}")
