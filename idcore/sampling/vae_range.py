"""An autoencoder's decoder whose activations keep within float16, by an exact change of its weights.

What flows along the decoder's residual path is only ever read by group norms, which take any factor out again, and by
convolutions, which pass it on. So the path may carry s times its values: what writes to it (weights and biases of the
last convolutions of residual blocks, attention's output, biases of what is linear in it) is multiplied by s, and the
epsilon of every group norm that reads it by s^2. With s a power of two nothing is rounded, and the pictures stay the
same, except where float16 would have overflowed or leaves its normal range.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import InputError


def residual_scale(decoder: nn.Module) -> float:
    """The factor that the residual path of this decoder carries; 1 as published."""
    return getattr(decoder, "residual_scale", 1.0)


@torch.no_grad()
def set_residual_scale(decoder: nn.Module, scale: float) -> None:
    """Let the residual path carry `scale` times its values, in place. Back with 1.0.

    Weights that are saved afterwards need the same scale again: their group norms' epsilons are not saved with them.

    Args:
        decoder: `decoder` of diffusers' AutoencoderKL.
        scale: a power of two.

    Raises:
        InputError: another kind of decoder, or no power of two; nothing is changed.
    """
    mantissa, _ = torch.frexp(torch.tensor(scale, dtype=torch.float64))
    if scale <= 0 or float(mantissa) != 0.5:
        raise InputError(f"a residual path is scaled by a power of two, which rounds nothing; got {scale}")
    writers, biases, norms = _parts(decoder)
    factor = scale / residual_scale(decoder)
    for module in writers:
        for p in module.parameters(recurse=False):
            p.mul_(factor)
    for module in biases:
        if module.bias is not None:
            module.bias.mul_(factor)
    for norm in norms:
        norm.eps *= factor**2
    decoder.residual_scale = scale


def _parts(decoder: nn.Module) -> tuple[list[Any], list[Any], list[nn.GroupNorm]]:
    """Modules whose whole result is scaled, those of which the bias alone is, and the norms that read the path."""
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.upsampling import Upsample2D

    writers, biases = [decoder.conv_in], []
    norms, known = [decoder.conv_norm_out], [decoder.conv_out]
    for module in decoder.modules():
        if isinstance(module, ResnetBlock2D):
            # Between its convolutions a block has a norm of its own, so that conv1 may be scaled too.
            writers += [module.conv1, module.conv2]
            norms += [module.norm1, module.norm2]
            biases += [] if module.conv_shortcut is None else [module.conv_shortcut]
        elif isinstance(module, Attention):
            writers.append(module.to_out[0])
            norms.append(module.group_norm)
            known += [module.to_q, module.to_k, module.to_v]
        elif isinstance(module, Upsample2D):
            biases += [] if module.conv is None else [module.conv]
    seen = {id(p) for m in (*writers, *biases, *norms, *known) for p in m.parameters()}
    plain = all(isinstance(n, nn.GroupNorm) for n in norms)
    if not plain or any(id(p) not in seen for p in decoder.parameters()):
        raise InputError(
            "this autoencoder's decoder is not made of group norms, residual blocks and attention alone, as SDXL's is, "
            "so its range cannot be moved; give vae_dtype='float32' or 'bfloat16'"
        )
    return writers, biases, norms
