"""The data of a run: a prepared folder, or pictures that are prepared first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..data.faces import Faces
from ..data.opening import prepared_folder
from ..data.source import PreparedSource
from .config import PuLIDTrainConfig


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
    folder = prepared_folder(data, out, config.prepare, face_setup(config), say, workers)
    return PreparedSource(folder, config.data, wanted={"faces system": config.face.features})


def face_setup(config: PuLIDTrainConfig) -> Faces:
    """Who reads the faces, as `face` says."""
    face = config.face
    if face.features == "tiny-pulid":
        return Faces("tiny-pulid")
    return Faces(face.features, face.analyzer, face.vision, face.parsing, face.retinaface)
