"""`idcore train sefi-ide`, callable from Python: photos of one person to words in a few KB."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...encoders.images import ImageLike
from ..bases.latent import LatentBase
from ..commands import Say, silent
from ..personal.run import run
from .config import SeFiTrainConfig
from .task import SeFiTask


def train_sefi_ide(
    config: SeFiTrainConfig,
    out: str | Path,
    *,
    images: Sequence[ImageLike] | None = None,
    base: LatentBase | None = None,
    resume: bool = False,
    allow_change: Sequence[str] = (),
    say: Say = silent,
) -> Path:
    """Learn one person. Arguments and errors as `training.personal.run.run`.

    Returns:
        OUT/model, with person.safetensors (read by `systems.sefi_files.load_tokens`); the newest checkpoint's folder
        where `loop.stop_at` ended the run early.
    """
    return run(
        config, out, lambda found: SeFiTask(config, found), command="sefi-ide", images=images, base=base, resume=resume,
        allow_change=allow_change, say=say,
    )  # fmt: skip
