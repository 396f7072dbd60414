"""The accounting of `bench train` against PyTorch's allocator, on a small model whose step really runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..encoders.pulid_features import PuLIDFeatures
from ..systems.pulid import PuLID, PuLIDConfig
from ..systems.pulid_encoders import EncoderConfig
from ..testing.tiny_models import tiny_pipeline
from ..training.bases.sdxl import SDXLBase
from ..training.injection import Injection
from ..training.losses.alignment import AlignmentOptions, alignment_loss
from ..training.through_steps import Through, through_steps
from .live_memory import LiveMemory, allocator_peak

KEPT = Through(checkpoint_steps=False, checkpoint_decode=False)
CHECKED = {"kept": KEPT, "steps and decode recomputed": Through(), "all recomputed": Through(checkpoint_unet=True)}


class SmallStep:
    """A stage-3 step of a small SDXL-shaped pipeline, float32 on the CPU.

    Args:
        size: pixels; a picture cell is 2 px there.
        options: what is recomputed.
    """

    def __init__(self, size: int, options: Through) -> None:
        self.options = options
        self.base = SDXLBase(tiny_pipeline("sdxl"), sampler="dpmpp_2m")
        config = PuLIDConfig.for_unet(self.base.unet, EncoderConfig("v1", 16, 16, 32, 32))
        self.pulid = PuLID(config).train()
        g = torch.Generator().manual_seed(0)
        self.features = PuLIDFeatures(
            torch.randn(1, 1, 16, generator=g), [torch.randn(1, 1, 9, 16, generator=g) for _ in range(5)]
        )
        self.noise = torch.randn(1, *self.base.latent_shape(size, size), generator=g)
        self.text = self.base.text(["portrait"], size, size)
        for p in self.pulid.parameters():
            p.grad = torch.zeros_like(p)

    def __call__(self) -> None:
        with torch.enable_grad(), Injection(self.base.unet, self.pulid) as injection:
            person = injection.person(self.pulid(self.features))
            walk = through_steps(
                self.base, injection, person, self.text, self.noise, self.options, align=AlignmentOptions()
            )
            picture = self.base.decode(walk.latents, checkpoint=self.options.checkpoint_decode)
            loss = picture.square().mean() + alignment_loss(walk.alignment, AlignmentOptions())
            del walk, picture
            loss.backward()


def validation(size: int = 64, names: Sequence[str] = tuple(CHECKED)) -> list[dict[str, Any]]:
    """Peaks of really run steps: by this accounting, and by the CPU allocator's own events."""
    rows = []
    for name in names:
        step = SmallStep(size, CHECKED[name])
        step()  # what is made once
        memory = LiveMemory()
        with memory:
            step()
        measured = allocator_peak(step)
        rows.append(
            {"way": name, "counted_mb": round(memory.peak / 1e6, 2), "allocator_mb": round(measured / 1e6, 2),
             "counted_of_allocator": round(memory.peak / measured, 3)}
        )  # fmt: skip
    return rows
