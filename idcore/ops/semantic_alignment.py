"""`semantic_alignment`: what each text token gathers from the image queries (PuLID's semantic alignment)."""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import cpu_losses
from ..backends.reference import rows as rows_of
from ..backends.reference import store
from ..errors import InputError
from .dispatch import choose_for_loss


def semantic_alignment(q: Tensor, k: Tensor, *, backend: str | None = None) -> Tensor:
    """softmax over the image tokens of k q^T / sqrt D, times q.

    The two sides of PuLID's L_align-sem (equation 3) are this function of the queries with and without
    identity: the response of the text's keys to the UNet's features. No score matrix is stored.

    Args:
        q: Image queries. [B, H, Lq, D], float32, bfloat16, float16 (float64: sdpa backend). Any strides.
        k: Text keys. [Bt, H, Lt, D], dtype of q; Bt divides B, sample b takes row b * Bt // B.
        backend: "triton", "cpu" or "sdpa" (PyTorch's own attention). Default: the first that can run the call.

    Returns:
        [B, H, Lt, D], dtype of q, accumulated in float32.

    Raises:
        InputError: shapes, dtypes or devices do not fit together.
        NoBackendError: the named backend cannot run this call; says why.
    """
    _check(q, k)
    chosen = choose_for_loss("sdpa", "semantic_alignment", q, (k,), backend)
    if chosen != "sdpa":
        return torch.ops.idcore.semantic_fwd(q, k, chosen)[0]
    return F.scaled_dot_product_attention(rows_of(k, q.shape[0]), q, q)


def _check(q: Tensor, k: Tensor) -> None:
    if q.dim() != 4 or 0 in q.shape:
        raise InputError(f"semantic_alignment: q must be [B, H, Lq, D] without a 0, got {list(q.shape)}")
    b, h, _, d = q.shape
    if k.dim() != 4 or (k.shape[1], k.shape[3]) != (h, d) or 0 in k.shape or b % k.shape[0]:
        want = f"[1 or B, H, Lt, D] = [1 or {b}, {h}, Lt, {d}]"
        raise InputError(f"semantic_alignment: k must be {want}, got {list(k.shape)}")
    if k.dtype != q.dtype or k.device != q.device:
        raise InputError(
            f"semantic_alignment: k is {k.dtype} on {k.device}, q is {q.dtype} on {q.device}; "
            "move and cast it with .to(q)"
        )


def _kernels():
    return importlib.import_module("idcore.kernels.launch_semantic")


@torch.library.custom_op("idcore::semantic_fwd", mutates_args=())
def _fwd(q: Tensor, k: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return cpu_losses.semantic(q, k) if backend == "cpu" else _kernels().forward(q, k)


@_fwd.register_fake
def _fwd_fake(q, k, backend):
    b, h, _, d = q.shape
    return q.new_empty(b, h, k.shape[2], d), q.new_empty(b, h, k.shape[2], dtype=torch.float32)


@torch.library.custom_op("idcore::semantic_bwd", mutates_args=())
def _bwd(q: Tensor, k: Tensor, g: Tensor, out: Tensor, lse: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    backward = cpu_losses.semantic_backward if backend == "cpu" else _kernels().backward
    dq, dk = backward(q, k, g, out, lse)
    return store(dq, q, None), dk.contiguous()


@_bwd.register_fake
def _bwd_fake(q, k, g, out, lse, backend):
    b, h, lq, d = q.shape
    return q.new_empty(b, lq, h, d).transpose(1, 2), k.new_empty(k.shape)


def _setup(ctx, inputs, output) -> None:
    q, k, ctx.backend = inputs
    ctx.save_for_backward(q, k, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, g, _):
    q, k, out, lse = ctx.saved_tensors
    return *torch.ops.idcore.semantic_bwd(q, k, g, out, lse, ctx.backend), None


_fwd.register_autograd(_backward, setup_context=_setup)
