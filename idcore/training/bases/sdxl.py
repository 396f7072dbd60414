"""SDXL, and few-step models of its shape such as SDXL-Lightning, frozen, as a base for training."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ..contract import Text
from .latent import LatentBase


class SDXLBase(LatentBase):
    """diffusers' StableDiffusionXLPipeline; see `LatentBase` for the arguments."""

    kind = "SDXL"

    @classmethod
    def from_pretrained(
        cls,
        base: str | os.PathLike,
        *,
        unet_weights: str | os.PathLike | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        local_files_only: bool = True,
        **options: Any,
    ) -> SDXLBase:
        """A folder in diffusers' layout or a hub id.

        Args:
            base: the pipeline.
            unet_weights: a whole UNet in one file over the pipeline's own (`sdxl_lightning_4step_unet.safetensors`).
            dtype: of the UNet and the text encoders.
            device: of everything.
            local_files_only: nothing is downloaded unless this is False.
            **options: `sampler`, `vae_dtype`, `name`.

        Raises:
            WeightsError: something is missing or does not load.
        """
        from ...sampling.loading import load_pipeline, load_unet_weights

        pipe = load_pipeline(base, local_files_only=local_files_only, torch_dtype=dtype)
        if unet_weights is not None:
            load_unet_weights(pipe.unet, unet_weights)
            options.setdefault("name", f"{base} with {os.path.basename(unet_weights)}")
        return cls(pipe.to(device), **{"name": str(base)} | options)

    def _encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompts, device=self._encoders()[0].device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return embeds, pooled

    def _conditions(self, embeds: Tensor, pooled: Tensor | None, height: int, width: int, sizes: Tensor | None) -> Text:
        """`sizes` [B, 6]: original height and width, crop's top and left, target height and width. None: the picture
        as it is, not cropped."""
        if sizes is None:
            sizes = torch.tensor([[height, width, 0, 0, height, width]]).expand(len(embeds), -1)
        if sizes.shape != (len(embeds), 6):
            raise InputError(f"training base: sizes must be [{len(embeds)}, 6], got {list(sizes.shape)}")
        return Text(embeds, pooled.to(embeds), {"time_ids": sizes.to(embeds)})

    def _given(self, text: Text) -> dict[str, Any]:
        added = {"text_embeds": text.pooled, "time_ids": text.extra["time_ids"]}
        return {"encoder_hidden_states": text.embeds, "added_cond_kwargs": added}
