"""How a call reaches the compiled module: pointers and strides in elements, the eight tuples of csrc/bind_tuples.h."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from .call import Args

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MERGES = {"add": 0, "ortho": 1, "ortho_v2": 2}
MAX_IDENTITIES = 16


def head_tensor(t: Tensor) -> tuple[int, ...]:
    """Address, batch, strides of batch, head and row in elements."""
    *_, batch, head, row, _ = t.stride()
    return (t.data_ptr(), t.shape[-4], batch, head, row)


def _stage(a: Args) -> tuple[int, ...]:
    """Address of the stage indices, how many stages, index stride, strides of K and V between stages."""
    if a.stage is None:
        return ()
    per_sample = a.stage.stride(0) if a.stage.shape[0] > 1 else 0
    return (a.stage.data_ptr(), a.k_text.shape[0], per_sample, a.k_text.stride(0), a.v_text.stride(0))


def _bias(a: Args, dtypes: Collection[torch.dtype]) -> tuple[tuple[int, ...], Tensor | None]:
    """The kernel's view of text_bias, and the tensor that must live as long."""
    if a.text_bias is None:
        return (), None
    t = a.text_bias if a.text_bias.dtype in dtypes else a.text_bias.float()
    t = t.expand(*a.q.shape[:3], a.text_length)
    return (t.data_ptr(), DTYPES[t.dtype], *t.stride()), t


def _identities(a: Args) -> tuple[tuple, ...]:
    views = []
    for j, (k, v) in enumerate(zip(a.k_id, a.v_id, strict=True)):
        scale = (a.scale[j], 0, 0)
        if isinstance(a.scale, Tensor):
            scale = (0.0, a.scale[j].data_ptr(), a.scale.stride(1))
        mask = (0, 0, 0)
        if a.mask is not None:
            m = a.mask[j]
            mask = (m.data_ptr(), m.stride(0) if m.shape[0] > 1 else 0, m.stride(1))
        views.append((head_tensor(k), head_tensor(v), k.shape[2], *scale, *mask))
    return tuple(views)


def call_tuples(a: Args, result: Tensor, bias_dtypes: Collection[torch.dtype] = DTYPES) -> tuple[tuple, Tensor | None]:
    """The eight tuples, and a tensor that must outlive the kernels.

    Args:
        result: written by the kernels; shape of q, last dimension contiguous.
        bias_dtypes: dtypes of text_bias that the kernels read; another one is cast to float32.
    """
    b, h, lq, d = a.q.shape
    numbers = (DTYPES[a.q.dtype], MERGES[a.merge], b, h, lq, a.text_length, d, a.num_zero, a.num_global)
    bias, keep = _bias(a, bias_dtypes)
    heads = (head_tensor(t) for t in (a.q, a.k_text, a.v_text, result))
    return (numbers, *heads, bias, _identities(a), _stage(a)), keep


def addresses(tensors: Iterable[Tensor | None]) -> tuple[int, ...]:
    """Addresses of contiguous tensors, 0 for None."""
    return tuple(0 if t is None else t.data_ptr() for t in tensors)
