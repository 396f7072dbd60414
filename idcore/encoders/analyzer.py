"""Face analysis behind one protocol: detect, choose, align, embed, and the measure that goes with it.

``default_analyzer()`` works offline with the shipped models; ``analyzer_from(...)`` takes a folder of SCRFD and
ArcFace models or an InsightFace object instead. ``find_face`` and ``embed_photo`` add the policies for pictures
with no face or several.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

from idcore.encoders.align import DLIB_PADDING, align
from idcore.encoders.dlib_resnet import DlibOutput, DlibResnet
from idcore.encoders.face import Chooses, Face, Policy, choose
from idcore.encoders.images import ImageLike, load_image
from idcore.encoders.insightface_adapter import InsightFaceAnalyzer, looks_like_face_analysis
from idcore.encoders.mtcnn import Mtcnn
from idcore.encoders.onnx_runtime import Providers
from idcore.encoders.scrfd import ArcFace, Scrfd, find_models
from idcore.errors import InputError, NoFaceError
from idcore.metrics.similarity import ARCFACE_COSINE, DLIB_L2, Similarity

__all__ = [
    "EmbeddedAnalyzer",
    "Face",
    "FaceAnalyzer",
    "InsightFaceAnalyzer",
    "ModelFolderAnalyzer",
    "analyzer_from",
    "choose",
    "default_analyzer",
    "embed_photo",
    "find_face",
]


@runtime_checkable
class FaceAnalyzer(Protocol):
    """What the systems need of a face analyzer. Any object with these serves; there is no base class.

    Attributes:
        name: short name, such as "embedded".
        measure: how its embeddings are compared.
        provider: what its networks really run on, such as "CPUExecutionProvider".
    """

    name: str
    measure: Similarity
    provider: str

    def detect(self, image: ImageLike) -> list[Face]:
        """The faces in a picture, largest first; an empty list where there is none."""
        ...

    def choose(self, faces: Sequence[Face], policy: Policy = "largest") -> Face:
        """One of several faces; see ``idcore.encoders.face.choose`` (``Chooses`` brings this method)."""
        ...

    def align(self, image: ImageLike, face: Face) -> np.ndarray:
        """The aligned chip of a face, uint8 RGB [S,S,3], as its recogniser wants it."""
        ...

    def embed(self, image: ImageLike, face: Face) -> np.ndarray:
        """The embedding of a face, float32 [E], as the recogniser gives it (not normalised)."""
        ...


class EmbeddedAnalyzer(Chooses):
    """The shipped analyzer: MTCNN and dlib's recogniser, 128 numbers per face, compared by L2."""

    name = "embedded"
    measure = DLIB_L2

    def __init__(
        self,
        providers: Providers = "auto",
        *,
        threads: int | None = None,
        min_score: float = 0.9,
        min_size: int = 24,
    ):
        """Loads the shipped models.

        Args:
            providers: see ``idcore.encoders.onnx_runtime.OnnxModel``.
            threads: threads within an operator.
            min_score: confidence that a face needs (0.9, our choice, for photos; about 0.8 for drawn faces).
            min_size: smallest face side in pixels that is looked for.
        """
        self.detector = Mtcnn(providers, thresholds=(0.6, 0.7, min_score), min_size=min_size, threads=threads)
        self.recogniser = DlibResnet(providers, threads=threads)
        self.provider, self.reason = self.recogniser.provider, self.recogniser.reason

    def detect(self, image: ImageLike) -> list[Face]:
        """The faces in a picture, largest first."""
        return self.detector.detect(load_image(image))

    def align(self, image: ImageLike, face: Face, padding: float = DLIB_PADDING) -> np.ndarray:
        """The chip uint8 RGB [150,150,3]; more ``padding`` shows more of the head (0.25 for embedding)."""
        return align(load_image(image), face.points, "dlib", self.recogniser.size, padding)

    def embed(self, image: ImageLike, face: Face) -> np.ndarray:
        """The embedding float32 [128]."""
        return self.recogniser.embed(self.align(image, face)[None])[0]

    def features(self, image: ImageLike, face: Face, padding: float = DLIB_PADDING) -> DlibOutput:
        """Embedding [1,128] and stage outputs [1,...] of the chip cut with ``padding``."""
        return self.recogniser.features(self.align(image, face, padding)[None])


