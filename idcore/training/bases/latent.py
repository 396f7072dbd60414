"""Frozen diffusers pipelines as bases for training: what Stable Diffusion 1.5 and SDXL have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InputError
from ..contract import Text
from .decoding import decode_in_parts
from .text_cache import TextCache, check_prompts
from .trailing import PREDICTIONS, DpmSteps, EulerSteps, trailing_steps


class LatentBase:
    """UNet, autoencoder and text encoders of a diffusers pipeline, all frozen; prompts are encoded once.

    Args:
        pipe: the pipeline; its modules are frozen here and set to eval mode.
        sampler: of `few_steps`: "euler" or "dpmpp_2m".
        vae_dtype: None: the UNet's, but float32 where that is float16 and the autoencoder overflows in it
            (`force_upcast`).
        name: for checkpoints and model cards; default: where the pipeline was loaded from.

    Raises:
        InputError: an inpainting UNet or another number of latent channels than the autoencoder has, or an unknown
            prediction type.
    """

    kind = ""

    def __init__(
        self,
        pipe: Any,
        *,
        sampler: str = "euler",
        vae_dtype: torch.dtype | None = None,
        name: str | None = None,
    ) -> None:
        self.pipe, self.sampler = pipe, sampler
        self.unet: nn.Module = pipe.unet
        self.vae: nn.Module = pipe.vae
        self.name = name or str(getattr(pipe, "_name_or_path", "") or pipe.config.get("_name_or_path") or self.kind)
        for module in (self.unet, self.vae, *self._encoders()):
            module.requires_grad_(False).eval()
        config = pipe.scheduler.config
        self.prediction = config.prediction_type
        self._check()
        if vae_dtype is None:
            overflows = self.dtype == torch.float16 and getattr(self.vae.config, "force_upcast", False)
            vae_dtype = torch.float32 if overflows else self.dtype
        if self.vae.dtype != vae_dtype:
            self.vae.to(vae_dtype)
        self._products = pipe.scheduler.alphas_cumprod.detach().double().clone()
        self._texts = TextCache(self._encode)

    def _encoders(self) -> list[nn.Module]:
        found = (getattr(self.pipe, name, None) for name in ("text_encoder", "text_encoder_2"))
        return [m for m in found if m is not None]

    def _check(self) -> None:
        latents, inputs = self.vae.config.latent_channels, self.unet.config.in_channels
        if latents != inputs:
            raise InputError(
                f"training base: the UNet reads {inputs} channels, the autoencoder gives {latents}; wanted a "
                "text-to-image model (no inpainting UNet)"
            )
        if self.prediction not in PREDICTIONS:
            raise InputError(
                f"training base: prediction_type must be one of {', '.join(PREDICTIONS)}, got {self.prediction!r}"
            )

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def cell(self) -> int:
        """Pixels per side of a latent cell."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> LatentBase:
        """Move everything; `dtype` casts the UNet and the text encoders (the autoencoder keeps its own)."""
        for module in (self.unet, *self._encoders()):
            module.to(device=device, dtype=dtype)
        self.vae.to(device=device)
        if dtype is not None:
            self._texts = TextCache(self._encode)  # rows on disk are of the former dtype: `use_texts` again
        return self

    # -- pictures and latents -----------------------------------------------------------------------------

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Raises InputError unless both are multiples of the latent cell times the UNet's own shrinking."""
        unit = self.cell * 2 ** (len(self.unet.config.block_out_channels) - 1)
        if height < unit or width < unit or height % unit or width % unit:
            raise InputError(f"training base: height and width must be multiples of {unit}, got {height}x{width}")
        return self.vae.config.latent_channels, height // self.cell, width // self.cell

    @torch.no_grad()
    def encode_pictures(self, pixels: Tensor) -> Tensor:
        """The mean of the autoencoder's distribution, so that latents may be cached (our choice)."""
        self.latent_shape(*pixels.shape[-2:])
        x = pixels.to(self.vae.device, self.vae.dtype)
        latents = self.vae.encode(x).latent_dist.mode().float()
        mean, std = self._latent_moments(latents)
        return (latents - mean) * self.vae.config.scaling_factor / std

    def decode(self, latents: Tensor, *, checkpoint: bool = False) -> Tensor:
        mean, std = self._latent_moments(latents)
        x = latents * std / self.vae.config.scaling_factor + mean
        pictures = decode_in_parts(self.vae, x.to(self.vae.device, self.vae.dtype), checkpoint=checkpoint)
        return pictures if pictures.dtype == torch.float64 else pictures.float()

    def _latent_moments(self, like: Tensor) -> tuple[Any, Any]:
        config = self.vae.config
        if getattr(config, "latents_mean", None) is None or getattr(config, "latents_std", None) is None:
            return 0.0, 1.0
        return tuple(torch.tensor(v).view(1, -1, 1, 1).to(like) for v in (config.latents_mean, config.latents_std))

    # -- text -----------------------------------------------------------------------------------------------

    @property
    def texts(self) -> TextCache:
        """Encoded prompts."""
        return self._texts

    def use_texts(self, stored: Any) -> LatentBase:
        """Take encoded captions from disk (`data.texts.DiskTexts`), and move the text encoders to main memory.

        Raises:
            InputError: they are of other text encoders, or of another dtype.
        """
        stored.check_base(self)
        self._texts.stored = stored
        self.release_text_encoders()
        return self

    def text(self, prompts: Sequence[str], height: int, width: int, sizes: Tensor | None = None) -> Text:
        embeds, pooled = self._texts(prompts)
        return self._conditions(embeds.to(self.device, self.dtype), pooled, height, width, sizes)

    def text_live(self, prompts: Sequence[str], height: int, width: int, sizes: Tensor | None = None) -> Text:
        """As `text`, but encoded anew at every call and with gradients: into words that are learned (inside of
        `systems.words.words_in(base.pipe, ...)`), or into a text encoder that trains."""
        check_prompts(prompts)
        embeds, pooled = self._encode(list(prompts))
        return self._conditions(embeds.to(self.device, self.dtype), pooled, height, width, sizes)

    def _conditions(self, embeds: Tensor, pooled: Tensor | None, height: int, width: int, sizes: Tensor | None) -> Text:
        return Text(embeds)

    def _encode(self, prompts: list[str]) -> tuple[Tensor, Tensor | None]:
        device = self._encoders()[0].device
        return self.pipe.encode_prompt(prompts, device, 1, False)[0], None

    def release_text_encoders(self) -> None:
        """Move the text encoders to main memory, once the prompts that matter are cached (`text` caches). A prompt that
        comes later is encoded there, slowly."""
        for module in self._encoders():
            module.to("cpu")

    # -- the noise ------------------------------------------------------------------------------------------

    def noised(self, latents: Tensor, noise: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """All timesteps alike, as these models are trained."""
        t = (u.double() * len(self._products)).long().clamp(max=len(self._products) - 1).to(latents.device)
        a, s = self._levels(t, latents)
        return a * latents + s * noise.to(latents), t

    def _levels(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Factors [B, 1, 1, 1] of the clean latents and of the noise."""
        product = self._products.to(t.device)[t.round().long()].view(-1, 1, 1, 1)
        wide = torch.promote_types(like.dtype, torch.float32)
        return product.sqrt().to(like.device, wide), (1 - product).sqrt().to(like.device, wide)

    def predict(self, x: Tensor, t: Tensor, text: Text) -> Tensor:
        """In x's dtype."""
        return self.unet(x.to(self.dtype), t, **self._given(text)).sample.to(x.dtype)

    def _given(self, text: Text) -> dict[str, Any]:
        return {"encoder_hidden_states": text.embeds}

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return latents
        a, s = self._levels(t, latents)
        return a * noise - s * latents

    def snr(self, t: Tensor) -> Tensor:
        product = self._products.to(t.device)[t.round().long()]
        return (product / (1 - product)).float()

    def clean(self, x: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        if self.prediction == "sample":
            return prediction
        a, s = self._levels(t, x)
        if self.prediction == "epsilon":
            return (x - s * prediction) / a
        return a * x - s * prediction

    def few_steps(self, count: int = 4) -> EulerSteps | DpmSteps:
        """Trailing steps; good pictures need a few-step UNet (SDXL-Lightning)."""
        return trailing_steps(self.pipe.scheduler.config, count, self.sampler)
