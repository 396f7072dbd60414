"""`token_attention_loss` and `semantic_alignment` by the compiled CPU kernels, forward and backward; no map is stored.

What can run is asked by `cpu.why_not`: float32, bfloat16 and float16 in and out, float32 inside.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cpu import _load
from .native import DTYPES, head_tensor


def _numbers(q: Tensor, k: Tensor) -> tuple[int, ...]:
    return (DTYPES[q.dtype], *q.shape[:3], k.shape[2], q.shape[3])


def _weight(weight: Tensor) -> tuple[int, ...]:
    return (weight.data_ptr(), *weight.stride())


def _gradients(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Room for dq, in memory order B, Lq, H, D, and for dk, contiguous."""
    b, h, lq, d = q.shape
    return q.new_empty(b, lq, h, d).transpose(1, 2), k.new_empty(k.shape)


def token_loss(q: Tensor, k: Tensor, k_ref: Tensor, weight: Tensor) -> Tensor:
    """Sum over samples, heads, image tokens and tokens of weight times the squared distance. float32 []

    Args:
        q, k, k_ref: as for the op, head dim contiguous.
        weight: float32 [B, Lt], any strides.
    """
    tensors = (head_tensor(q), head_tensor(k), head_tensor(k_ref))
    return torch.tensor(_load()[0].token_loss_cpu(_numbers(q, k), *tensors, _weight(weight)), dtype=torch.float32)


def token_loss_backward(q: Tensor, k: Tensor, k_ref: Tensor, weight: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """dq and dk.

    Args:
        factor: gradient of the sum times 2 / sqrt D. [1] or []
    """
    dq, dk = _gradients(q, k)
    tensors = (head_tensor(q), head_tensor(k), head_tensor(k_ref))
    _load()[0].token_loss_cpu_bwd(
        _numbers(q, k), *tensors, _weight(weight), float(factor), head_tensor(dq), dk.data_ptr()
    )
    return dq, dk


def semantic(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The result [B, H, Lt, D], dtype of q, and log2 of the softmax sums, float32 [B, H, Lt]."""
    b, h, _, d = q.shape
    out = q.new_empty(b, h, k.shape[2], d)
    lse = q.new_empty(b, h, k.shape[2], dtype=torch.float32)
    _load()[0].semantic_cpu(_numbers(q, k), head_tensor(q), head_tensor(k), out.data_ptr(), lse.data_ptr())
    return out, lse


def semantic_backward(q: Tensor, k: Tensor, g: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """dq and dk.

    Args:
        g: gradient of the result. [B, H, Lt, D]
        out, lse: what `semantic` returned.
    """
    g = g if g.stride(3) == 1 else g.contiguous()
    delta = (g.float() * out.float()).sum(-1)
    dq, dk = _gradients(q, k)
    _load()[0].semantic_cpu_bwd(
        _numbers(q, k), head_tensor(q), head_tensor(k), head_tensor(g), lse.data_ptr(), delta.data_ptr(),
        head_tensor(dq), dk.data_ptr(),
    )  # fmt: skip
    return dq, dk
