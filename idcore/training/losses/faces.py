"""Where the face of a generated picture is, and what a differentiable recogniser sees of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ...encoders.align import TEMPLATES, similarity_transform, template, warp_batch
from ...errors import InputError

MEASURES = ("cosine", "squared_l2")

Locate = Callable[[np.ndarray], "np.ndarray | None"]
"""A picture, uint8 RGB [H, W, 3], to its five points [5, 2] in pixels, or None: no face."""


@dataclass(frozen=True, eq=False)
class Recogniser:
    """A frozen, differentiable face recogniser and the chips that it reads.

    Attributes:
        network: chips [N, 3, S, S], RGB in 0..1, to embeddings [N, E].
        template: of the chips, "arcface" or "dlib"; resample: "bilinear" or "bicubic", as in `encoders.align`.
        measure: "cosine": 1 - cos; or "squared_l2": squared Euclidean distance, as dlib's network was trained for.
    """

    network: nn.Module
    template: str
    resample: str
    measure: str

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise InputError(f"L_id: measure must be one of {', '.join(MEASURES)}, got {self.measure!r}")

    @classmethod
    def dlib(cls, weights: str | os.PathLike | None = None, measure: str = "squared_l2") -> Recogniser:
        """The network that the package ships, 128 numbers a face."""
        from ...encoders.dlib_torch import DEFAULT_WEIGHTS, DlibRecogniser

        return cls(_Embedding(DlibRecogniser(Path(weights or DEFAULT_WEIGHTS))), "dlib", "bicubic", measure)

    @classmethod
    def arcface(cls, weights: str | os.PathLike, measure: str = "cosine") -> Recogniser:
        """An IResNet (ArcFace-50 in the paper) from a safetensors file; chips as its published chain cuts them.

        Raises WeightsError where the file is no such network.
        """
        from ...encoders.arcface_torch import IResNet

        return cls(IResNet.from_weights(weights), "arcface", "bilinear", measure)

    def to(self, *args: Any, **kwargs: Any) -> Recogniser:
        """Move or cast the network, as nn.Module.to."""
        self.network.to(*args, **kwargs)
        return self

    def embed(self, pictures: Tensor, points: np.ndarray) -> Tensor:
        """Embeddings [N, E] with gradients to the pictures; the points carry none.

        Args:
            pictures: [N, 3, H, W] float, RGB in -1..1; clipped to that as where pictures are saved.
            points: [N, 5, 2] pixels.
        """
        wanted, size = template(self.template), TEMPLATES[self.template]
        matrices = np.stack([similarity_transform(p, wanted) for p in points])
        grey = (pictures.clamp(-1, 1) + 1) * 127.5
        return self.network(warp_batch(grey, matrices, size, self.resample) / 255)

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """[N], in the recogniser's measure."""
        if self.measure == "squared_l2":
            return (a - b).square().sum(-1)
        return 1 - torch.nn.functional.cosine_similarity(a, b, dim=-1)


class _Embedding(nn.Module):
    """dlib's network without the stages that it also gives."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, chips: Tensor) -> Tensor:
        return self.network(chips).embedding


class DetectedFace:
    """The five points that a face analyser finds in a picture.

    Args:
        analyzer: a `FaceAnalyzer`.
        policy: which of several faces, as in `FaceAnalyzer.choose`.
        enlarge: smaller pictures are enlarged to this many pixels first (64 px pictures of the embedded model hold
            faces that are smaller than detectors look for; our choice).
    """

    def __init__(self, analyzer: Any, policy: str | int = "largest", enlarge: int = 256) -> None:
        self.analyzer, self.policy, self.enlarge = analyzer, policy, enlarge

    def __call__(self, picture: np.ndarray) -> np.ndarray | None:
        image = Image.fromarray(picture)
        scale = max(1.0, self.enlarge / max(image.size))
        if scale > 1:
            size = tuple(round(n * scale) for n in image.size)
            image = image.resize(size, Image.Resampling.BICUBIC)
        faces = self.analyzer.detect(image)
        if not faces:
            return None
        points = np.asarray(self.analyzer.choose(faces, self.policy).points, np.float64)
        return (points + 0.5) * (np.array(picture.shape[1::-1]) / image.size) - 0.5


class FixedFace:
    """The same five points for every picture, where faces are always drawn in one place."""

    def __init__(self, points: Any) -> None:
        self.points = np.asarray(points, np.float64)
        if self.points.shape != (5, 2):
            raise InputError(f"L_id: wanted five points [5, 2], got {list(self.points.shape)}")

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        return self.points


def as_bytes(pictures: Tensor) -> np.ndarray:
    """Pictures [N, 3, H, W] in -1..1 as they are saved, uint8 [N, H, W, 3]; no gradient."""
    grey = ((pictures.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return grey.permute(0, 2, 3, 1).cpu().numpy()
