"""The face that detectors give, and how one is chosen among several."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from idcore.errors import InputError, NoFaceError, SeveralFacesError

Policy = str | int
POLICIES = ("largest", "center", "only")
_WORDS = {"largest": "largest", "center": "one nearest to the centre"}
log = logging.getLogger("idcore.encoders.face")


@dataclass
class Face:
    """One detected face.

    Attributes:
        box: float32 [4], x1 y1 x2 y2 in pixels; may reach beyond the picture.
        score: the detector's confidence, 0..1.
        points: float32 [5,2], x and y in pixels ((0, 0) is the centre of the first pixel): left eye, right eye,
            nose tip, left mouth corner, right mouth corner, left and right as seen in the picture.
        image_size: width and height of the picture in which it was found.
    """

    box: np.ndarray
    score: float
    points: np.ndarray
    image_size: tuple[int, int] = field(default=(0, 0))

    @property
    def area(self) -> float:
        """Area of the box in square pixels."""
        return float(max(0.0, self.box[2] - self.box[0]) * max(0.0, self.box[3] - self.box[1]))

    @property
    def center(self) -> tuple[float, float]:
        """Centre of the box in pixels."""
        return float(self.box[0] + self.box[2]) / 2, float(self.box[1] + self.box[3]) / 2

    def __str__(self) -> str:
        box = ", ".join(f"{value:.0f}" for value in self.box)
        return f"face at ({box}), score {self.score:.2f}"


def largest_first(faces: Sequence[Face]) -> list[Face]:
    """The order in which every analyzer gives its faces, and in which an index counts."""
    return sorted(faces, key=lambda face: (-face.area, float(face.box[0])))


def _off_center(face: Face) -> float:
    (x, y), (width, height) = face.center, face.image_size
    return (x - width / 2) ** 2 + (y - height / 2) ** 2


def choose(faces: Sequence[Face], policy: Policy = "largest") -> Face:
    """One face out of ``faces``.

    Args:
        faces: as ``detect`` gave them (largest first).
        policy: "largest", "center" (box centre nearest to the picture's), "only" (there must be just one), or
            an index into ``faces`` (0 is the largest; negative counts from the end).

    Raises:
        NoFaceError: ``faces`` is empty.
        SeveralFacesError: "only", and there are several; the message lists their boxes.
        InputError: unknown policy, or an index beyond the last face.
    """
    if not faces:
        raise NoFaceError(
            "There is no face to choose from. Use a photo in which a face is upright, lit, at least about 40 pixels "
            "wide and not cut off by the edge."
        )
    listed = "; ".join(f"{index}: {face}" for index, face in enumerate(faces))
    if isinstance(policy, (int, np.integer)) and not isinstance(policy, bool):
        if not -len(faces) <= policy < len(faces):
            raise InputError(f"There is no face {policy} among {len(faces)} (counted from 0, largest first): {listed}.")
        return faces[int(policy)]
    if policy in ("largest", "center"):
        chosen = largest_first(faces)[0] if policy == "largest" else min(faces, key=_off_center)
        if len(faces) > 1:
            log.info("%d faces in a photo, the %s is taken: %s; others: %s", len(faces), _WORDS[policy], chosen,
                     "; ".join(f"{i}: {f}" for i, f in enumerate(faces) if f is not chosen))  # fmt: skip
        return chosen
    if policy == "only":
        if len(faces) > 1:
            raise SeveralFacesError(
                f"Exactly one face is wanted, {len(faces)} were found: {listed}. Crop the photo, or choose with "
                "'largest', 'center' or an index."
            )
        return faces[0]
    raise InputError(f"Unknown way to choose a face {policy!r}: wanted {', '.join(POLICIES)} or an index.")


class Chooses:
    """Gives an analyzer the method ``choose`` (the function of that name)."""

    @staticmethod
    def choose(faces: Sequence[Face], policy: Policy = "largest") -> Face:
        """One face out of ``faces``; see ``idcore.encoders.face.choose``."""
        return choose(faces, policy)
