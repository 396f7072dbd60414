"""What `idcore train pulid` does with its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...errors import InputError
from ..commands import TrainArguments, run_training
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
    given = TrainArguments(out, config, base, resume, changes, allow_change, print_config, say)
    stages, settings = parse_stages(stage), load_config(config, changes, base)

    def train(settings: PuLIDTrainConfig, folder: Path) -> Path:
        from ..processes import together
        from .data import open_data
        from .run import check_stages, train_pulid

        with together():
            check_stages(settings, folder, stages, resume)  # before pictures are prepared and models loaded
        source = open_data(data, folder, settings, given.say)
        return train_pulid(
            settings, source, folder, stages=stages, resume=resume, allow_change=allow_change, say=given.say
        )

    return run_training(
        "pulid", given, settings, train, needed=[("--data FOLDER", data)],
        use=f"idcore generate --system {{made}} --base {settings.model.base} --id photo.jpg "
        '--prompt "portrait, color, cinematic" --out pictures',
    )  # fmt: skip


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
