"""`token_attention_loss`: how far two prompts' attention maps are apart, without ever storing a map."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ..backends import cpu_losses
from ..backends.reference import rows as rows_of
from ..backends.reference import store, wide
from ..errors import InputError
from .dispatch import choose_for_loss

CHUNK = 1024  # image tokens whose maps the PyTorch path holds at a time (our choice)


def token_attention_loss(
    q: Tensor, k: Tensor, k_ref: Tensor, *, tokens: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Mean squared distance of softmax(q k^T / sqrt D) from softmax(q k_ref^T / sqrt D).

    The attention loss of SeFi-IDE ("Beyond Inserting", face-wise attention loss): k comes from the prompt
    with the learned token, k_ref from the reference prompt with a plain word, q is shared. The reference map is a
    target: nothing is differentiated through it, neither towards k_ref nor towards q. That the distance is
    squared is our reading of the paper's figure.

    Args:
        q: Image queries. [B, H, Lq, D], float32, bfloat16, float16 (float64: reference backend). Any strides.
        k, k_ref: Text keys of the two prompts. [Bt, H, Lt, D], dtype of q; Bt divides B, sample b takes row
            b * Bt // B.
        tokens: Which tokens count: bool or float weights, [Lt] or [B, Lt]. Default: all.
        backend: "triton", "cpu" or "reference". Default: the first that can run the call.

    Returns:
        float32 [] (float64 for float64), the mean over samples, heads, image tokens and counted tokens.

    Raises:
        InputError: shapes, dtypes or devices do not fit together, no token counts, or k_ref wants a gradient.
        NoBackendError: the named backend cannot run this call; says why.
    """
    _check(q, k, k_ref)
    weight = _weight(tokens, q, k)
    chosen = choose_for_loss("reference", "token_attention_loss", q, (k, k_ref), backend)
    count = weight.sum() * (q.shape[1] * q.shape[2])
    if tokens is not None and not torch.compiler.is_compiling() and q.device.type == "cpu" and count == 0:
        raise InputError("token_attention_loss: tokens chooses no token; give at least one a weight above 0")
    total, _ = torch.ops.idcore.token_loss_fwd(q, k, k_ref, weight, chosen)
    return total / count


def _check(q: Tensor, k: Tensor, k_ref: Tensor) -> None:
    if q.dim() != 4:
        raise InputError(f"token_attention_loss: q must be [B, H, Lq, D], got {list(q.shape)}")
    b, h, lq, d = q.shape
    if 0 in q.shape:
        raise InputError(f"token_attention_loss: q holds no element, its shape is {list(q.shape)}")
    for name, t in (("k", k), ("k_ref", k_ref)):
        fits = t.dim() == 4 and (t.shape[1], t.shape[3]) == (h, d) and 0 not in t.shape
        if not fits or t.shape[2] != k.shape[2] or b % t.shape[0]:
            length = "Lt" if name == "k" or k.dim() != 4 else k.shape[2]
            raise InputError(
                f"token_attention_loss: {name} must be [1 or B, H, Lt, D] = [1 or {b}, {h}, {length}, {d}], "
                f"got {list(t.shape)}"
            )
        if t.dtype != q.dtype or t.device != q.device:
            raise InputError(
                f"token_attention_loss: {name} is {t.dtype} on {t.device}, q is {q.dtype} on {q.device}; "
                "move and cast it with .to(q)"
            )
    if k_ref.requires_grad and torch.is_grad_enabled():
        raise InputError("token_attention_loss: k_ref is a target without gradient; pass k_ref.detach()")


def _weight(tokens: Tensor | None, q: Tensor, k: Tensor) -> Tensor:
    """float32 (float64 for float64) [B, Lt]"""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    b, lt = q.shape[0], k.shape[2]
    if tokens is None:
        return torch.ones((), dtype=dtype, device=q.device).expand(b, lt)
    fits = tokens.dim() == 1 or (tokens.dim() == 2 and tokens.shape[0] in (1, b))
    if not fits or tokens.shape[-1] != lt:
        want = f"[Lt] = [{lt}] or [B, Lt] = [{b}, {lt}]"
        raise InputError(f"token_attention_loss: tokens must be {want}, got {list(tokens.shape)}")
    return tokens.detach().to(q.device, dtype).expand(b, lt)


