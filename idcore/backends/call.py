"""The validated form of one `id_attention` call: what backends receive and what `why_not` looks at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

MERGES = ("add", "ortho", "ortho_v2")
_Function = TypeVar("_Function", bound=Callable)


def constant_in_traces(function: _Function) -> _Function:
    """Mark a function whose result torch.compile takes as a constant.

    What `torch.compiler.assume_constant_result` does, without its import of the whole compiler: that is longer than
    PyTorch's own, and nobody who runs a command of ours without compiling needs it.
    """
    function._dynamo_marked_constant = True
    return function


class Args(NamedTuple):
    """Tensors and numbers of one call, shapes checked.

    Letters: B batch, H heads, Lq image tokens, Lt text tokens, Li identity tokens, D head dim, n identities.
    """

    q: Tensor  # [B, H, Lq, D]
    k_text: Tensor  # [Bt, H, Lt, D]
    v_text: Tensor  # [Bt, H, Lt, D]
    k_id: tuple[Tensor, ...]  # n times [Bi, H, Li, D]
    v_id: tuple[Tensor, ...]  # n times [Bi, H, Li, D]
    scale: tuple[float, ...] | Tensor  # n floats, or float32 [n, B]
    mask: Tensor | None  # [n, 1 or B, Lq] float32
    text_bias: Tensor | None  # broadcastable to [B, H, Lq, Lt], dtype of q or float32
    merge: str
    num_zero: int
    num_global: int
    stage: Tensor | None = None  # int32 [1 or B]; then k_text and v_text are banks [S, Bt, H, Lt, D]

    @property
    def text_length(self) -> int:
        """Lt"""
        return self.k_text.shape[-2]


class Stats(NamedTuple):
    """What a backward needs of its forward, all float32: no score matrix, no copy of an activation.

    None where the merge has none of it.
    """

    lse_text: Tensor  # [B, H, Lq], log2 of the softmax sum, the maximum included
    lse_id: Tensor | None  # [n, B, H, Lq], zero tokens included
    lse_unscaled: Tensor | None  # [n, B, H, Lq], of the logits without 1 / sqrt(D); ortho_v2
    share: Tensor | None  # [n, B, Lq], ortho_v2's a
    alpha: Tensor | None  # [n, B, H, D]; ortho and ortho_v2
    den: Tensor | None  # [n, B, H, D], sum of w h h; ortho and ortho_v2


def stats_shapes(a: Args) -> tuple[tuple[int, ...] | None, ...]:
    """Shapes of the entries of `Stats` for a call; None where there is none."""
    b, h, lq, d = a.q.shape
    n = len(a.k_id)
    two, v2 = n > 0 and a.merge != "add", n > 0 and a.merge == "ortho_v2"
    rows, channels = (n, b, h, lq), (n, b, h, d)
    return (
        (b, h, lq), rows if n else None, rows if v2 else None, (n, b, lq) if v2 else None,
        channels if two else None, channels if two else None,
    )  # fmt: skip


@dataclass(frozen=True)
class Call:
    """Facts of a call that decide which backend can run it. Hashable; holds no tensor."""

    device: str
    dtype: torch.dtype
    batch: int
    heads: int
    lq: int
    lt: int
    head_dim: int
    li: tuple[int, ...]
    merge: str
    has_mask: bool
    has_text_bias: bool
    needs_grad: bool
    mask_needs_grad: bool
    dense_last_dim: bool
    stages: int = 0

    def describe(self) -> str:
        """One line for error texts."""
        dt = str(self.dtype).removeprefix("torch.")
        return (
            f"device={self.device} dtype={dt} B={self.batch} H={self.heads} Lq={self.lq} Lt={self.lt} "
            f"D={self.head_dim} Li={list(self.li)} merge={self.merge} mask={self.has_mask} "
            f"text_bias={self.has_text_bias} needs_grad={self.needs_grad} stages={self.stages}"
        )


def facts(a: Args) -> Call:
    """The facts of validated arguments that backends look at."""
    tensors = (a.q, a.k_text, a.v_text, *a.k_id, *a.v_id)
    grad = torch.is_grad_enabled()
    scale_grad = isinstance(a.scale, Tensor) and a.scale.requires_grad
    mask_grad = a.mask is not None and a.mask.requires_grad
    bias_grad = a.text_bias is not None and a.text_bias.requires_grad
    return Call(
        device=a.q.device.type,
        dtype=a.q.dtype,
        batch=a.q.shape[0],
        heads=a.q.shape[1],
        lq=a.q.shape[2],
        lt=a.text_length,
        head_dim=a.q.shape[3],
        li=tuple(k.shape[2] for k in a.k_id),
        merge=a.merge,
        has_mask=a.mask is not None,
        has_text_bias=a.text_bias is not None,
        needs_grad=grad and (scale_grad or mask_grad or bias_grad or any(t.requires_grad for t in tensors)),
        mask_needs_grad=grad and (mask_grad or bias_grad),
        dense_last_dim=all(t.stride(-1) == 1 or t.shape[-1] == 1 or t.numel() == 0 for t in tensors),
        stages=0 if a.stage is None else a.k_text.shape[0],
    )
