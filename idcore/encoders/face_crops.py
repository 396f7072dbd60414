"""Photos to the aligned face pixels that a face ViT reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from idcore.encoders.align import TEMPLATES, align, similarity_transform
from idcore.encoders.align import template as points_of
from idcore.encoders.analyzer import find_face
from idcore.encoders.face import Policy
from idcore.encoders.images import ImageLike
from idcore.errors import InputError
from idcore.ops.align_face import align_face

if TYPE_CHECKING:
    from idcore.encoders.analyzer import FaceAnalyzer


class FaceCrops:
    """Photos of one person to pixels [n, 3, S, S], RGB in -1..1.

    Args:
        size: S, side in pixels.
        analyzer: Finds faces; default the embedded one.
        policy: Which face, as in `idcore.encoders.face.choose`.
        template: How the face is cut out: "arcface", "ffhq", "dlib" or "head" (our choice: "arcface", the crop of face
            recognisers).
    """

    def __init__(
        self,
        size: int,
        analyzer: FaceAnalyzer | None = None,
        *,
        policy: Policy = "largest",
        template: str = "arcface",
    ) -> None:
        if template not in TEMPLATES:
            raise InputError(f"FaceCrops: template must be one of {', '.join(TEMPLATES)}, got {template!r}")
        self.size, self.analyzer, self.policy, self.template = size, analyzer, policy, template

    def __call__(self, photos: ImageLike | Sequence[ImageLike]) -> Tensor:
        """Pixels [n, 3, S, S] float32.

        Raises:
            NoFaceError, SeveralFacesError, InputError: see `idcore.encoders.analyzer.find_face`.
        """
        photos = list(photos) if isinstance(photos, (list, tuple)) else [photos]
        if not photos:
            raise InputError("FaceCrops: wanted at least one photo, got an empty list")
        return torch.stack([self._one(photo) for photo in photos])

    def _one(self, photo: ImageLike) -> Tensor:
        picture, face = find_face(photo, self.analyzer, policy=self.policy)
        chip = align(picture, face.points, self.template, self.size)
        return torch.from_numpy(chip).permute(2, 0, 1).float() / 127.5 - 1


def crops_of(images: Tensor, points: Tensor, size: int, template: str = "arcface") -> Tensor:
    """The same of pictures whose landmarks are known, for training.

    Args:
        images: [B, 3, H, W] float, RGB in -1..1; rounded to grey levels, as photos have.
        points: landmarks [B, 5, 2] in their pixels.
        size, template: as in `FaceCrops`.

    Returns:
        Pixels [B, 3, S, S] float32 in -1..1 on the CPU, no gradient; black outside of a picture.
    """
    wanted = points_of(template, size)
    matrices = np.stack([similarity_transform(p, wanted) for p in points.double().cpu().numpy()])
    grey = ((images.detach().cpu().clamp(-1, 1) + 1) * 127.5 + 0.5).to(torch.uint8).permute(0, 2, 3, 1)
    return align_face(grey, matrices, size, dtype=torch.float32, mean=127.5, std=127.5)
