"""A photo redrawn in a style (SDEdit, arXiv 2108.01073): noise is added to it, and the prompt takes it back.

What StyleForge (arXiv 2404.05256) does to input photos; works with any LoRA or full model that is loaded.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import torch
from PIL import Image

from ..attach import attach
from ..encoders.images import ImageLike, load_image
from ..errors import InputError
from .id_pipeline import IDPipeline

MULTIPLE = 8  # sides that an SDXL autoencoder takes


@torch.no_grad()
def stylise(
    pipe: IDPipeline,
    photo: ImageLike,
    prompt: str,
    *,
    strength: float = 0.6,
    negative_prompt: str | None = None,
    identity: Any = None,
    id_scale: float = 0.8,
    num_inference_steps: int = 4,
    guidance_scale: float = 1.0,
    long_side: int | None = None,
    seed: int = 0,
) -> Image.Image:
    """The photo, redrawn.

    Args:
        pipe: its components, sampler and system are used; its own calls stay as they are.
        photo: path, PIL picture or uint8 RGB array.
        prompt: e.g. "a photo of [V] style, a man in a garden".
        strength: 0 (excluded) to 1: the share of the run that is drawn anew. Our choice of default.
        negative_prompt, guidance_scale: as in `IDPipeline`; up to 1 no guidance.
        identity: an `Identity` of the photo's person, which keeps the person where strength is large; or None.
        id_scale: its strength.
        num_inference_steps: of the whole run; about strength times as many are taken, at least 1.
        long_side: of the result in pixels; default the photo's. Sides are cut to multiples of 8.
        seed: of the noise.

    Raises:
        InputError: an argument that does not fit; the text says which.
    """
    from diffusers import StableDiffusionXLImg2ImgPipeline

    if not isinstance(pipe, IDPipeline):
        raise InputError(f"stylise: wanted an IDPipeline, got {type(pipe).__name__}; wrap it: IDPipeline(pipe, system)")
    if not 0 < strength <= 1:
        raise InputError(f"stylise: strength is above 0 and at most 1, got {strength!r}")
    if int(num_inference_steps * strength) < 1:
        least = next(n for n in itertools.count(num_inference_steps) if int(n * strength) >= 1)
        raise InputError(
            f"stylise: strength {strength} of {num_inference_steps} steps is less than one; give a larger strength, or "
            f"at least {least} steps"
        )
    if identity is not None and pipe.system is None:
        raise InputError("stylise: the pipeline has no system to use an identity with; give it one, e.g. idcore.PuLID")
    picture = _sized(load_image(photo), long_side)
    parts = dict(pipe.pipe.components) | {"scheduler": type(pipe.scheduler).from_config(pipe.scheduler.config)}
    with pipe._lock:
        pipe.forget_identity()
        redraw = StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False)
        redraw.set_progress_bar_config(disable=True)
        on = contextlib.nullcontext()
        if identity is not None:
            on = attach(redraw, pipe.system, identity, id_scale=id_scale)
        with on:
            return redraw(
                prompt, image=picture, strength=strength, negative_prompt=negative_prompt,
                guidance_scale=guidance_scale, num_inference_steps=num_inference_steps,
                generator=torch.Generator().manual_seed(seed),
            ).images[0]  # fmt: skip


def _sized(picture: Image.Image, long_side: int | None) -> Image.Image:
    scale = 1.0 if long_side is None else long_side / max(picture.size)
    size = tuple(int(s * scale + 1e-6) // MULTIPLE * MULTIPLE for s in picture.size)
    if min(size) < MULTIPLE:
        raise InputError(
            f"stylise: a picture of {picture.width}x{picture.height} at long_side {long_side} has a side of less than "
            f"{MULTIPLE} pixels; take a larger one"
        )
    return picture if size == picture.size else picture.resize(size, Image.Resampling.LANCZOS)
