"""Latents to pictures with SDXL's autoencoder, safe in 16 bit."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LatentDecoder:
    """Decodes latents [B, 4, h, w] to pictures [B, 3, H, W] in about -1..1.

    SDXL's published autoencoder overflows in float16 (its configuration says so: `force_upcast`). diffusers turns such
    weights to float32 and back around every call; here they are turned once, for good.

    Args:
        vae: diffusers' AutoencoderKL; its weights change dtype and memory format.
        dtype: "auto": as the weights are, but float32 where they are float16 and the configuration forces an upcast;
            or "float32", "bfloat16", "float16". With float16 a result that is not finite is decoded again in float32,
            with a warning, and the weights stay so.
        channels_last: weights and activations in that order, the faster one for convolutions.

    Raises:
        InputError: unknown dtype, or weights that are offloaded layer by layer and would have to change.
    """

    def __init__(self, vae: nn.Module, dtype: str = "auto", channels_last: bool = True) -> None:
        if dtype != "auto" and dtype not in DTYPES:
            raise InputError(f"vae_dtype must be auto, {', '.join(DTYPES)}, got {dtype!r}")
        wanted = vae.dtype if dtype == "auto" else DTYPES[dtype]
        if dtype == "auto" and wanted == torch.float16 and vae.config.force_upcast:
            wanted = torch.float32
        self.vae = vae
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        if wanted != vae.dtype:
            self._turn(wanted)
        if not _streamed(vae):
            vae.to(memory_format=self.format)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.vae.parameters()).dtype  # diffusers' own property walks through all modules

    def __call__(self, latents: Tensor) -> Tensor:
        """Pictures in the dtype of the autoencoder, on its device."""
        pictures = self._decode(latents)
        if self.dtype == torch.float16 and not bool(torch.isfinite(pictures).all()):
            warnings.warn(
                "the autoencoder overflowed in float16; it runs in float32 from now on (give vae_dtype='float32' or "
                "'bfloat16', or weights that are made for float16)",
                stacklevel=2,
            )
            self._turn(torch.float32)
            pictures = self._decode(latents)
        return pictures

    def _turn(self, dtype: torch.dtype) -> None:
        if _streamed(self.vae):
            raise InputError(
                f"the autoencoder's weights come layer by layer (sequential offload) in {self.dtype} and cannot turn "
                f"to {dtype}; give vae_dtype together with offload: IDPipeline.from_pretrained turns them"
            )
        self.vae.to(dtype=dtype)

    def _decode(self, latents: Tensor) -> Tensor:
        x = _unscaled(latents.to(self.dtype), self.vae.config).to(memory_format=self.format)
        return self.vae.decode(x, return_dict=False)[0]


def _streamed(module: nn.Module) -> bool:
    return any(p.is_meta for p in module.parameters())


def _unscaled(latents: Tensor, config: Any) -> Tensor:
    """Latents as the encoder made them."""
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is None or std is None:
        return latents / config.scaling_factor
    mean, std = (torch.tensor(v).view(1, -1, 1, 1).to(latents) for v in (mean, std))
    return latents * std / config.scaling_factor + mean
