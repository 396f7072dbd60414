"""tiny-sd, frozen, as a base for training: Stable Diffusion 1.5's layout on 64x64 pictures of drawn people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...sampling.tiny_sd import tiny_sd
from .sd15 import SD15Base


class TinySDBase(SD15Base):
    """`sampling.tiny_sd.tiny_sd()` as a base; all as `SD15Base`, and noise levels as tiny-sd was trained."""

    kind = "tiny-sd"
    faces_in_one_place = True

    @classmethod
    def from_package(cls) -> TinySDBase:
        """The weights that the package ships."""
        return cls(tiny_sd(), name="tiny-sd")

    @classmethod
    def from_folder(cls, folder: str | Path) -> TinySDBase:
        """Weights of `idcore train tiny-sd`."""
        return cls(tiny_sd(folder), name=str(folder))

    @property
    def cell(self) -> int:
        return 4

    def decode(self, latents: Tensor, *, checkpoint: bool = False) -> Tensor:
        """Unfolds; there is nothing to checkpoint."""
        x: Any = self.vae.decode(latents).sample
        return x if x.dtype == torch.float64 else x.float()

    def noised(self, latents: Tensor, noise: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Three of four u give one of the four sampling steps' timesteps, the others any."""
        t = timesteps(u).to(latents.device)
        a, s = self._levels(t, latents)
        return a * latents + s * noise.to(latents), t


# Shares of the four sampling steps; the rest is uniform. Many samples are all noise: who is seen is decided there, and
# a text is learnt from pictures that do not show it (our choice).
LEVELS = ((999, 0.35), (749, 0.2), (499, 0.12), (249, 0.08))


def timesteps(u: Tensor) -> Tensor:
    """int64 [B] of u [B] in 0..1: the timesteps of `LEVELS` by their shares, then uniform in 0..999."""
    taken = sum(share for _, share in LEVELS)
    t = ((u - taken) / (1 - taken) * 1000).floor().clamp(0, 999)
    for level, share in reversed(LEVELS):
        t = torch.where(u < taken, float(level), t)
        taken -= share
    return t.long()
