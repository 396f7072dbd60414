"""What `idcore prepare` can be told, and one record of its result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...errors import InputError
from ..settings import setting


@dataclass(frozen=True)
class PrepareConfig:
    """How pictures are judged and what of them is kept. All of it is part of the prepared data's fingerprint."""

    resolution: int = setting(1024, "Square root of a bucket's largest pixel count", low=16)
    multiple: int = setting(64, "Bucket sides are multiples of this, pixels", low=1)
    max_aspect: float = setting(2.0, "Largest ratio of a bucket's sides", low=1)
    max_upscale: float = setting(1.25, "Pictures that would have to be enlarged more are dropped", low=1)
    several: Literal["refuse", "largest", "dominant"] = setting(
        "refuse", "Pictures with several faces: drop; take the largest; take it if it is `dominance` times the next"
    )
    dominance: float = setting(4.0, "For several = dominant: ratio of the boxes' areas", low=1)
    min_face: int = setting(48, "Least side of the face's box, pixels of the picture as it is", low=1)
    min_face_share: float = setting(0.02, "Least share of the picture that the face's box covers", low=0, below=1)
    min_score: float = setting(0.0, "Least confidence of the detector, on top of its own", low=0, below=1)
    min_sharpness: float = setting(
        0.0, "Least deviation of the face's Laplacian at 128 px, grey levels; 0: not looked at", low=0
    )
    min_light: float = setting(0.0, "Least mean grey level of the face, 0..255; 0: not looked at", low=0, below=255)
    captions: Literal["refuse", "empty"] = setting("refuse", "Pictures without a caption: drop, or use an empty one")
    duplicates: Literal["exact", "near", "keep"] = setting(
        "exact", "Drop pictures with the same pixels as an earlier one; or nearly the same (slow above 100,000); none"
    )
    near: int = setting(8, "For duplicates = near: differing bits of 256 of the picture's gradient signs", low=0)
    flip: bool = setting(False, "Also keep face features of the mirrored picture, so that a run may mirror it")
    half: bool = setting(True, "Keep face features in float16, else in float32")
    max_pixels: int = setting(100_000_000, "Larger pictures are not decoded", low=1)
    chunk: int = setting(32, "Pictures between two savings: half to twice as many", low=1)

    def check(self) -> None:
        """Raise InputError for values that do not go together."""
        if self.multiple > self.resolution:
            raise InputError(f"prepare: multiple {self.multiple} is above the resolution {self.resolution}")


@dataclass
class Record:
    """One picture of the prepared data; a line of index.jsonl.

    Attributes:
        id: its name: path in the data folder, and in the archive.
        file: path in the data folder, forward slashes. offset, length: where its bytes lie in an archive.
        hash: "sha256:..." of those bytes. pixels: of the decoded picture. looks: 256 gradient signs, hexadecimal.
        size: upright width and height in pixels.
        box, points, score: the face in pixels of the upright picture; box [4], points [5][2].
        bucket: width and height in pixels that it is trained at.
        chunk, row: where its features lie.
    """

    id: str
    file: str
    hash: str
    pixels: str
    looks: str
    size: list[int]
    caption: str
    box: list[float]
    points: list[list[float]]
    score: float
    bucket: list[int]
    chunk: str = ""
    row: int = 0
    offset: int | None = None
    length: int | None = None


@dataclass(frozen=True)
class Drop:
    """A picture that is not in the prepared data: why, in one word or two (counted), and in full."""

    id: str
    reason: str
    detail: str
