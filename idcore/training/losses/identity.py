"""L_id: the distance of a generated face to the person's (PuLID, arXiv 2404.16022, equation 6)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError
from .faces import Locate, Recogniser, as_bytes


@dataclass(eq=False)
class IdentityTerm:
    """What `IdentityLoss` found.

    Attributes:
        loss: number with gradient: the distances' sum over the pictures with a face, over all B pictures.
        distance: [B] of each picture in the recogniser's measure, NaN without a face; detached.
        similarity: [B] cosines, likewise.
        found: [B] bool.
    """

    loss: Tensor
    distance: Tensor
    similarity: Tensor
    found: Tensor

    @property
    def missed(self) -> int:
        """Pictures without a face: their terms are left out."""
        return int((~self.found).sum())


class IdentityLoss:
    """The identity term of generated pictures.

    The face is found on the detached picture, its chip cut by the differentiable `align_face`, and the frozen
    recogniser's embedding compared with the person's. A picture without a face has no term (our choice: the paper does
    not say) and is counted in `missed` and `seen`; the sum is still divided by all pictures, so that a global batch
    gives the same loss however it is split.

    Args:
        recogniser: which network judges. The paper takes another one than the encoder reads ("arcface-50").
        locate: finds the five points (`faces.DetectedFace`, `faces.FixedFace`).

    Attributes:
        seen, missed: pictures so far, and those without a face.
    """

    def __init__(self, recogniser: Recogniser, locate: Locate) -> None:
        self.recogniser, self.locate = recogniser, locate
        self.seen = self.missed = 0

    def __call__(self, pictures: Tensor, wanted: Tensor, weight: Tensor | None = None) -> IdentityTerm:
        """The term of B pictures.

        Args:
            pictures: [B, 3, H, W] float, RGB in about -1..1, with gradient.
            wanted: the persons' embeddings by the same recogniser, [B, E] (`reference`).
            weight: factor [B] of each sample, such as 0 where its identity was dropped. None: all 1.

        Raises:
            InputError: shapes do not fit together.
        """
        if wanted.ndim != 2 or len(wanted) != len(pictures):
            raise InputError(f"L_id: wanted embeddings [{len(pictures)}, E], one per picture, got {list(wanted.shape)}")
        located = [self.locate(p) for p in as_bytes(pictures)]
        rows = [i for i, points in enumerate(located) if points is not None]
        self.seen, self.missed = self.seen + len(located), self.missed + len(located) - len(rows)
        nothing = torch.full((len(pictures),), float("nan"), device=pictures.device)
        found = torch.zeros(len(pictures), dtype=torch.bool, device=pictures.device)
        distance, similarity = nothing, nothing.clone()
        if not rows:  # a sum over nothing: 0, and differentiable
            return IdentityTerm(pictures.flatten()[:0].sum(), distance, similarity, found)
        found[rows] = True
        target = wanted[rows].to(pictures.device)
        got = self.recogniser.embed(pictures[rows], np.stack([located[i] for i in rows]))
        each = self.recogniser.distance(got, target.to(got.dtype))
        with torch.no_grad():
            distance[rows] = each.to(distance)
            similarity[rows] = torch.nn.functional.cosine_similarity(got, target.to(got.dtype), dim=-1).to(similarity)
        if weight is not None:
            each = each * weight[rows].to(each)
        return IdentityTerm(each.sum() / len(pictures), distance, similarity, found)

    @torch.no_grad()
    def reference(self, pictures: Tensor, points: Tensor | np.ndarray | None = None) -> tuple[Tensor, Tensor]:
        """Embeddings of the persons' own pictures.

        Args:
            pictures: [B, 3, H, W] float, RGB in -1..1.
            points: [B, 5, 2] pixels, where they are known; None: found here.

        Returns:
            (embeddings [B, E], found bool [B]); rows without a face are 0.
        """
        if points is None:
            located = [self.locate(p) for p in as_bytes(pictures)]
        else:
            located = list(np.asarray(torch.as_tensor(points).cpu(), np.float64))
        rows = [i for i, p in enumerate(located) if p is not None]
        found = torch.zeros(len(pictures), dtype=torch.bool, device=pictures.device)
        if not rows:
            raise InputError(f"L_id: none of the {len(pictures)} reference pictures holds a face")
        found[rows] = True
        embedded = self.recogniser.embed(pictures[rows], np.stack([located[i] for i in rows]))
        result = embedded.new_zeros(len(pictures), embedded.shape[1])
        result[rows] = embedded
        return result, found
