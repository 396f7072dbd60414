"""What the adapters of the IP-Adapter family read of photos: face embeddings, and image tokens for the Plus forms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from idcore.encoders.align import align
from idcore.encoders.eva_clip import CLIP_MEAN, CLIP_STD
from idcore.encoders.images import ImageLike, load_image
from idcore.errors import InputError, NoFaceError

if TYPE_CHECKING:
    from PIL import Image

    from idcore.encoders.analyzer import FaceAnalyzer
    from idcore.encoders.face import Face


@dataclass
class FaceFeatures:
    """Features of n photos of each of B people.

    Attributes:
        embeds: [B, n, D] float, face embeddings.
        clip: [B, n, T, W] float, image tokens, or None for adapters that read none.
        uncond_embeds: As `embeds`, what stands for "no face"; None: zeros, as published.
        uncond_clip: [1, 1, T, W], image tokens of a picture of zeros; None: zeros in place of them.
        meta: Plain values for the identity's file.
    """

    embeds: Tensor
    clip: Tensor | None = None
    uncond_embeds: Tensor | None = None
    uncond_clip: Tensor | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        e, c = self.embeds, self.clip
        if e.ndim != 3 or 0 in e.shape or not e.is_floating_point():
            raise InputError(
                f"FaceFeatures: embeds must be floating [B, n, D] (n photos of B people), got {list(e.shape)} {e.dtype}"
            )
        if c is not None and (c.ndim != 4 or c.shape[:2] != e.shape[:2] or 0 in c.shape):
            raise InputError(
                f"FaceFeatures: clip must be [B, n, T, W] with B, n = {list(e.shape[:2])}, got {list(c.shape)}"
            )
        u = self.uncond_embeds
        if u is not None and u.shape != e.shape:
            raise InputError(f"FaceFeatures: uncond_embeds must be {list(e.shape)} as embeds, got {list(u.shape)}")

    @property
    def n(self) -> int:
        """Photos per person."""
        return self.embeds.shape[1]


class FacePreprocess:
    """Photos of one person to :class:`FaceFeatures`.

    Args:
        analyzer: Finds the face and gives its embedding. FaceID was trained on buffalo_l, InstantID on antelopev2
            (`ModelFolderAnalyzer(folder)` reads both).
        normalise: Divide the embedding by its length: FaceID does, InstantID does not.
        tower: For the Plus forms: a `transformers` CLIPVisionModel(WithProjection), CLIP ViT-H/14.
        policy: Which face, as in `FaceAnalyzer.choose`.
        id_dim: Width wanted of the embedding.
    """

    def __init__(
        self,
        analyzer: FaceAnalyzer,
        *,
        normalise: bool,
        tower: nn.Module | None = None,
        policy: str | int = "largest",
        id_dim: int = 512,
    ) -> None:
        self.analyzer, self.normalise, self.tower = analyzer, normalise, tower
        self.policy, self.id_dim = policy, id_dim

    def __call__(self, photos: ImageLike | Sequence[ImageLike]) -> FaceFeatures:
        """Features [1, n, ...] of n photos (paths, PIL images or uint8 RGB arrays).

        Raises:
            NoFaceError, SeveralFacesError: naming the photo.
            InputError: no photos, or an embedding of another width.
        """
        photos = list(photos) if isinstance(photos, (list, tuple)) else [photos]
        if not photos:
            raise InputError("FacePreprocess: wanted at least one photo, got an empty list")
        found = [self._one(photo, i) for i, photo in enumerate(photos)]
        embeds = torch.stack([e for e, _ in found])[None]
        clip = torch.stack([c for _, c in found])[None] if self.tower is not None else None
        uncond = None if clip is None else self._look(torch.zeros(1, 3, self._side(), self._side()))[None]
        name = str(getattr(self.analyzer, "name", type(self.analyzer).__name__))
        return FaceFeatures(embeds, clip, None, uncond, {"face_analyzer": name, "policy": self.policy})

    def points(self, photo: ImageLike) -> np.ndarray:
        """Five points of the face, as `Face.points`, float32 [5, 2]. Raises NoFaceError, SeveralFacesError."""
        return self._face(load_image(photo), 0).points

    def _face(self, image: Image.Image, number: int) -> Face:
        faces = self.analyzer.detect(image)
        if not faces:
            raise NoFaceError(
                f"FacePreprocess: no face in photo {number + 1} ({image.width}x{image.height}); use one in which a "
                "face is upright, lit and not cut off"
            )
        return self.analyzer.choose(faces, self.policy)

    def _one(self, photo: ImageLike, number: int) -> tuple[Tensor, Tensor | None]:
        image = load_image(photo)
        face = self._face(image, number)
        embedding = np.asarray(self.analyzer.embed(image, face), np.float32).reshape(-1)
        if embedding.size != self.id_dim:
            raise InputError(
                f"FacePreprocess: wanted a face embedding of {self.id_dim} numbers, the analyzer gives "
                f"{embedding.size}; the published weights need an ArcFace of InsightFace (buffalo_l, antelopev2)"
            )
        if self.normalise:
            embedding = embedding / max(float(np.linalg.norm(embedding)), 1e-12)
        return torch.from_numpy(embedding), None if self.tower is None else self._tokens(image, face)

    def _side(self) -> int:
        return int(self.tower.config.image_size)

    def _tokens(self, image: Image.Image, face: Face) -> Tensor:
        """Image tokens [T, W] of the face cut out with ArcFace's template, as published."""
        chip = align(image, face.points, "arcface", self._side(), plain=True)
        x = torch.from_numpy(chip).permute(2, 0, 1)[None].float() / 255
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
        return self._look((x - mean) / std)[0]

    @torch.no_grad()
    def _look(self, pixels: Tensor) -> Tensor:
        """Tokens before the tower's last layer. [N, 3, S, S] -> [N, T, W] float32"""
        p = next(self.tower.parameters())
        seen = self.tower(pixels.to(p.device, p.dtype), output_hidden_states=True)
        return seen.hidden_states[-2].float().cpu()
