"""What `idcore train sefi-ide` does with its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..commands import TrainArguments, run_training
from .config import SeFiTrainConfig, load_config


def run_command(
    arguments: TrainArguments,
    *,
    images: Sequence[Path] = (),
    class_word: str | None = None,
    placeholder: str | None = None,
) -> list[str]:
    """Train; returns the lines for standard output. See `idcore train sefi-ide --help` for the arguments.

    Raises:
        InputError: --out or --images is missing, or settings or photos do not fit.
    """
    said = {"images": [str(p) for p in images] or None, "class_word": class_word, "placeholder": placeholder}
    given = {"person": {k: v for k, v in said.items() if v is not None}}
    settings = load_config(arguments.config, arguments.changes, arguments.base, given)

    def train(config: SeFiTrainConfig, out: Path) -> Path:
        from .run import train_sefi_ide

        return train_sefi_ide(
            config, out, resume=arguments.resume, allow_change=arguments.allow_change, say=arguments.say
        )

    person: Any = settings.person
    return run_training(
        "sefi-ide", arguments, settings, train, needed=[("--images PHOTO", person.images)],
        use=f"idcore generate --base {settings.model.base} --id {{made}} --prompt \"a photo of "
        f'{person.placeholder} in the snow" --out pictures',
    )  # fmt: skip
