"""Wraps an ``insightface.app.FaceAnalysis`` object that the caller has made; insightface is not imported here."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from idcore.encoders.align import align
from idcore.encoders.face import Chooses, Face, largest_first
from idcore.encoders.images import ImageLike, load_image
from idcore.errors import InputError
from idcore.metrics.similarity import ARCFACE_COSINE, Similarity


def looks_like_face_analysis(candidate: object) -> bool:
    """Whether an object has what is used of FaceAnalysis: ``det_model.detect`` and ``models``."""
    detector = getattr(candidate, "det_model", None)
    return callable(getattr(detector, "detect", None)) and hasattr(candidate, "models")


class InsightFaceAnalyzer(Chooses):
    """A ``FaceAnalyzer`` over FaceAnalysis' detector and recogniser. See ``idcore.encoders.analyzer``.

    The detector and the recogniser are called directly, so that no landmark, age or gender model runs. Pictures
    are turned to BGR here, at FaceAnalysis' own door, and nowhere else.
    """

    name = "insightface"

    def __init__(self, app: Any, measure: Similarity = ARCFACE_COSINE):
        """``app``: a FaceAnalysis whose ``prepare`` has been called. Raises ``InputError`` where it cannot serve."""
        if not looks_like_face_analysis(app):
            raise InputError(
                f"An insightface.app.FaceAnalysis object is wanted, got {type(app).__name__}, which has no "
                "det_model.detect and models."
            )
        recogniser = app.models.get("recognition")
        if recogniser is None:
            raise InputError(
                f"This FaceAnalysis has no recognition model (it has {', '.join(app.models) or 'none'}). Make it "
                "with allowed_modules=['detection', 'recognition'] or without allowed_modules."
            )
        if getattr(app.det_model, "input_size", 0) is None or getattr(app.det_model, "det_thresh", 0) is None:
            raise InputError(
                "This FaceAnalysis is not prepared: call app.prepare(ctx_id=0, det_size=(640, 640)) first."
            )
        self.app, self.measure, self._recogniser = app, measure, recogniser
        self.size = int(getattr(recogniser, "input_size", (112, 112))[0])
        session = getattr(recogniser, "session", None)
        names = session.get_providers() if hasattr(session, "get_providers") else []
        self.provider = names[0] if names else "unknown (the recogniser shows no session)"
        self.reason = "chosen by the FaceAnalysis object"

    def detect(self, image: ImageLike) -> list[Face]:
        """The faces in a picture, largest first."""
        picture = load_image(image)
        boxes, points = self.app.det_model.detect(_bgr(picture), max_num=0, metric="default")
        if len(boxes) and points is None:
            raise InputError(
                "The FaceAnalysis' detector gives no landmarks. Use one with keypoints (..._bnkps, det_10g)."
            )
        faces = [
            Face(np.asarray(box[:4], np.float32), float(box[4]), np.asarray(five, np.float32), picture.size)
            for box, five in zip(boxes, points if points is not None else (), strict=True)
        ]
        return largest_first(faces)

    def align(self, image: ImageLike, face: Face) -> np.ndarray:
        """The aligned chip, uint8 RGB [112,112,3]."""
        return align(load_image(image), face.points, "arcface", self.size, plain=True)

    def embed(self, image: ImageLike, face: Face) -> np.ndarray:
        """The embedding float32 [E], not unit-norm."""
        chip = self.align(image, face)
        found = self._recogniser.get_feat(np.ascontiguousarray(chip[..., ::-1]))
        return np.asarray(found, np.float32).reshape(-1)


def _bgr(picture: Image.Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(picture)[..., ::-1])
