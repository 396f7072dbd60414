"""From photos to what PuLID's identity encoder reads (arXiv 2404.16022, sec. 3.2, and the published weights).

photo -> shrink -> one face -> (a) the recogniser's raw embedding
                            -> (b) 512 px FFHQ alignment -> parsing: white and grey -> 336 px -> vision tower
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from idcore.encoders.align import similarity_transform, template, warp_bilinear
from idcore.encoders.eva_clip import CLIP_MEAN, CLIP_STD, EvaClipVisual
from idcore.encoders.images import ImageLike, load_image
from idcore.encoders.pulid_features import PuLIDFeatures
from idcore.errors import InputError, NoFaceError
from idcore.files import file_hash

if TYPE_CHECKING:
    from idcore.encoders.analyzer import FaceAnalyzer
    from idcore.encoders.face import Face
    from idcore.encoders.face_parsing import BiSeNet
    from idcore.encoders.retinaface import RetinaFace

VERSION = "pulid-1"  # goes into identities; changes when the same photo would give other features
MAX_SIDE = 1024
CHIP = 512
CHIP_FILL = (132, 133, 135)  # RGB
# Of the classes of face_parsing.LABELS: background, ears, earring, neck, necklace, cloth, hat. Hair is kept.
WHITENED = (0, 7, 8, 9, 14, 15, 16, 18)
LUMA = (0.299, 0.587, 0.114)
# Least median of squares tries these pairs of the five landmarks: the pairs that OpenCV's estimator draws for
# five points with its fixed seed, so that outliers are thrown out exactly as when the weights were trained.
_LMEDS_PAIRS = ((0, 4), (0, 3), (1, 2), (1, 0), (1, 4), (3, 1))
_LMEDS_WIDTH = 2.5 * 1.4826 * (1 + 5 / (5 - 2))


def shrink(image: Image.Image, max_side: int = MAX_SIDE) -> Image.Image:
    """The image with its long side at most ``max_side``, Lanczos; never enlarged."""
    long = max(image.size)
    if long <= max_side:
        return image
    size = tuple(max(1, int(s * max_side / long)) for s in image.size)
    return image.resize(size, Image.Resampling.LANCZOS)


def lmeds_transform(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Rotation, scale and shift [2,3] from five points to five: robust against one that lies wrong.

    Least median of squares over pairs of landmarks, then least squares over the points that fit. With all
    points fitting it equals `align.similarity_transform`; with a profile's nose or a bad corner it does not.
    """
    source, target = np.asarray(source, np.float64), np.asarray(target, np.float64)
    if source.shape != (5, 2) or target.shape != (5, 2):
        raise InputError(f"lmeds_transform: wanted five points [5, 2] twice, got {source.shape} and {target.shape}")
    best: tuple[float, np.ndarray] | None = None
    for pair in _LMEDS_PAIRS:
        rows = list(pair)
        if np.allclose(source[rows[0]], source[rows[1]]):
            continue
        m = similarity_transform(source[rows], target[rows])
        squares = ((source @ m[:, :2].T + m[:, 2] - target) ** 2).sum(1)
        median = float(np.median(squares))
        if best is None or median < best[0]:
            best = (median, squares)
    if best is None:
        raise InputError("lmeds_transform: the landmarks coincide, so no alignment follows from them")
    median, squares = best
    inliers = squares <= max(_LMEDS_WIDTH * median**0.5, 1e-3) ** 2
    return similarity_transform(source[inliers], target[inliers])


def whiten(chips: Tensor, labels: Tensor) -> Tensor:
    """White where the class is one of ``WHITENED``, grey luma elsewhere.

    Args:
        chips: [N, 3, H, W] RGB in [0, 1].
        labels: [N, H, W] integer classes.

    Returns:
        [N, 3, H, W], three equal channels.
    """
    gone = torch.isin(labels, torch.tensor(WHITENED, device=labels.device))[:, None]
    grey = (chips * chips.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    return torch.where(gone, torch.ones_like(grey), grey).expand(-1, 3, -1, -1)


def clip_pixels(chips: Tensor, size: int, antialias: bool) -> Tensor:
    """[N, 3, H, W] in [0, 1] to [N, 3, size, size], bicubic (overshoot kept) and normalised for CLIP."""
    x = F.interpolate(chips, (size, size), mode="bicubic", align_corners=False, antialias=antialias)
    mean, std = (x.new_tensor(v).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    return (x - mean) / std


def _shared(a: np.ndarray, b: np.ndarray) -> float:
    """Overlap of two boxes over their union, 0..1."""
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    both = float(np.prod(np.maximum(sides, 0)))
    return both / max(float(np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2])) - both, 1e-9)


