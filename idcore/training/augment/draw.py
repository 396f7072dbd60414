"""Pictures of prompts by a base model's few-step sampler, in batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...errors import IdcoreError, InputError
from ..contract import Base, Text
from .options import AugmentConfig


class Drawer:
    """Draws pictures; the same prompt and seed give the same picture, to rounding whatever else is in the batch.

    Args:
        base: any `training.contract.Base`.
        config: size, steps, guidance and batch.

    Raises:
        InputError: a size that the base cannot draw.
    """

    def __init__(self, base: Base, config: AugmentConfig) -> None:
        self.base, self.config = base, config
        self.size = config.size or own_size(base)
        self.shape = base.latent_shape(self.size, self.size)

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """A picture for each prompt and seed. Raises IdcoreError where the base gives NaN or infinity."""
        found: list[Image.Image] = []
        for start in range(0, len(prompts), self.config.batch):
            part = slice(start, start + self.config.batch)
            found += self._batch(prompts[part], seeds[part])
        return found

    @torch.no_grad()
    def _batch(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        base, guided = self.base, self.config.guidance > 1
        noise = [torch.randn(self.shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
        said = [self.config.negative] * len(prompts) + list(prompts) if guided else list(prompts)
        text = base.text(said, self.size, self.size)
        few, memory = base.few_steps(self.config.steps), None
        x = few.start(torch.stack(noise).to(base.device))
        for i, t in enumerate(few.times):
            prediction = self._predict(few.scaled(i, x), t, text)
            x, memory = few.advance(i, x, prediction, memory)
        return as_pictures(base.decode(x), getattr(base, "name", "the base model"))

    def _predict(self, x: Tensor, t: Tensor, text: Text) -> Tensor:
        """Of the UNet, with classifier-free guidance where it is asked for (arXiv 2207.12598, eq. 6 in the form that
        counts from 1)."""
        rows = 2 * len(x) if self.config.guidance > 1 else len(x)
        found = self.base.predict(x.repeat(rows // len(x), 1, 1, 1), t.to(x.device).expand(rows), text)
        if rows == len(x):
            return found
        without, with_text = found.chunk(2)
        return without + self.config.guidance * (with_text - without)


def own_size(base: Base) -> int:
    """Side in pixels that a pipeline's UNet was made for.

    Raises:
        InputError: its configuration does not say.
    """
    side, cell = getattr(getattr(base.unet, "config", None), "sample_size", None), getattr(base, "cell", None)
    if not isinstance(side, int) or cell is None:
        raise InputError(f"augment: the base model does not say its own size ({side!r}); set size, in pixels")
    return side * cell


def as_pictures(pixels: Tensor, who: str) -> list[Image.Image]:
    """[B, 3, H, W] in -1..1 to pictures. Raises IdcoreError for NaN or infinity."""
    if not bool(torch.isfinite(pixels).all()):
        raise IdcoreError(f"augment: {who} drew NaN or infinity; draw in float32 or with less guidance")
    a = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(x)) for x in a]
