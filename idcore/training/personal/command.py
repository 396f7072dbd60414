"""What `idcore train textual-inversion` and `idcore train dreambooth` do with their arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..commands import TrainArguments, run_training
from .config import BoothConfig, InversionConfig, load_config


def run_command(
    command: str, arguments: TrainArguments, *, images: Sequence[Path] = (), person: Mapping[str, Any] | None = None
) -> list[str]:
    """Train; returns the lines for standard output. See `idcore train COMMAND --help` for the arguments.

    Args:
        command: "textual-inversion" or "dreambooth".
        images: photos.
        person: settings below `person`; None values are left out.

    Raises:
        InputError: --out or --images is missing, or settings or photos do not fit.
    """
    said = {"images": [str(p) for p in images] or None, **(person or {})}
    given = {"person": {k: v for k, v in said.items() if v is not None}}
    cls = {"textual-inversion": InversionConfig, "dreambooth": BoothConfig}[command]
    settings = load_config(cls, arguments.config, arguments.changes, arguments.base, given)

    def train(config: Any, out: Path) -> Path:
        from .dreambooth import train_dreambooth
        from .textual_inversion import train_textual_inversion

        call = {"textual-inversion": train_textual_inversion, "dreambooth": train_dreambooth}[command]
        return call(config, out, resume=arguments.resume, allow_change=arguments.allow_change, say=arguments.say)

    if command == "dreambooth":
        from .dreambooth import drawing

        use = drawing(settings, "{made}")
    else:
        from .textual_inversion import drawing

        use = drawing(settings, "{made}")
    return run_training(
        command, arguments, settings, train, needed=[("--images PHOTO", settings.person.images)], use=use
    )
