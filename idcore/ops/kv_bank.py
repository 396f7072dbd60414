"""`kv_bank`: keys and values of every layer from one context, as `id_attention` reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError

Pair = tuple[Tensor, Tensor]


def kv_bank(context: Tensor, weights: Sequence[Pair], heads: Sequence[int]) -> list[Pair]:
    """context @ W^T for the key and the value projection of every layer, split into heads.

    Where the weights lie one behind the other in memory (`lay_out`) this is one GEMM, batched over all heads of all
    layers, that writes the result's layout itself; where the head dim changes from layer to layer, one for each run of
    layers that share it. Else, and while gradients are recorded, it is two GEMMs a layer.

    Args:
        context: [R, L, E], tokens of an identity or of a prompt.
        weights: Per layer (W_k, W_v), each [C, E] with C = heads * head dim, dtype and device of the context.
        heads: H of each layer.

    Returns:
        Per layer (k, v), each [R, H, L, D], head dim contiguous, dtype of the context.

    Raises:
        InputError: shapes, dtypes or devices do not fit together.
    """
    _check(context, weights, heads)
    flat = [w for pair in weights for w in pair]
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in (context, *flat))
    block = None if recorded or torch.compiler.is_compiling() else one_block(flat)
    if block is None:
        return [tuple(_split(F.linear(context, w), h) for w in pair) for pair, h in zip(weights, heads, strict=True)]
    return list(_from_block(context, block, [(w.shape[0], h) for (w, _), h in zip(weights, heads, strict=True)]))


def _split(x: Tensor, heads: int) -> Tensor:
    """[R, L, C] -> [R, H, L, D]"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2).contiguous()


def _from_block(context: Tensor, block: Tensor, layers: Sequence[tuple[int, int]]) -> Iterator[Pair]:
    rows, length, width = context.shape
    start = 0
    for dim, run in groupby(layers, key=lambda layer: layer[0] // layer[1]):
        counts = [h for _, h in run]
        total = 2 * sum(counts)
        part = block[start : start + total * dim]
        start += total * dim
        if context.device.type == "cpu" and context.dtype != torch.float32:
            # oneDNN's batched product of many narrow matrices takes more than twice as long as one product and a copy
            whole = F.linear(context, part).view(rows, length, total, dim).permute(2, 0, 1, 3).contiguous()
        else:
            tokens = context.reshape(1, rows * length, width).expand(total, -1, -1)
            whole = torch.bmm(tokens, part.view(total, dim, width).mT).view(total, rows, length, dim)
        yield from _pairs(whole, counts)


def _pairs(whole: Tensor, counts: Sequence[int]) -> Iterator[Pair]:
    """[all heads, R, L, D] -> per layer two views [R, H, L, D]"""
    at = 0
    for h in counts:
        yield whole[at : at + h].transpose(0, 1), whole[at + h : at + 2 * h].transpose(0, 1)
        at += 2 * h


def one_block(tensors: Sequence[Tensor]) -> Tensor | None:
    """Matrices [C_i, E] that lie one behind the other in memory as one [sum C_i, E], or None where they do not."""
    first = tensors[0]
    if first.device.type == "meta":
        return None
    at, memory = first.data_ptr(), first.untyped_storage().data_ptr()
    for t in tensors:
        alike = t.dtype == first.dtype and t.shape[1:] == first.shape[1:] and t.untyped_storage().data_ptr() == memory
        if not alike or not t.is_contiguous() or t.data_ptr() != at:
            return None
        at += t.numel() * t.element_size()
    first = first.detach()
    return first.as_strided((sum(t.shape[0] for t in tensors), first.shape[1]), (first.shape[1], 1))


def lay_out(parameters: Sequence[Tensor]) -> Tensor:
    """Move parameters [C_i, E] one behind the other; they stay the same objects with the same values.

    Returns:
        The block [sum C_i, E] that they are views of now.
    """
    first = parameters[0]
    block = first.detach().new_empty(sum(p.shape[0] for p in parameters), first.shape[1])
    assign_views(parameters, block, copy=True)
    return block


def assign_views(parameters: Sequence[Tensor], block: Tensor, copy: bool = False) -> None:
    """Let each parameter be its rows of the block."""
    for p, rows in zip(parameters, block.split([p.shape[0] for p in parameters]), strict=True):
        if copy:
            rows.copy_(p.detach())
        p.data = rows


def _check(context: Tensor, weights: Sequence[Pair], heads: Sequence[int]) -> None:
    if not isinstance(context, Tensor) or context.ndim != 3 or not context.dtype.is_floating_point:
        got = list(context.shape) if isinstance(context, Tensor) else type(context).__name__
        raise InputError(f"kv_bank: context must be floats [R, L, E], got {got}")
    if len(weights) != len(heads) or not len(weights):
        raise InputError(
            f"kv_bank: wanted weights and heads of the same, at least one, layers, got {len(weights)} and {len(heads)}"
        )
    for i, (pair, h) in enumerate(zip(weights, heads, strict=True)):
        for w in pair:
            if w.ndim != 2 or w.shape != pair[0].shape or w.shape[1] != context.shape[2] or h < 1 or w.shape[0] % h:
                raise InputError(
                    f"kv_bank: layer {i} must have two weights [C, E] = [C, {context.shape[2]}], C divisible by {h} "
                    f"heads, got {[list(t.shape) for t in pair]}"
                )
            if w.dtype != context.dtype or w.device != context.device:
                raise InputError(
                    f"kv_bank: weights of layer {i} are {w.dtype} on {w.device}, the context is {context.dtype} on "
                    f"{context.device}; move and cast it with .to(weight)"
                )
