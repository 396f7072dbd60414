"""How alike two faces are, in the recogniser's own measure and with its threshold named."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from idcore.errors import InputError

CAVEAT = (
    "The same recogniser conditions the picture and judges it, so this score favours what that recogniser sees; "
    "it is no independent proof of likeness."
)
_MEASURES = {
    "l2": "Euclidean distance (smaller is more alike)",
    "cosine": "cosine similarity (larger is more alike, at most 1)",
}


@dataclass(frozen=True)
class Verdict:
    """One comparison: the measured ``value``, whether it counts as the ``same`` person, and both in words."""

    value: float
    same: bool
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Similarity:
    """A recogniser's measure of likeness.

    Attributes:
        name: "l2" (Euclidean distance of the embeddings as they come) or "cosine".
        threshold: the value up to which ("l2") or from which ("cosine") two faces count as one person.
        recogniser: which network made the embeddings.
        source: where the threshold comes from.
    """

    name: str
    threshold: float
    recogniser: str
    source: str

    def __post_init__(self) -> None:
        if self.name not in _MEASURES:
            raise InputError(f"Unknown measure {self.name!r}: wanted {' or '.join(map(repr, _MEASURES))}.")
        limit = (-1.0, 1.0) if self.name == "cosine" else (0.0, float("inf"))
        if not limit[0] <= self.threshold <= limit[1]:
            raise InputError(f"A threshold for {self.name} lies in {limit[0]}..{limit[1]}, got {self.threshold}.")

    @property
    def smaller_is_closer(self) -> bool:
        """True for distances, False for similarities."""
        return self.name == "l2"

    def matrix(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """All values [M,N] float64 between embeddings [M,E] and [N,E].

        Raises ``InputError`` for other shapes, for numbers that are not finite, and, with "cosine", for an
        embedding of length zero.
        """
        a, b = self._rows(a), self._rows(b)
        if a.shape[1] != b.shape[1]:
            raise InputError(
                f"Embeddings of {a.shape[1]} and {b.shape[1]} numbers cannot be compared: they come from different "
                f"recognisers. Embed both photos with {self.recogniser}."
            )
        if self.name == "l2":
            return np.linalg.norm(a[:, None] - b[None], axis=-1)
        lengths_a, lengths_b = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
        if not (lengths_a.all() and lengths_b.all()):
            raise InputError("An embedding of length zero has no direction, so it has no cosine. Embed a face.")
        return np.clip((a / lengths_a[:, None]) @ (b / lengths_b[:, None]).T, -1, 1)

    def value(self, a: np.ndarray, b: np.ndarray) -> float:
        """The measured value between two embeddings [E] (or [1,E])."""
        found = self.matrix(a, b)
        if found.shape != (1, 1):
            raise InputError(
                f"value() compares two embeddings, got {found.shape[0]} and {found.shape[1]}: use matrix()."
            )
        return float(found[0, 0])

    def is_same(self, value: float) -> bool:
        """Whether a measured value counts as the same person."""
        return value <= self.threshold if self.smaller_is_closer else value >= self.threshold

    def margin(self, value: float) -> float:
        """How far a value lies on the same person's side of the threshold (negative: beyond it)."""
        return self.threshold - value if self.smaller_is_closer else value - self.threshold

    def compare(self, a: np.ndarray, b: np.ndarray) -> Verdict:
        """Two embeddings [E] compared, with the answer in words."""
        value = self.value(a, b)
        same = self.is_same(value)
        relation = "within" if same else "beyond"
        kind = "L2 distance" if self.smaller_is_closer else "cosine similarity"
        text = (
            f"{kind} {value:.3f} ({self.recogniser}), {relation} the threshold {self.threshold:g}: "
            f"{'the same person' if same else 'not the same person'}."
        )
        return Verdict(value, same, text)

    def describe(self) -> str:
        """The measure, its threshold and the threshold's source, and what the score cannot show."""
        bound = "up to" if self.smaller_is_closer else "from"
        return (
            f"{_MEASURES[self.name]} between embeddings of {self.recogniser}; one person {bound} "
            f"{self.threshold:g} ({self.source}). {CAVEAT}"
        )

    @staticmethod
    def _rows(embeddings: np.ndarray) -> np.ndarray:
        rows = np.asarray(embeddings, np.float64)
        rows = rows[None] if rows.ndim == 1 else rows
        if rows.ndim != 2 or not rows.size:
            raise InputError(f"Embeddings must be [E] or [N,E], got {list(np.shape(embeddings))}.")
        if not np.isfinite(rows).all():
            raise InputError("An embedding holds NaN or infinite numbers. Embed the face again.")
        return rows


DLIB_L2 = Similarity(
    "l2",
    0.6,
    "dlib's face recognition ResNet",
    "dlib, dnn_face_recognition_ex.cpp: the network is trained so that one person's faces lie within 0.6",
)
ARCFACE_COSINE = Similarity(
    "cosine",
    0.4,
    "ArcFace",
    "insightface 2.1, insightface/gui/core/constants.py: DEFAULT_THRESHOLD of its 'Same Person' decision",
)