class PuLIDPreprocess:
    """Photos of one person to :class:`PuLIDFeatures`.

    One face is chosen per photo and used for both branches (the published code chooses twice, by area and by
    nearness to the centre, and can mix two people).

    Args:
        analyzer: Finds the face and gives its raw embedding; the published weights want glintr100 (512-d).
        tower: EVA02-CLIP visual tower.
        parsing: Face parsing network. None is an explicit choice: background, clothes and colour then reach
            the encoder, which was trained without them; it warns once and the identity's meta says so.
        policy: Which face, as in ``FaceAnalyzer.choose``: "largest", "center", an index, or "only".
        on_no_face: "raise", or "skip": leave photos without a face out as long as one is left.
        id_dim: Width wanted of the embedding.
        antialias: Of the 512 -> 336 resize. False is what the SDXL weights were published with.
        estimator: "lmeds" (as published, robust) or "least_squares".
        landmarks: A detector whose five points the alignment takes in place of the analyzer's: RetinaFace in the
            published chain. Of its faces the one that covers most of the chosen face counts.
        max_side: Photos are shrunk to this before anything else; pixels.
    """

    def __init__(
        self,
        analyzer: FaceAnalyzer,
        tower: EvaClipVisual,
        parsing: BiSeNet | None,
        *,
        policy: str | int = "largest",
        on_no_face: str = "raise",
        id_dim: int = 512,
        antialias: bool = False,
        estimator: str = "lmeds",
        landmarks: RetinaFace | None = None,
        max_side: int = MAX_SIDE,
    ) -> None:
        if estimator not in ("lmeds", "least_squares"):
            raise InputError(f"PuLIDPreprocess: estimator must be 'lmeds' or 'least_squares', got {estimator!r}")
        if on_no_face not in ("raise", "skip"):
            raise InputError(f"PuLIDPreprocess: on_no_face must be 'raise' or 'skip', got {on_no_face!r}")
        if max_side < 64:
            raise InputError(f"PuLIDPreprocess: max_side must be at least 64 pixels, got {max_side}")
        self.analyzer, self.tower, self.parsing = analyzer, tower, parsing
        self.policy, self.on_no_face, self.id_dim, self.antialias = policy, on_no_face, id_dim, antialias
        self.estimator, self.max_side, self.landmarks = estimator, max_side, landmarks
        self._warned = False
        self._recogniser_hash: str | None = None

    def __call__(self, photos: ImageLike | Sequence[ImageLike]) -> PuLIDFeatures:
        """Features [1, n, ...] of n photos of one person.

        Args:
            photos: One photo or a list: path, PIL image, or uint8 RGB array.

        Raises:
            NoFaceError, SeveralFacesError: from the analyzer, naming the photo.
            InputError: no photos, or an embedding of another width than the weights want.
        """
        photos = list(photos) if isinstance(photos, (list, tuple)) else [photos]
        if not photos:
            raise InputError("PuLIDPreprocess: wanted at least one photo, got an empty list")
        if self.parsing is None and not self._warned:
            self._warned = True
            warnings.warn(
                "PuLID without a parsing network: background, clothes and colour reach the identity encoder, "
                "which was trained on faces cut out in grey; likeness suffers",
                stacklevel=2,
            )
        found = [f for f in (self._one(photo, i) for i, photo in enumerate(photos)) if f is not None]
        if not found:
            raise NoFaceError(
                f"PuLIDPreprocess: there is no face in any of {len(photos)} photos; use photos in which a face is "
                "upright, lit and not cut off"
            )
        features = PuLIDFeatures.stack(found)
        if len(found) < len(photos):
            features.meta["skipped"] = len(photos) - len(found)
        return features

    def _one(self, photo: ImageLike, number: int) -> PuLIDFeatures | None:
        image = shrink(load_image(photo), self.max_side)
        name = f"photo {number + 1}" + (f" {os.fspath(photo)}" if isinstance(photo, (str, os.PathLike)) else "")
        face = self._choose(image, name)
        return None if face is None else self.features_of(image, face, name)

    def features_of(self, image: Image.Image, face: Face, name: str = "the picture") -> PuLIDFeatures:
        """Features [1, 1, ...] of one face of an RGB picture (already shrunk); `name` is for errors.

        Raises:
            InputError: an embedding of another width than the weights want.
            NoFaceError: the landmark detector does not see this face.
        """
        return self.read(image, face, name)[0]

    def read(
        self, image: Image.Image, face: Face, name: str = "the picture"
    ) -> tuple[PuLIDFeatures, tuple[np.ndarray, np.ndarray] | None]:
        """`features_of`, and what the parsing network saw: the classes of the aligned chip's pixels, uint8 [512, 512],
        with the matrix [2, 3] from the picture to the chip; None without that network."""
        embedding = np.asarray(self.analyzer.embed(image, face), np.float32).reshape(-1)
        if embedding.shape != (self.id_dim,):
            raise InputError(
                f"PuLID wants a face embedding of {self.id_dim} numbers, {self._analyzer_name()} gives "
                f"{embedding.size}; the published weights need glintr100 (antelopev2)"
            )
        matrix = self._matrix(self._points(image, face, name))
        with torch.no_grad():
            clip, hidden, labels = self._vision(warp_bilinear(image, matrix, CHIP, CHIP_FILL))
        clip = clip / clip.norm(dim=-1, keepdim=True)
        id_cond = torch.cat([torch.from_numpy(embedding)[None], clip.float().cpu()], -1)
        features = PuLIDFeatures(id_cond[:, None], tuple(h.float().cpu()[:, None] for h in hidden), self.meta())
        return features, None if labels is None else (labels[0].to(torch.uint8).numpy(), matrix)

    def align(self, image: Image.Image, points: np.ndarray) -> np.ndarray:
        """The FFHQ-aligned chip [512, 512, 3] uint8 of the face with five ``points`` [5,2] in ``image``."""
        return warp_bilinear(image, self._matrix(points), CHIP, CHIP_FILL)

    def _matrix(self, points: np.ndarray) -> np.ndarray:
        """[2, 3] from the picture to the chip."""
        estimate = lmeds_transform if self.estimator == "lmeds" else similarity_transform
        return estimate(points, template("ffhq"))

    def _points(self, image: Image.Image, face: Face, name: str) -> np.ndarray:
        """The points to align by: the analyzer's, or those that the landmark detector finds on the same face."""
        if self.landmarks is None:
            return face.points
        shared = [(_shared(face.box, other.box), other) for other in self.landmarks.detect(image)]
        best = max(shared, key=lambda pair: pair[0], default=(0.0, None))
        if best[0] < 0.25:
            raise NoFaceError(
                f"{name}: the landmark detector found {len(shared)} faces, none where the analyzer found one ({face}); "
                "use a sharper photo, or align by the analyzer's points (landmarks=None)"
            )
        return best[1].points

    def _choose(self, image: Image.Image, name: str) -> Face | None:
        faces = self.analyzer.detect(image)
        if not faces and self.on_no_face == "skip":
            return None
        try:
            return self.analyzer.choose(faces, self.policy)
        except InputError as e:
            raise type(e)(f"{name} ({image.width}x{image.height}): {e}") from e

    def _vision(self, chip: np.ndarray) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        """The tower's results, and the classes of the chip's pixels [1, 512, 512]."""
        x = torch.from_numpy(chip).permute(2, 0, 1)[None].float() / 255
        labels = None if self.parsing is None else self.parsing.labels(x).cpu()
        if labels is not None:
            x = whiten(x, labels)
        weight = self.tower.patch_embed.proj.weight
        pixels = clip_pixels(x, self.tower.config.image_size, self.antialias)
        return *self.tower(pixels.to(weight.device, weight.dtype)), labels

    def _analyzer_name(self) -> str:
        return str(getattr(self.analyzer, "name", type(self.analyzer).__name__))

    def _recogniser(self) -> str | None:
        """Hash of the recogniser's file, where the analyzer names one (`ModelFolderAnalyzer.files`)."""
        file = getattr(self.analyzer, "files", {}).get("recogniser")
        if self._recogniser_hash is None and file is not None:
            self._recogniser_hash = file_hash(file)
        return self._recogniser_hash

    def meta(self) -> dict[str, Any]:
        """What an identity must say about how its photos were read."""
        parsing = None if self.parsing is None else self.parsing.weights_hash or "unknown"
        return {
            "preprocess": VERSION, "face_analyzer": self._analyzer_name(), "recogniser": self._recogniser(),
            "policy": self.policy,
            "vision_tower": self.tower.weights_hash or "unknown", "parsing": parsing,
            "landmarks": None if self.landmarks is None else self.landmarks.weights_hash or "unknown",
            "antialias": self.antialias, "estimator": self.estimator, "max_side": self.max_side,
        }  # fmt: skip

    @classmethod
    def from_weights(
        cls,
        analyzer: FaceAnalyzer,
        eva_clip: str | os.PathLike,
        parsing: str | os.PathLike | None,
        retinaface: str | os.PathLike | None = None,
        **options: Any,
    ) -> PuLIDPreprocess:
        """Load the tower, the parsing network and the landmark detector (without one: the analyzer's landmarks) from
        safetensors files; ``options`` as in the constructor."""
        from idcore.encoders.face_parsing import BiSeNet
        from idcore.encoders.retinaface import RetinaFace

        if retinaface is not None:
            options["landmarks"] = RetinaFace.from_weights(retinaface)
        net = None if parsing is None else BiSeNet.from_weights(parsing)
        return cls(analyzer, EvaClipVisual.from_weights(eva_clip), net, **options)
