"""What the app does, without a toolkit: photos to a person, drawing with progress, similarity, files."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from ..encoders.analyzer import embed_photo, find_face
from ..encoders.images import load_image
from ..errors import IdcoreError, InputError, NoFaceError
from ..identity import Identity
from ..metrics.gate import Judge
from ..metrics.similarity import CAVEAT
from ..serving.engines import Engine
from ..serving.requests import DrawRequest

MAX_PHOTOS = 8
MAX_PIXELS = 64_000_000  # of a photo, before it is decoded
TINY_PART, SDXL_PART = 4, 1  # pictures after which the gallery is shown anew
THUMBNAIL = 320


@dataclass(frozen=True, eq=False)
class Person:
    """Somebody whom the user enrolled.

    Attributes:
        identity: of the engine's system.
        faces: embeddings [N, 128] of the photos' faces by the judge; None where they came as a file.
        previews: the photos, small.
        about: in words.
    """

    identity: Identity
    faces: np.ndarray | None = field(repr=False)
    previews: tuple[Image.Image, ...]
    about: str


@dataclass(frozen=True)
class Drawn:
    """A picture and how alike it is, in words."""

    picture: Image.Image
    caption: str


class Studio:
    """An engine and a judge of likeness; calls of several users are served one after the other."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.judge = Judge()
        self._files = tempfile.TemporaryDirectory(prefix="idcore-ui-")  # gone when the app ends
        self._lock = threading.Lock()

    @property
    def about(self) -> str:
        """The engine and the measure, in words."""
        measure = self.judge.analyzer.measure
        return (
            f"Under each picture: {measure.name.upper()} distance of its face to the photo's by {measure.recogniser}; "
            f"one person up to {measure.threshold:g}. {CAVEAT}"
        )

    def enrol(self, photos: Sequence[str | Path]) -> Person:
        """Photos of one person.

        Raises:
            InputError: none, too many, no picture, or no face in one; the text names the file and what to do.
        """
        if not photos:
            raise InputError("Choose a photo of a person first.")
        if len(photos) > MAX_PHOTOS:
            raise InputError(f"Up to {MAX_PHOTOS} photos of one person, got {len(photos)}; leave some out.")
        pictures = [_named(photo, lambda p: load_image(p.read_bytes(), max_pixels=MAX_PIXELS)) for photo in photos]
        analyzer = self.judge.analyzer
        for photo, picture in zip(photos, pictures):
            _named(photo, lambda p, picture=picture: find_face(picture, analyzer))
        with self._lock:
            identity = self.engine.encode(pictures)
        faces = embed_photo(pictures, analyzer)
        count = "1 photo" if len(photos) == 1 else f"{len(photos)} photos"
        return Person(identity, faces, tuple(_small(p) for p in pictures), f"A person from {count}.")

    def open(self, file: str | Path) -> Person:
        """A saved identity. Raises InputError or WeightsError where it is none of this engine's."""
        identity = _named(file, Identity.load)
        self.engine.check_person(identity)
        return Person(identity, None, (), f"A person from {Path(file).name}; without a photo there is no similarity.")

    def save(self, person: Person) -> Path:
        """The identity as a file in a folder that lasts as long as the app."""
        path = Path(tempfile.mkdtemp(dir=self._files.name)) / "identity.safetensors"
        person.identity.save(path)
        return path

    def draw(self, request: DrawRequest, person: Person | None) -> Iterator[list[Drawn]]:
        """The pictures so far, each time that some are done. Raises InputError where the request does not fit."""
        self.engine.check(request)
        part = TINY_PART if self.engine.name == "tiny" else SDXL_PART
        drawn: list[Drawn] = []
        for first in range(0, request.count, part):
            count = min(part, request.count - first)
            piece = replace(request, seed=request.seed + first, count=count)
            with self._lock:
                pictures = self.engine.draw([piece], lambda: False)[0]
            for i, picture in enumerate(pictures):
                seed = f"seed {request.seed + first + i}"
                drawn.append(Drawn(picture, f"{seed}{self._likeness(picture, person)}"))
            yield list(drawn)

    def _likeness(self, picture: Image.Image, person: Person | None) -> str:
        if person is None or person.faces is None:
            return ""
        found = self.judge.embed(picture)
        if found is None:
            return ", no face found"
        measure = self.judge.analyzer.measure
        value = float(np.median(measure.matrix(person.faces, found[None])))
        return f", {value:.2f}: {'same person' if measure.is_same(value) else 'another person'}"


def _named(file: str | Path, use):
    """`use(path)`, whose errors name the file as the user knows it."""
    path = Path(file)
    try:
        return use(path)
    except NoFaceError:
        raise NoFaceError(
            f"No face was found in {path.name}. Choose a photo in which a face is upright, lit, at least about 40 "
            "pixels wide and not cut off by the edge."
        ) from None
    except OSError as e:
        raise InputError(f"{path.name} cannot be read ({e.strerror or e}); choose it again.") from e
    except IdcoreError as e:
        raise type(e)(f"{path.name}: {str(e).replace(str(path), 'the file')}") from e


def _small(picture: Image.Image) -> Image.Image:
    small = picture.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return small
