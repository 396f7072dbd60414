"""What PuLID's identity encoder reads, taken from the embedded recogniser in place of ArcFace and a vision tower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from idcore.encoders.align import DLIB_PADDING, align
from idcore.encoders.analyzer import EmbeddedAnalyzer, default_analyzer
from idcore.encoders.dlib_resnet import DlibOutput, DlibResnet
from idcore.encoders.face import Face, Policy
from idcore.encoders.images import ImageLike, load_image
from idcore.encoders.onnx_runtime import asset, sha256_of
from idcore.encoders.pulid_features import PuLIDFeatures
from idcore.errors import InputError, NoFaceError

VERSION = "dlib-tokens-1"  # changes when the same face would give other features
GRID = 8
WIDTH = 256
WIDE_PADDING = 0.6
# Mean and deviation of the five pooled stages in the wide frame, and deviation of the embedding, over 150 drawn
# people; of a photo they are much the same (our choice).
STAGE_MEAN = (1.163, 0.714, 0.858, 1.110, 1.153)
STAGE_STD = (0.749, 0.686, 0.822, 0.869, 0.635)
EMBEDDING_STD = 0.118


def tokens_of(output: DlibOutput) -> list[Tensor]:
    """Five [N, 65, 256] float32: a mean token, then an 8x8 grid in rows, of each stage; narrow stages end in zeros."""
    found = []
    for maps, mean, std in zip(output.feats, STAGE_MEAN, STAGE_STD):
        x = torch.from_numpy(maps)
        if x.shape[-1] > GRID:
            x = F.adaptive_avg_pool2d(x, GRID)
        else:
            x = F.interpolate(x, (GRID, GRID), mode="bilinear", align_corners=False)
        x = ((x - mean) / std).flatten(2).mT
        x = torch.cat([x.mean(1, keepdim=True), x], 1)
        found.append(F.pad(x, (0, WIDTH - x.shape[-1])))
    return found


class DlibTokens:
    """Photos of one person to :class:`PuLIDFeatures` of the embedded recogniser, all offline.

    The embedding (128 numbers, deviation about 1) comes from the chip that the recogniser was trained on, the stages'
    outputs from a wider one that shows the hair. Both for inference (call it with photos) and, as a face feature
    provider, for `idcore prepare`.

    Args:
        analyzer: finds the faces; its recogniser reads them.
        policy: which face of a photo counts, as in `FaceAnalyzer.choose`.
    """

    name = "dlib-tokens"
    id_width, width, count = 128, WIDTH, GRID * GRID + 1

    def __init__(self, analyzer: EmbeddedAnalyzer | None = None, *, policy: Policy = "largest") -> None:
        self.analyzer = analyzer or default_analyzer()
        if not isinstance(self.analyzer.recogniser, DlibResnet):
            raise InputError(f"DlibTokens reads the embedded recogniser; {self.analyzer.name} has another one")
        self.policy = policy

    @property
    def hash(self) -> str:
        """Of the recogniser's weights and of how they are read."""
        return f"{VERSION}:{sha256_of(asset('dlib_resnet.onnx'))}"

    def meta(self) -> dict[str, Any]:
        """What an identity must say about how its photos were read."""
        return {
            "preprocess": VERSION, "face_analyzer": self.analyzer.name, "policy": self.policy,
            "recogniser": f"sha256:{sha256_of(asset('dlib_resnet.onnx'))}",
        }  # fmt: skip

    def features(self, picture: Image.Image, face: Face) -> dict[str, Tensor]:
        """`id_cond` [1, 128] and `hidden.0` to `hidden.4` [1, 65, 256], float32, of one face in an RGB picture."""
        size = self.analyzer.recogniser.size
        tight, wide = (align(picture, face.points, "dlib", size, padding) for padding in (DLIB_PADDING, WIDE_PADDING))
        embedding = torch.from_numpy(self.analyzer.recogniser.embed(tight[None])) / EMBEDDING_STD
        stages = tokens_of(self.analyzer.recogniser.features(wide[None]))
        return {"id_cond": embedding, **{f"hidden.{i}": s for i, s in enumerate(stages)}}

    def __call__(self, photos: ImageLike | Sequence[ImageLike]) -> PuLIDFeatures:
        """Features [1, n, ...] of n photos of one person.

        Raises:
            NoFaceError, SeveralFacesError: from the analyzer, naming the photo.
            InputError: no photos.
        """
        photos = list(photos) if isinstance(photos, (list, tuple)) else [photos]
        if not photos:
            raise InputError("DlibTokens: wanted at least one photo, got an empty list")
        return PuLIDFeatures.stack([self._one(photo, i) for i, photo in enumerate(photos)])

    def _one(self, photo: ImageLike, number: int) -> PuLIDFeatures:
        picture = load_image(photo)
        faces = self.analyzer.detect(picture)
        if not faces:
            raise NoFaceError(
                f"DlibTokens: no face in photo {number + 1} ({picture.width}x{picture.height}); use one in which a "
                "face is upright, lit and not cut off"
            )
        found = self.features(picture, self.analyzer.choose(faces, self.policy))
        hidden = tuple(found[f"hidden.{i}"][:, None] for i in range(len(STAGE_STD)))
        return PuLIDFeatures(found["id_cond"][:, None], hidden, self.meta())
