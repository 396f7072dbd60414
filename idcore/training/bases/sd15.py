"""Stable Diffusion 1.5 and models of its shape, frozen, as a base for training."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ...errors import WeightsError
from ...sampling.loading import dtype_option
from .latent import LatentBase


class SD15Base(LatentBase):
    """diffusers' StableDiffusionPipeline; see `LatentBase` for the arguments."""

    kind = "Stable Diffusion 1.5"

    @classmethod
    def from_pretrained(
        cls,
        base: str | os.PathLike,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        local_files_only: bool = True,
        **options: Any,
    ) -> SD15Base:
        """A folder in diffusers' layout or a hub id; arguments as `SDXLBase.from_pretrained`.

        Raises:
            WeightsError: it is not there or does not load.
        """
        from diffusers import StableDiffusionPipeline

        path = Path(base)
        if path.exists() and not (path / "model_index.json").is_file():
            raise WeightsError(f"{path} has no model_index.json; wanted a pipeline's folder in diffusers' layout")
        try:
            pipe = StableDiffusionPipeline.from_pretrained(
                base, local_files_only=local_files_only, safety_checker=None, **dtype_option(dtype)
            )
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise WeightsError(f"{base} does not load as a Stable Diffusion 1.5 pipeline: {e}") from e
        return cls(pipe.to(device), **{"name": str(base)} | options)
