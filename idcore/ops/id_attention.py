"""`id_attention`: text attention and identity attention in one pass over the image queries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from ..backends import reference, sdpa
from ..backends.call import Args
from ..backends.checks import normalize
from ..errors import InputError
from . import dispatch, id_attention_autograd  # noqa: F401  (registers the ops)
from .known_calls import checked

Tensors = Tensor | Sequence[Tensor] | None


def id_attention(
    q: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    k_id: Tensors = None,
    v_id: Tensors = None,
    *,
    id_scale: float | Sequence[float] | Tensor = 1.0,
    id_mask: Tensor | Sequence[Tensor | None] | None = None,
    merge: str = "add",
    num_zero: int = 0,
    num_global: int = 5,
    text_bias: Tensor | None = None,
    stage: int | Tensor | None = None,
    backend: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Text attention plus scaled identity attention (PuLID's decoupled cross-attention), sharing one read of q.

    For one identity with merge "add", no mask and no zero tokens this equals::

        sdpa(q, k_text, v_text) + id_scale * sdpa(q, k_id, v_id)

    With h the text attention, i_j identity j's attention, w_j its mask (1 where None), s_j its scale:

    - add:      out = h + sum_j s_j w_j i_j
    - ortho:    out = h + sum_j s_j w_j (i_j - alpha_j h), with alpha_j = sum w_j h i_j / sum w_j h h per sample and
      channel over the image tokens (0 where the denominator is 0)
    - ortho_v2: out = h + sum_j s_j w_j (i_j + (a_j - 1) alpha_j h), with a_j per sample and image token the mean over
      heads of what the first `num_global` tokens receive of softmax(q k_id^T), logits not divided by sqrt(D)

    Weighting alpha by the mask is our choice: an identity behaves inside its region as it would alone there.

    A prompt may hold one set of text keys and values per stage of the denoising (SeFi-IDE, arXiv 2402.00631, B2 of
    its method: five stages). `stage` then picks the set; as a tensor it is read when the kernel runs, so a captured
    CUDA graph serves all steps.

    Args:
        q: Image queries. [B, H, Lq, D], float32, bfloat16, float16 (or float64, reference backend). Any strides.
        k_text, v_text: Text keys and values, may come from different contexts. [Bt, H, Lt, D], dtype of q; with `stage`
            a bank of S of them, [S, Bt, H, Lt, D].
        k_id, v_id: Keys and values of one identity, or a sequence of n of them. Each [Bi, H, Li, D], dtype of q.
            A batch Bt or Bi must divide B; sample b takes row b * Bi // B: 1 row serves all, B rows one each,
            2 rows are the cond/uncond halves of a diffusers batch. None or (): text attention alone.
        id_scale: Strength of the identities: float, n floats, or a float32 tensor [], [n] or [n, B] on q's device.
        id_mask: Where an identity acts, 0 to 1: per identity None (everywhere) or [1 or B, Lq]; or stacked
            [n, 1 or B, Lq].
        merge: "add", "ortho" or "ortho_v2".
        num_zero: Appended all-zero identity tokens (PuLID's NUM_ZERO), in closed form: each adds exp(0) to the
            identity softmax's denominator.
        num_global: Tokens counted by ortho_v2 (5 in PuLID); zero tokens follow the identity's own in the count.
        text_bias: Additive bias of the text logits, broadcastable to [B, H, Lq, Lt].
        stage: Which of the bank's S sets serves: int, or an integer tensor [], [1] or [B] (one per sample) on q's
            device. On a GPU the values are not looked at; outside of 0..S-1 the nearest set serves.
        backend: "cuda", "triton", "cpu", "sdpa" or "reference". Default: the first that can run the call.
        out: Written and returned if given; shape, dtype and device of the result. Not with gradients.

    Returns:
        [B, H, Lq, D], dtype of q, accumulated in float32, as a view of memory order B, Lq, H, D.

    Raises:
        InputError: shapes, dtypes or devices do not fit together.
        NoBackendError: no backend, or not the named one, can run this call; says why.
    """
    given = dict(
        id_scale=id_scale, id_mask=id_mask, merge=merge, num_zero=num_zero, num_global=num_global, text_bias=text_bias,
        stage=stage,
    )  # fmt: skip
    if torch.compiler.is_compiling():
        return _traced(normalize(q, k_text, v_text, k_id, v_id, **given), backend, out)
    a, call = checked(q, k_text, v_text, k_id, v_id, **given)
    module = dispatch.load(dispatch.choose(call, backend))
    if out is not None:
        _check_out(out, a, call.needs_grad)
    if module.DIFFERENTIABLE:
        return module.forward(a, out)
    if call.needs_grad:
        return _train(a, module.NAME)
    if isinstance(q, FakeTensor):  # shapes without memory: nothing for a kernel to read
        return _infer(a, module.NAME) if out is None else out
    return module.forward(a, out)


