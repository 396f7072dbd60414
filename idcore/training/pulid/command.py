"""What `idcore train pulid` does with its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...errors import InputError
from ...results import is_result
from ..settings import as_text
from .config import STAGES, PuLIDTrainConfig, load_config


def run_command(
    *,
    out: Path | None,
    data: Path | None,
    config: Path | None,
    stage: str,
    base: str | None,
    resume: bool,
    changes: Sequence[str],
    allow_change: Sequence[str],
    print_config: bool,
    say,
) -> list[str]:
    """Train; returns the lines for standard output. See `idcore train pulid --help` for the arguments.

    Raises:
        InputError: --out or --data is missing, or settings, stages or data do not fit.
    """
    settings = load_config(config, changes, base)
    if print_config:
        return [as_text(settings).rstrip()]
    stages = parse_stages(stage)
    for name, value in (("--out", out), ("--data", data)):
        if value is None:
            raise InputError(f"train pulid: {name} FOLDER is missing; see idcore train pulid --help")
    from .data import open_data
    from .run import train_pulid

    source = open_data(data, out, settings, say)
    made = train_pulid(settings, source, out, stages=stages, resume=resume, allow_change=allow_change, say=say)
    say(
        f"{made}: use it with `idcore generate --system {made}`"
        if is_result(made)
        else f"stopped early; go on with --resume ({made})"
    )
    return [str(made)]


def parse_stages(text: str) -> tuple[int, ...]:
    """ "all" or numbers such as "2,3"."""
    if text == "all":
        return STAGES
    try:
        found = tuple(int(t) for t in text.split(","))
    except ValueError:
        found = ()
    if not found or not set(found) <= set(STAGES):
        raise InputError(f'train pulid: --stage is 1, 2, 3, "all", or several such as 2,3; got {text!r}')
    return tuple(sorted(set(found)))


__all__ = ["PuLIDTrainConfig", "parse_stages", "run_command"]
