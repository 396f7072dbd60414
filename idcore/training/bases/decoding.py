"""The autoencoder's decoder with gradients, its blocks recomputed in backward where memory is short."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as checkpointed

from ...errors import InputError


def decode_in_parts(vae: nn.Module, z: Tensor, *, checkpoint: bool = False) -> Tensor:
    """Latents, unscaled, to pictures [B, 3, H, W]: diffusers' AutoencoderKL, part by part.

    Args:
        vae: the autoencoder; frozen.
        z: [B, C, h, w] in its dtype.
        checkpoint: keep only what stands between its resnets, attentions and upsamplers; each is run again in backward.

    Raises:
        InputError: another kind of autoencoder.
    """
    x = z
    for part in _parts(vae):
        if checkpoint and torch.is_grad_enabled() and x.requires_grad:
            x = checkpointed(part, x, use_reentrant=False, preserve_rng_state=False)
        else:
            x = part(x)
    return x


def _parts(vae: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    decoder = getattr(vae, "decoder", None)
    wanted = ("conv_in", "mid_block", "up_blocks", "conv_norm_out", "conv_act", "conv_out")
    if decoder is None or any(not hasattr(decoder, name) for name in wanted):
        raise InputError(f"decoding: wanted diffusers' AutoencoderKL, got {type(vae).__name__}")
    first = getattr(vae, "post_quant_conv", None)
    yield (lambda z: decoder.conv_in(z if first is None else first(z)))
    mid = decoder.mid_block
    yield _resnet(mid.resnets[0])
    for attention, resnet in zip(mid.attentions, mid.resnets[1:], strict=True):
        if attention is not None:
            yield attention
        yield _resnet(resnet)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            yield _resnet(resnet)
        yield from block.upsamplers or ()
    yield (lambda x: decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(x))))


def _resnet(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: module(x, None)