def _traced(a: Args, backend: str | None, out: Tensor | None) -> Tensor:
    """Under torch.compile: PyTorch's ops inline, or one opaque op that dispatches when it runs."""
    dispatch.check_name(backend)
    wants_other_grads = any(t is not None and t.requires_grad for t in (a.mask, a.text_bias))
    if backend is None and (wants_other_grads or dispatch.only_torch(a.q.device.type)):
        backend = "reference" if a.q.dtype == torch.float64 else "sdpa"
    if backend in ("sdpa", "reference"):
        return (sdpa if backend == "sdpa" else reference).forward(a, out)
    result = (_train if torch.is_grad_enabled() and _any_requires_grad(a) else _infer)(a, backend or "")
    return result if out is None else out.copy_(result)


def _any_requires_grad(a: Args) -> bool:
    scale = (a.scale,) if isinstance(a.scale, Tensor) else ()
    return any(t.requires_grad for t in (a.q, a.k_text, a.v_text, *a.k_id, *a.v_id, *scale))


def _infer(a: Args, backend: str) -> Tensor:
    return torch.ops.idcore.id_attention(*_flat(a), backend)


def _train(a: Args, backend: str) -> Tensor:
    return torch.ops.idcore.id_attention_for_training(*_flat(a), backend)[0]


def _flat(a: Args) -> tuple:
    return (
        a.q, a.k_text, a.v_text, list(a.k_id), list(a.v_id), _scale_tensor(a), a.mask, a.text_bias, a.stage,
        a.merge, a.num_zero, a.num_global,
    )  # fmt: skip


def _check_out(out: Tensor, a: Args, needs_grad: bool) -> None:
    if needs_grad:
        raise InputError(
            "id_attention: out= cannot be used while gradients are recorded; use torch.no_grad() or drop out="
        )
    if out.shape != a.q.shape or out.dtype != a.q.dtype or out.device != a.q.device:
        raise InputError(
            f"id_attention: out must be {list(a.q.shape)} {a.q.dtype} on {a.q.device}, "
            f"got {list(out.shape)} {out.dtype} on {out.device}"
        )
    inputs = (a.q, a.k_text, a.v_text, *a.k_id, *a.v_id)
    if any(t.untyped_storage().data_ptr() == out.untyped_storage().data_ptr() for t in inputs if t.numel()):
        raise InputError("id_attention: out must not share memory with q, k or v; pass a tensor of its own")


def _scale_tensor(a: Args) -> Tensor:
    """Scales as float32 [n, B]."""
    return a.scale if isinstance(a.scale, Tensor) else numbers(a.scale, a.q.device)[:, None].expand(-1, a.q.shape[0])


def numbers(values: Sequence[float], device: torch.device) -> Tensor:
    """float32 [n] of numbers, written on the device: a copy from the CPU would wait for a GPU's work, and cannot be
    captured in a CUDA graph."""
    each = [torch.full((1,), x, dtype=torch.float32, device=device) for x in values]
    return torch.cat(each) if each else torch.empty(0, device=device)