def _chunks(q: Tensor, k: Tensor, k_ref: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Per chunk of image tokens: its slice, p, p - r [B, H, chunk, Lt] and w [B, 1, 1, Lt]"""
    b, factor = q.shape[0], q.shape[-1] ** -0.5
    keys, keys_ref = rows_of(wide(k), b).transpose(-1, -2), rows_of(wide(k_ref), b).transpose(-1, -2)
    w = weight[:, None, None, :]
    for first in range(0, q.shape[2], CHUNK):
        part = slice(first, first + CHUNK)
        queries = wide(q[:, :, part]) * factor
        p = (queries @ keys).softmax(-1)
        yield part, p, p - (queries @ keys_ref).softmax(-1), w


def _reference_backward(q, k, k_ref, weight, factor) -> tuple[Tensor, Tensor]:
    dq = torch.empty(q.shape, dtype=wide(q).dtype, device=q.device)
    dk = torch.zeros((q.shape[0], *k.shape[1:]), dtype=dq.dtype, device=q.device)
    keys = rows_of(wide(k), q.shape[0])
    for part, p, difference, w in _chunks(q, k, k_ref, weight):
        weighted = w * difference
        ds = p * (weighted - (weighted * p).sum(-1, keepdim=True)) * factor
        dq[:, :, part] = ds @ keys
        dk += ds.transpose(-1, -2) @ wide(q[:, :, part])
    shared = q.shape[0] // k.shape[0]
    return dq.to(q.dtype), dk.view(k.shape[0], shared, *k.shape[1:]).sum(1).to(k.dtype)


def _kernels():
    return importlib.import_module("idcore.kernels.launch_token_loss")


@torch.library.custom_op("idcore::token_loss_fwd", mutates_args=())
def _fwd(q: Tensor, k: Tensor, k_ref: Tensor, weight: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        return _kernels().forward(q, k, k_ref, weight)
    if backend == "cpu":
        return cpu_losses.token_loss(q, k, k_ref, weight), weight.new_empty(0)
    total = weight.new_zeros(())
    for _, _, difference, w in _chunks(q, k, k_ref, weight):
        total = total + (w * difference * difference).sum()
    return total, weight.new_empty(0)


@_fwd.register_fake
def _fwd_fake(q, k, k_ref, weight, backend):
    rows = (3, *q.shape[:3]) if backend == "triton" else (0,)
    return weight.new_empty(()), weight.new_empty(rows)


@torch.library.custom_op("idcore::token_loss_bwd", mutates_args=())
def _bwd(
    q: Tensor, k: Tensor, k_ref: Tensor, weight: Tensor, rows: Tensor, factor: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        dq, dk = _kernels().backward(q, k, k_ref, weight, rows, factor)
    elif backend == "cpu":
        dq, dk = cpu_losses.token_loss_backward(q, k, k_ref, weight, factor)
    else:
        dq, dk = _reference_backward(q, k, k_ref, weight, factor)
    return store(dq, q, None), dk.contiguous()


@_bwd.register_fake
def _bwd_fake(q, k, k_ref, weight, rows, factor, backend):
    b, h, lq, d = q.shape
    return q.new_empty(b, lq, h, d).transpose(1, 2), k.new_empty(k.shape)


def _setup(ctx, inputs, output) -> None:
    q, k, k_ref, weight, ctx.backend = inputs
    ctx.save_for_backward(q, k, k_ref, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    q, k, k_ref, weight, rows = ctx.saved_tensors
    factor = grad * (2.0 * q.shape[-1] ** -0.5)
    dq, dk = torch.ops.idcore.token_loss_bwd(q, k, k_ref, weight, rows, factor, ctx.backend)
    return dq, dk, None, None, None


_fwd.register_autograd(_backward, setup_context=_setup)
