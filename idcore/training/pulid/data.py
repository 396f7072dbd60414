"""The data of a run: a prepared folder, or pictures that are prepared first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import InputError
from ..data.faces import Faces
from ..data.prepare import prepare
from ..data.source import PreparedSource
from ..processes import rank_and_world
from .config import PuLIDTrainConfig

PREPARED = "prepared"


def open_data(data: Path, out: Path, config: PuLIDTrainConfig, say: Any, workers: int = 1) -> PreparedSource:
    """Prepared data as a `Source`.

    Args:
        data: a folder of `idcore prepare`; or pictures with captions, which are prepared into OUT/prepared (a second
            call goes on where the first stopped).
        out: folder of the run.
        say: gets the report of the preparation.
        workers: processes of the preparation.

    Raises:
        InputError: no data, data that was prepared for another system, or pictures in a run of several processes.
    """
    wanted = {"faces system": config.face.features}
    if (data / "manifest.json").is_file():
        return PreparedSource(data, config.data, wanted=wanted)
    if rank_and_world()[1] > 1:
        raise InputError(
            f"{data} is not prepared, and several processes would prepare it at once; run idcore prepare first"
        )
    report = prepare(data, out / PREPARED, config.prepare, face_setup(config), workers=workers)
    say(report.table())
    return PreparedSource(out / PREPARED, config.data, wanted=wanted)


def face_setup(config: PuLIDTrainConfig) -> Faces:
    """Who reads the faces, as `face` says."""
    face = config.face
    if face.features == "tiny-pulid":
        return Faces("tiny-pulid")
    return Faces(face.features, face.analyzer, face.vision, face.parsing, face.retinaface)
