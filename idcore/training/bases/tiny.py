"""The embedded model, frozen, as a base for training: 64x64 pixels are the latents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InputError
from ...sampling.few_step import euler_step, noise_levels
from ...sampling.tiny_model import TinyModel
from ...sampling.tiny_pipeline import TinyPipeline
from ..contract import Text
from .text_cache import TextCache


class TinyBase:
    """The embedded 64 px model without an identity of its own; any system may be put on its UNet.

    It predicts the clean picture on the rectified-flow path x_t = (1 - t) x_0 + t n, t from 0 (clean) to 1 (noise).
    The channels through which its own system shows it a reference hold `reference`, always the same.

    Args:
        model: the model; frozen here.
        reference: [1, C, 32, 32]. None: zero, as where its training dropped the identity; it then draws heads without
            faces. `training.tiny.somebody.somebody(model)`: the average of drawn people, a face to change.
    """

    faces_in_one_place = True

    def __init__(self, model: TinyModel, reference: Tensor | None = None) -> None:
        self.name, self.prediction = "idcore tiny", "sample"
        self.model = model.eval().requires_grad_(False)
        size = model.config.size // 2
        self.reference = torch.zeros(1, model.reference_channels, size, size) if reference is None else reference
        self._texts = TextCache(self._encode)

    @classmethod
    def from_package(cls, *, somebody: bool = False) -> TinyBase:
        """The weights that the package ships; `somebody`: with an average face as reference (takes a second)."""
        return cls._of(TinyPipeline.from_package().model, somebody)

    @classmethod
    def from_folder(cls, folder: str | Path, *, somebody: bool = False) -> TinyBase:
        """Weights of `idcore train tiny`. Raises WeightsError as `TinyPipeline.from_folder`."""
        return cls._of(TinyPipeline.from_folder(folder).model, somebody)

    @classmethod
    def _of(cls, model: TinyModel, with_somebody: bool) -> TinyBase:
        from ..tiny.somebody import somebody

        return cls(model, somebody(model) if with_somebody else None)

    @property
    def unet(self) -> nn.Module:
        return self.model.unet

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    def to(self, *args: Any, **kwargs: Any) -> TinyBase:
        """Move or cast, as nn.Module.to."""
        self.model.to(*args, **kwargs)
        self._texts = TextCache(self._encode)
        return self

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Raises InputError for any size but the model's own."""
        size = self.model.config.size
        if (height, width) != (size, size):
            raise InputError(f"the embedded model draws {size}x{size} pixels, got {height}x{width}; set that size")
        return 3, size, size

    def encode_pictures(self, pixels: Tensor) -> Tensor:
        self.latent_shape(*pixels.shape[-2:])
        return pixels.detach().to(self.device, torch.float32)

    def decode(self, latents: Tensor, *, checkpoint: bool = False) -> Tensor:
        """The latents themselves; there is nothing to checkpoint."""
        return latents if latents.dtype == torch.float64 else latents.float()

    def text(self, prompts: Sequence[str], height: int, width: int, sizes: Tensor | None = None) -> Text:
        """`sizes` mean nothing to this model."""
        embeds, pooled = self._texts(prompts)
        return Text(embeds.to(self.device, self.dtype), pooled.to(self.device, self.dtype))

    def _encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        return self.model.text(self.model.tokenizer(prompts).to(self.device))

    def noised(self, latents: Tensor, noise: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Three of five u give one of the four steps' levels, the others any level from 0.02, as the model was
        trained."""
        four = torch.ceil(u / 0.6 * 4).clamp(1, 4) / 4
        t = torch.where(u < 0.6, four, 0.02 + 0.98 * (u - 0.6) / 0.4).to(latents)
        tt = t.view(-1, 1, 1, 1)
        return (1 - tt) * latents + tt * noise.to(latents), t

    def predict(self, x: Tensor, t: Tensor, text: Text) -> Tensor:
        """The clean picture, in x's dtype."""
        reference = self.reference.to(x.device, self.dtype).expand(len(x), -1, -1, -1)
        t = t.to(x.device, self.dtype)
        return self.model(x.to(self.dtype), t, text.embeds, text.pooled, reference).to(x.dtype)

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return latents

    def snr(self, t: Tensor) -> Tensor:
        return ((1 - t) / t) ** 2

    def clean(self, x: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        return prediction

    def few_steps(self, count: int = 4) -> TinySteps:
        return TinySteps(count)


class TinySteps:
    """Euler steps on the rectified-flow path; there is nothing to remember from step to step.

    Raises:
        InputError: a count outside of 1..100.
    """

    def __init__(self, count: int = 4) -> None:
        self.levels = noise_levels(count)
        self.times = torch.tensor(self.levels[:-1])

    def start(self, noise: Tensor) -> Tensor:
        return noise

    def scaled(self, i: int, x: Tensor) -> Tensor:
        return x

    def advance(self, i: int, x: Tensor, prediction: Tensor, memory: Any) -> tuple[Tensor, Any]:
        return euler_step(x, prediction, self.levels[i], self.levels[i + 1]), None