class ModelFolderAnalyzer(Chooses):
    """SCRFD and ArcFace read from a folder in the antelopev2 or buffalo layout, compared by cosine."""

    def __init__(
        self,
        folder: str | Path,
        providers: Providers = "auto",
        *,
        threads: int | None = None,
        size: int = 640,
        threshold: float = 0.5,
        measure: Similarity = ARCFACE_COSINE,
    ):
        """Finds and loads the two models; ``size`` and ``threshold`` are the detector's (see ``Scrfd``)."""
        files = find_models(folder)
        self.name, self.measure, self.files = f"folder {Path(folder).name}", measure, files
        self.detector = Scrfd(files["detector"], providers, size=size, threshold=threshold, threads=threads)
        self.recogniser = ArcFace(files["recogniser"], providers, threads=threads)
        self.provider, self.reason = self.recogniser.provider, self.recogniser.reason

    def detect(self, image: ImageLike) -> list[Face]:
        """The faces in a picture, largest first."""
        return self.detector.detect(load_image(image))

    def align(self, image: ImageLike, face: Face) -> np.ndarray:
        """The chip uint8 RGB [112,112,3]."""
        return align(load_image(image), face.points, "arcface", self.recogniser.size, plain=True)

    def embed(self, image: ImageLike, face: Face) -> np.ndarray:
        """The embedding float32 [E] (512 in InsightFace's models), not unit-norm."""
        return self.recogniser.embed(self.align(image, face)[None])[0]


@lru_cache(maxsize=8)
def _embedded(providers: str | tuple[str, ...]) -> EmbeddedAnalyzer:
    return EmbeddedAnalyzer(providers)


def default_analyzer(providers: Providers = "auto") -> EmbeddedAnalyzer:
    """The shipped analyzer, made once per choice of providers. It keeps no state, so threads may share it."""
    return _embedded(providers if isinstance(providers, str) else tuple(providers))


def analyzer_from(spec: object = "embedded", providers: Providers = "auto") -> FaceAnalyzer:
    """The analyzer that ``spec`` names.

    Args:
        spec: "embedded" (or None); a folder with SCRFD and ArcFace models (str or path); an
            ``insightface.app.FaceAnalysis`` object; or anything that already is a ``FaceAnalyzer``.
        providers: ONNX Runtime providers for the first two; an InsightFace object has chosen its own.
    """
    if spec is None or (isinstance(spec, str) and spec == "embedded"):
        return default_analyzer(providers)
    if isinstance(spec, (str, os.PathLike)):
        return ModelFolderAnalyzer(Path(spec), providers)
    if isinstance(spec, FaceAnalyzer):
        return spec
    if looks_like_face_analysis(spec):
        return InsightFaceAnalyzer(spec)
    raise InputError(
        f"No face analyzer follows from {type(spec).__name__}: wanted 'embedded', a folder with SCRFD and ArcFace "
        "models, an insightface.app.FaceAnalysis object, or an object with detect, align, embed and measure."
    )


def find_face(
    image: ImageLike,
    analyzer: FaceAnalyzer | None = None,
    *,
    policy: Policy = "largest",
    on_no_face: str = "raise",
) -> tuple[Image.Image, Face | None]:
    """The picture, loaded, and the one face that counts in it.

    Args:
        image: see ``load_image``.
        analyzer: ``default_analyzer()`` where None.
        policy: which of several faces, see ``choose``.
        on_no_face: "raise", or "skip" to get None for the face.

    Raises:
        NoFaceError: there is no face and ``on_no_face`` is "raise".
        SeveralFacesError: ``policy`` is "only" and there are several.
    """
    if on_no_face not in ("raise", "skip"):
        raise InputError(f"on_no_face must be 'raise' or 'skip', got {on_no_face!r}.")
    analyzer = analyzer or default_analyzer()
    picture = load_image(image)
    faces = analyzer.detect(picture)
    if faces:
        return picture, analyzer.choose(faces, policy)
    if on_no_face == "skip":
        return picture, None
    where = os.fspath(image) if isinstance(image, (str, os.PathLike)) else "the picture"
    raise NoFaceError(
        f"No face was found in {where} ({picture.width}x{picture.height}, analyzer {analyzer.name}). Use a photo in "
        "which a face is upright, lit, at least about 40 pixels wide and not cut off by the edge; or leave this one "
        "out (in Python: on_no_face='skip')."
    )


def embed_photo(
    images: ImageLike | Sequence[ImageLike],
    analyzer: FaceAnalyzer | None = None,
    *,
    policy: Policy = "largest",
    on_no_face: str = "raise",
) -> np.ndarray:
    """Embeddings float32 [N,E] of the chosen faces in one or several photos.

    With ``on_no_face="skip"`` photos without a face are left out; ``NoFaceError`` where none is left.
    """
    analyzer = analyzer or default_analyzer()
    single = not isinstance(images, (list, tuple))
    found = []
    for image in [images] if single else images:
        picture, face = find_face(image, analyzer, policy=policy, on_no_face=on_no_face)
        if face is not None:
            found.append(analyzer.embed(picture, face))
    if not found:
        count = 1 if single else len(images)
        raise NoFaceError(f"No face was found in any of {count} photos. Use photos with a clear, upright face.")
    return np.stack(found)
