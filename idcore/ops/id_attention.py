"""`id_attention`: text attention and identity attention in one pass over the image queries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import reference, reference_bwd, sdpa
from ..backends.call import Args, facts, normalize
from ..errors import InputError
from . import dispatch

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

    Args:
        q: Image queries. [B, H, Lq, D], float32, bfloat16, float16 (or float64, reference backend). Any strides.
        k_text, v_text: Text keys and values, may come from different contexts. [Bt, H, Lt, D], dtype of q.
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
        backend: "cuda", "triton", "cpu", "sdpa" or "reference". Default: the first that can run the call.
        out: Written and returned if given; shape, dtype and device of the result. Not with gradients.

    Returns:
        [B, H, Lq, D], dtype of q, accumulated in float32, as a view of memory order B, Lq, H, D.

    Raises:
        InputError: shapes, dtypes or devices do not fit together.
        NoBackendError: no backend, or not the named one, can run this call; says why.
    """
    a = normalize(
        q, k_text, v_text, k_id, v_id,
        id_scale=id_scale, id_mask=id_mask, merge=merge, num_zero=num_zero, num_global=num_global, text_bias=text_bias,
    )  # fmt: skip
    if torch.compiler.is_compiling():
        return _traced(a, backend, out)
    call = facts(a)
    module = dispatch.load(dispatch.choose(call, backend))
    if out is not None:
        _check_out(out, a, call.needs_grad)
    if module.DIFFERENTIABLE or not call.needs_grad:
        return module.forward(a, out)
    return _op(a, module.NAME)


def _traced(a: Args, backend: str | None, out: Tensor | None) -> Tensor:
    """Under torch.compile: PyTorch's ops inline, or one opaque op that dispatches when it runs."""
    dispatch.check_name(backend)
    wants_other_grads = any(t is not None and t.requires_grad for t in (a.mask, a.text_bias))
    if backend is None and (wants_other_grads or dispatch.only_torch(a.q.device.type)):
        backend = "reference" if a.q.dtype == torch.float64 else "sdpa"
    if backend in ("sdpa", "reference"):
        return (sdpa if backend == "sdpa" else reference).forward(a, out)
    result = _op(a, backend or "")
    return result if out is None else out.copy_(result)


def _op(a: Args, backend: str) -> Tensor:
    return torch.ops.idcore.id_attention_fwd(
        a.q, a.k_text, a.v_text, list(a.k_id), list(a.v_id), _scale_tensor(a), a.mask, a.text_bias,
        a.merge, a.num_zero, a.num_global, backend,
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
    if isinstance(a.scale, Tensor):
        return a.scale
    s = torch.tensor(a.scale, dtype=torch.float32, device=a.q.device)
    return s[:, None].expand(len(a.scale), a.q.shape[0])


@torch.library.custom_op("idcore::id_attention_fwd", mutates_args=())
def _fwd(
    q: Tensor, k_text: Tensor, v_text: Tensor, k_id: list[Tensor], v_id: list[Tensor], scale: Tensor,
    mask: Tensor | None, text_bias: Tensor | None, merge: str, num_zero: int, num_global: int, backend: str,
) -> Tensor:  # fmt: skip
    a = Args(q, k_text, v_text, tuple(k_id), tuple(v_id), scale, mask, text_bias, merge, num_zero, num_global)
    return dispatch.load(dispatch.choose(facts(a), backend or None)).forward(a, None)


@_fwd.register_fake
def _fwd_fake(q, k_text, v_text, k_id, v_id, scale, mask, text_bias, merge, num_zero, num_global, backend):
    b, h, lq, d = q.shape
    return q.new_empty(b, lq, h, d).transpose(1, 2)


@torch.library.custom_op("idcore::id_attention_bwd", mutates_args=())
def _bwd(
    grad: Tensor, q: Tensor, k_text: Tensor, v_text: Tensor, k_id: list[Tensor], v_id: list[Tensor], scale: Tensor,
    mask: Tensor | None, text_bias: Tensor | None, merge: str, num_zero: int, num_global: int, backend: str,
) -> list[Tensor]:  # fmt: skip
    a = Args(q, k_text, v_text, tuple(k_id), tuple(v_id), scale, mask, text_bias, merge, num_zero, num_global)
    module = dispatch.load(dispatch.choose(facts(a), backend or None))
    backward = getattr(module, "backward", reference_bwd.backward)
    dq, dkt, dvt, dks, dvs, dscale = backward(a, grad)
    return [t.contiguous() for t in (dq, dkt, dvt, dscale, *dks, *dvs)]


@_bwd.register_fake
def _bwd_fake(grad, q, k_text, v_text, k_id, v_id, scale, mask, text_bias, merge, num_zero, num_global, backend):
    likes = (q, k_text, v_text, scale, *k_id, *v_id)
    return [t.new_empty(t.shape) for t in likes]


def _setup(ctx, inputs, output) -> None:
    q, k_text, v_text, k_id, v_id, scale, mask, text_bias, *ctx.plain = inputs
    ctx.n, ctx.has_mask, ctx.has_bias = len(k_id), mask is not None, text_bias is not None
    extra = [t for t in (mask, text_bias) if t is not None]
    ctx.save_for_backward(q, k_text, v_text, scale, *k_id, *v_id, *extra)


def _backward(ctx, grad):
    q, k_text, v_text, scale, *rest = ctx.saved_tensors
    n = ctx.n
    k_id, v_id, extra = list(rest[:n]), list(rest[n : 2 * n]), list(rest[2 * n :])
    mask = extra.pop(0) if ctx.has_mask else None
    bias = extra.pop(0) if ctx.has_bias else None
    g = torch.ops.idcore.id_attention_bwd(grad, q, k_text, v_text, k_id, v_id, scale, mask, bias, *ctx.plain)
    dq, dkt, dvt, dscale, *kv = g
    return dq, dkt, dvt, kv[:n], kv[n:], dscale, None, None, None, None, None, None


_fwd.register_autograd(_backward, setup_context=_setup)
