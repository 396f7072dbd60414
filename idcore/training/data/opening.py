"""Data of a run: a prepared folder, or pictures that are prepared first."""

from __future__ import annotations

from pathlib import Path

from ...errors import InputError
from ..commands import Say
from ..processes import grouped, rank_and_world, together
from .faces import FaceSetup
from .options import PrepareConfig
from .prepare import prepare

PREPARED = "prepared"


def prepared_folder(data: Path, out: Path, config: PrepareConfig, setup: FaceSetup, say: Say, workers: int = 1) -> Path:
    """`data` itself where `idcore prepare` made it; else its pictures prepared into OUT/prepared (a second call goes on
    where the first stopped).

    Args:
        data: a prepared folder, or pictures.
        out: folder of the run.
        config: how pictures are prepared.
        setup: who reads their faces.
        say: gets the report of the preparation.
        workers: processes of the preparation.

    Raises:
        InputError: no data, or pictures in a run of several processes that have not come together (`launching.join`).
    """
    if (data / "manifest.json").is_file():
        return data
    rank, world = rank_and_world()
    if world > 1 and not grouped():
        raise InputError(
            f"{data} is not prepared, and several processes would prepare it at once; run idcore prepare first"
        )
    with together():
        if rank == 0:
            say(prepare(data, out / PREPARED, config, setup, workers=workers).table())
    return out / PREPARED
