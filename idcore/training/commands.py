"""What the training commands share: arguments; settings by file, options and base; what is said at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..errors import InputError
from .resuming import CHECKPOINTS
from .settings import build, insert, read
from .settings_out import as_text

T = TypeVar("T")
Values = Mapping[str, Any]
Say = Callable[[str], None]  # gets a line for people


def silent(text: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class TrainArguments:
    """Arguments that every `idcore train ...` has; see its --help. `say` gets lines for standard error, in the first of
    several processes alone."""

    out: Path | None = None
    config: Path | None = None
    base: str | None = None
    resume: bool = False
    changes: Sequence[str] = ()
    allow_change: Sequence[str] = ()
    print_config: bool = False
    say: Say = silent

    def __post_init__(self) -> None:
        if not _first():
            object.__setattr__(self, "say", silent)


def _first() -> bool:
    from .processes import rank_and_world

    return rank_and_world()[0] == 0


def run_training(
    command: str,
    arguments: TrainArguments,
    settings: Any,
    train: Callable[[Any, Path], Path],
    *,
    needed: Iterable[tuple[str, Any]] = (),
    use: str = "",
) -> list[str]:
    """Print the settings, or train and say what to do next; returns the lines for standard output.

    Args:
        command: such as "pulid", for errors.
        settings: the dataclass of all settings.
        train: (settings, out) to the result's folder, or to the last checkpoint's where the run stopped early.
        needed: further options with their values, such as ("--data FOLDER", None); --out always is.
        use: how to use the result, with {made} in the place of its folder.

    Raises:
        InputError: an option is missing.
    """
    if arguments.print_config:
        return [as_text(settings).rstrip()]
    for option, value in (("--out FOLDER", arguments.out), *needed):
        if value is None or value == () or value == []:
            raise InputError(f"train {command}: {option} is missing; see idcore train {command} --help")
    from .launching import join, leave
    from .processes import check_here

    if hasattr(settings, "loop"):
        check_here(settings.loop)
        join(settings.loop)
    made = train(settings, arguments.out)
    leave()
    used = f"{made}: use it with `{use.format(made=made)}`" if use else f"{made}: done"
    stopped = made.parent.name == CHECKPOINTS
    arguments.say(f"stopped early; go on with --resume ({made})" if stopped else used)
    return [str(made)] if _first() else []


def load_settings(
    cls: type[T],
    path: str | Path | None = None,
    changes: Sequence[str] = (),
    base: str | None = None,
    *,
    presets: Mapping[str, Values] | None = None,
    default_base: str = "",
    given: Values | None = None,
) -> T:
    """Settings, each from the first of these that names it: `changes` (`a.b=value`), the options `base` (it is
    `model.base`) and `given`, the file, the preset of the base model, the default.

    Args:
        cls: dataclass with `model.base` among its settings.
        path: YAML or JSON.
        presets: values by name of a base model, such as "tiny-sd".
        default_base: what `model.base` is where nothing names it.
        given: what other options of the command say, nested.

    Raises:
        InputError: as `settings.load`.
    """
    values = {} if path is None else read(path)
    if base is not None:
        values = over(values, {"model": {"base": base}})
    values = over(values, given or {})
    for text in changes:
        insert(values, text)
    model = values.get("model")
    named = model.get("base", default_base) if isinstance(model, Mapping) else default_base
    values = over((presets or {}).get(str(named), {}), values)
    return build(cls, values, "settings" if path is None else str(path))


def over(below: Values, above: Values) -> dict[str, Any]:
    """Nested values, those of `above` winning; a new mapping."""
    both = {k: over(v, {}) if isinstance(v, Mapping) else v for k, v in below.items()}
    for key, value in above.items():
        known = both.get(key)
        if isinstance(value, Mapping):
            value = over(known if isinstance(known, Mapping) else {}, value)
        both[key] = value
    return both


__all__ = ["TrainArguments", "load_settings", "over", "run_training", "silent"]
