"""What PuLID's frozen face networks saw: the input of its identity encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from idcore.errors import InputError


@dataclass(eq=False)
class PuLIDFeatures:
    """Features of n photos of each of B people.

    Attributes:
        id_cond: [B, n, 1280]: ArcFace embedding 512, raw, then CLIP image embedding 768, of length 1.
        hidden: Five hidden states of the vision tower, each [B, n, T, 1024], CLS first.
        meta: Encoder names and hashes, preprocessing; goes into the Identity.
    """

    id_cond: Tensor
    hidden: tuple[Tensor, ...]
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.hidden = tuple(self.hidden)
        if self.id_cond.ndim != 3:
            raise InputError(f"PuLIDFeatures: id_cond must be [B, n, width], got {list(self.id_cond.shape)}")
        for i, h in enumerate(self.hidden):
            if h.ndim != 4 or h.shape[:2] != self.id_cond.shape[:2]:
                raise InputError(
                    f"PuLIDFeatures: hidden[{i}] must be [B, n, T, width] with B and n of id_cond "
                    f"{list(self.id_cond.shape[:2])}, got {list(h.shape)}"
                )
        for name, t in (("id_cond", self.id_cond), *((f"hidden[{i}]", h) for i, h in enumerate(self.hidden))):
            if not bool(torch.isfinite(t).all()):
                raise InputError(f"PuLIDFeatures: {name} holds NaN or infinity; a face network gave no usable output")

    @property
    def n(self) -> int:
        """Photos per person."""
        return self.id_cond.shape[1]

    @classmethod
    def stack(cls, photos: Sequence[PuLIDFeatures]) -> PuLIDFeatures:
        """Several photos of the same B people as one: along n."""
        return cls._join(photos, 1)

    @classmethod
    def batch(cls, people: Sequence[PuLIDFeatures]) -> PuLIDFeatures:
        """Several people, n photos each, as one: along B."""
        return cls._join(people, 0)

    @classmethod
    def _join(cls, parts: Sequence[PuLIDFeatures], dim: int) -> PuLIDFeatures:
        if not parts:
            raise InputError("PuLIDFeatures: wanted at least one to join, got none")
        other = 1 - dim
        sizes = {p.id_cond.shape[other] for p in parts}
        if len(sizes) > 1:
            what = "people" if dim else "photos per person"
            raise InputError(f"PuLIDFeatures: all must have the same number of {what}, got {sorted(sizes)}")
        hidden = tuple(torch.cat(level, dim) for level in zip(*(p.hidden for p in parts)))
        return cls(torch.cat([p.id_cond for p in parts], dim), hidden, dict(parts[0].meta))
