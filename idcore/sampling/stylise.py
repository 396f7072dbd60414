"""A photo redrawn in a style (SDEdit, arXiv 2108.01073): noise is added to it, and the prompt takes it back.

What StyleForge (arXiv 2404.05256) does to input photos; on any base model, with any LoRA or full model that is loaded.
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

MULTIPLE = 8  # sides that the autoencoders take
ID_SCALE = 0.8  # of an identity in the attention; our choice


@torch.no_grad()
def stylise(
    pipe: Any,
    photo: ImageLike,
    prompt: str,
    *,
    strength: float = 0.6,
    negative_prompt: str | None = None,
    identity: Any = None,
    system: Any = None,
    id_scale: Any = None,
    num_inference_steps: int = 4,
    guidance_scale: float = 1.0,
    long_side: int | None = None,
    seed: int = 0,
) -> Image.Image:
    """The photo, redrawn.

    Args:
        pipe: a pipeline of diffusers (SD 1.x, SD 2.x, SDXL; `tiny_sd()`), text-to-image or image-to-image, or an
            `IDPipeline`. Its components and sampler are used, its own calls stay as they are. Several people, regions:
            put them on `redrawer(pipe)` with `idcore.attach`, and give that.
        photo: path, PIL picture or uint8 RGB array.
        prompt: e.g. "a photo of [V] style, a man in a garden".
        strength: 0 (excluded) to 1: the share of the run that is drawn anew. Our choice of default.
        negative_prompt, guidance_scale: as in `IDPipeline`; up to 1 no guidance.
        identity: an `Identity` of the photo's person, which keeps the person where strength is large; or None. One that
            acts through the prompt is named there.
        system: what puts it on, as `idcore.attach` takes it; default the `IDPipeline`'s, else what the identity needs.
        id_scale: its strength; default 0.8 in the attention, 1 in the prompt.
        num_inference_steps: of the whole run; about strength times as many are taken, at least 1.
        long_side: of the result in pixels; default the photo's. Sides are cut to multiples of 8.
        seed: of the noise.

    Raises:
        InputError: an argument that does not fit; the text says which.
    """
    check_strength(strength, num_inference_steps)
    picture = sized(load_image(photo), long_side)
    with contextlib.ExitStack() as on:
        if isinstance(pipe, IDPipeline):
            on.enter_context(pipe._lock)
            pipe.forget_identity()
            system = system or pipe.system
        redraw = redrawer(pipe)
        if redraw is not pipe:
            redraw.set_progress_bar_config(disable=True)
        if identity is not None:
            on.enter_context(_put_on(redraw, system, identity, id_scale))
        return redraw(
            prompt, image=picture, strength=strength, negative_prompt=negative_prompt, guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps, generator=torch.Generator().manual_seed(seed),
        ).images[0]  # fmt: skip


def _put_on(redraw: Any, system: Any, identity: Any, id_scale: Any) -> Any:
    from ..systems.loading import system_for

    own = system_for(identity)  # of people who act through the prompt
    if id_scale is None:
        id_scale = ID_SCALE if own is None else 1.0
    return attach(redraw, system if own is None else own, identity, id_scale=id_scale)


def redrawer(pipe: Any) -> Any:
    """The image-to-image pipeline of diffusers over a pipeline's components; one that is one already unchanged.

    Args:
        pipe: of diffusers (SD 1.x, SD 2.x, SDXL), or an `IDPipeline`, whose sampler it gets.

    Raises:
        InputError: another pipeline, or none.
    """
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline

    if isinstance(pipe, (StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline)):
        return pipe
    inner = pipe.pipe if isinstance(pipe, IDPipeline) else pipe
    kind = type(inner).__name__
    if kind not in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
        raise InputError(
            f"stylise: wanted an IDPipeline, or diffusers' StableDiffusionPipeline or StableDiffusionXLPipeline (or "
            f"their Img2Img forms), got {kind}"
        )
    parts = dict(inner.components) | {"scheduler": type(pipe.scheduler).from_config(pipe.scheduler.config)}
    if kind == "StableDiffusionXLPipeline":
        made = StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=inner.watermark is not None)
    else:
        made = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    made.set_progress_bar_config(**getattr(inner, "_progress_bar_config", {}))
    return made


def check_strength(strength: float, steps: int) -> None:
    """Raise InputError unless at least one of the steps is drawn anew."""
    if not 0 < strength <= 1:
        raise InputError(f"stylise: strength is above 0 and at most 1, got {strength!r}")
    if int(steps * strength) < 1:
        least = next(n for n in itertools.count(steps) if int(n * strength) >= 1)
        raise InputError(
            f"stylise: strength {strength} of {steps} steps is less than one; give a larger strength, or at least "
            f"{least} steps"
        )


def sized(picture: Image.Image, long_side: int | None) -> Image.Image:
    """With the longer side as wanted (None: as it is), and sides that are multiples of 8.

    Raises:
        InputError: too small.
    """
    scale = 1.0 if long_side is None else long_side / max(picture.size)
    size = tuple(int(s * scale + 1e-6) // MULTIPLE * MULTIPLE for s in picture.size)
    if min(size) < MULTIPLE:
        raise InputError(
            f"stylise: a picture of {picture.width}x{picture.height} at long_side {long_side} has a side of less than "
            f"{MULTIPLE} pixels; take a larger one"
        )
    return picture if size == picture.size else picture.resize(size, Image.Resampling.LANCZOS)
