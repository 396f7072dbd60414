"""From the words of a call to the tensors that the denoising loop needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .denoise import Job
from .sdxl import fresh_copy


def picture_size(pipe: Any, height: int | None, width: int | None) -> tuple[int, int]:
    """Height and width of the pictures; the UNet's own size where None.

    Raises:
        InputError: not multiples of what autoencoder and UNet halve together.
    """
    factor = pipe.vae_scale_factor
    side = pipe.unet.config.sample_size * factor
    size = (height or side, width or side)
    step = factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)
    if any(not isinstance(n, int) or n < step or n % step for n in size):
        raise InputError(f"height and width must be multiples of {step}, got {size[0]} and {size[1]}")
    return size


def is_guided(pipe: Any, scale: Any) -> bool:
    """Whether this weight asks for classifier-free guidance.

    Raises:
        InputError: no weight, or a UNet that takes it as an input.
    """
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 <= scale < 1000:
        raise InputError(f"guidance_scale must be a number from 0, got {scale!r}")
    if pipe.unet.config.time_cond_proj_dim is not None:
        raise InputError(
            "IDPipeline: this UNet takes the weight of guidance as an input (a consistency model); put identities on "
            "diffusers' own pipeline with idcore.attach"
        )
    return scale > 1


def encode_words(
    pipe: Any, prompt: Any, negative: Any, count: int, guidance: float, clip_skip: int | None
) -> tuple[Tensor, Tensor]:
    """Text [rows, L, E] and pooled text [rows, P], in [uncond, cond] halves with guidance.

    Raises:
        InputError: no prompts, or counts that do not fit.
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise InputError(f"prompt must be a string or a list of strings, got {prompt!r:.80}")
    if isinstance(negative, (list, tuple)) and len(negative) != len(prompts):
        raise InputError(f"negative_prompt: {len(prompts)} prompts need one or {len(prompts)}, got {len(negative)}")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InputError(f"num_images_per_prompt must be a whole number from 1, got {count!r}")
    guided = is_guided(pipe, guidance)
    text, no_text, pooled, no_pooled = pipe.encode_prompt(
        prompt=list(prompts), device=pipe._execution_device, num_images_per_prompt=count, clip_skip=clip_skip,
        do_classifier_free_guidance=guided, negative_prompt=negative,
    )  # fmt: skip
    return (torch.cat([no_text, text]), torch.cat([no_pooled, pooled])) if guided else (text, pooled)


def make_job(
    pipe: Any,
    words: tuple[Tensor, Tensor],
    scheduler: Any,
    steps: int,
    guidance: float,
    size: tuple[int, int],
    sizes: tuple[tuple[int, int], ...],
    generator: Any,
    latents: Tensor | None,
) -> Job:
    """A `Job` with a scheduler of its own.

    Args:
        pipe: diffusers pipeline.
        words: of `encode_words`.
        scheduler: copied.
        steps, guidance, generator, latents: as in `IDPipeline`.
        size: height and width of the pictures.
        sizes: SDXL's conditions: original size, corner, target size.

    Raises:
        InputError: counts or shapes that do not fit.
    """
    text, pooled = words
    guided, device = is_guided(pipe, guidance), text.device
    images = len(text) // (2 if guided else 1)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"num_inference_steps must be a whole number from 1, got {steps!r}")
    scheduler = fresh_copy(scheduler)
    scheduler.set_timesteps(steps, device=device)
    shape = (images, pipe.unet.config.in_channels, *(n // pipe.vae_scale_factor for n in size))
    noise = _noise(shape, text.dtype, device, generator, latents) * scheduler.init_noise_sigma
    ids = torch.tensor([[float(n) for pair in sizes for n in pair]], dtype=text.dtype, device=device)
    return Job(scheduler, noise, text, pooled, ids.repeat(len(text), 1), float(guidance), guided, generator)


def _noise(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, generator: Any, given: Tensor | None
) -> Tensor:
    from diffusers.utils.torch_utils import randn_tensor

    if given is not None:
        if tuple(given.shape) != shape:
            raise InputError(f"latents must be {list(shape)} for these prompts and this size, got {list(given.shape)}")
        return given.to(device=device, dtype=dtype)
    if isinstance(generator, (list, tuple)):
        if len(generator) != shape[0]:
            raise InputError(f"generator: {shape[0]} pictures need one or {shape[0]}, got {len(generator)}")
        generator = list(generator)
    return randn_tensor(shape, generator=generator, device=device, dtype=dtype)
