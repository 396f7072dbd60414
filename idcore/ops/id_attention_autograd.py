"""The registered forms of `id_attention`: `idcore::id_attention` for inference, `idcore::id_attention_for_training`
with statistics and autograd. One call runs forward and backward on one backend."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from ..backends import reference_bwd
from ..backends.call import Args, Stats, facts, stats_shapes
from . import dispatch


def _args(q, k_text, v_text, k_id, v_id, scale, mask, text_bias, stage, merge, num_zero, num_global) -> Args:
    return Args(q, k_text, v_text, tuple(k_id), tuple(v_id), scale, mask, text_bias, merge, num_zero, num_global, stage)


def _module(a: Args, backend: str, needs_grad: bool) -> ModuleType:
    # Inside a registered op autograd is off, so the facts do not show that gradients are wanted.
    call = replace(facts(a), needs_grad=needs_grad)
    return dispatch.load(dispatch.choose(call, backend or None))


@torch.library.custom_op("idcore::id_attention", mutates_args=())
def _infer(
    q: Tensor, k_text: Tensor, v_text: Tensor, k_id: list[Tensor], v_id: list[Tensor], scale: Tensor,
    mask: Tensor | None, text_bias: Tensor | None, stage: Tensor | None, merge: str, num_zero: int, num_global: int,
    backend: str,
) -> Tensor:  # fmt: skip
    a = _args(q, k_text, v_text, k_id, v_id, scale, mask, text_bias, stage, merge, num_zero, num_global)
    return _module(a, backend, False).forward(a, None)


@_infer.register_fake
def _infer_fake(q, k_text, v_text, k_id, v_id, scale, mask, text_bias, stage, merge, num_zero, num_global, backend):
    return _new_out(q)


def _new_out(q: Tensor) -> Tensor:
    b, h, lq, d = q.shape
    return q.new_empty(b, lq, h, d).transpose(1, 2)


@torch.library.custom_op("idcore::id_attention_for_training", mutates_args=())
def _train(
    q: Tensor, k_text: Tensor, v_text: Tensor, k_id: list[Tensor], v_id: list[Tensor], scale: Tensor,
    mask: Tensor | None, text_bias: Tensor | None, stage: Tensor | None, merge: str, num_zero: int, num_global: int,
    backend: str,
) -> list[Tensor]:  # fmt: skip
    a = _args(q, k_text, v_text, k_id, v_id, scale, mask, text_bias, stage, merge, num_zero, num_global)
    module = _module(a, backend, True)
    if not hasattr(module, "backward"):  # PyTorch's own ops: their gradient is the closed form
        return [module.forward(a, None), *(t.zero_() for t in _empty_stats(a))]
    out, stats = module.forward_stats(a)
    return [out, *(t.contiguous() for t in stats if t is not None)]


@_train.register_fake
def _train_fake(q, k_text, v_text, k_id, v_id, scale, mask, text_bias, stage, merge, num_zero, num_global, backend):
    a = _args(q, k_text, v_text, k_id, v_id, scale, mask, text_bias, stage, merge, num_zero, num_global)
    return [_new_out(q), *_empty_stats(a)]


def _empty_stats(a: Args) -> list[Tensor]:
    return [a.q.new_empty(shape, dtype=torch.float32) for shape in stats_shapes(a) if shape is not None]


@torch.library.custom_op("idcore::id_attention_grad", mutates_args=())
def _bwd(
    grad: Tensor, stats: list[Tensor], q: Tensor, k_text: Tensor, v_text: Tensor, k_id: list[Tensor],
    v_id: list[Tensor], scale: Tensor, mask: Tensor | None, text_bias: Tensor | None, stage: Tensor | None,
    merge: str, num_zero: int, num_global: int, backend: str, text_kv: bool, id_kv: bool,
) -> list[Tensor]:  # fmt: skip
    a = _args(q, k_text, v_text, k_id, v_id, scale, mask, text_bias, stage, merge, num_zero, num_global)
    module = _module(a, backend, True)
    if hasattr(module, "backward"):
        kept = iter(stats)
        s = Stats(*(None if shape is None else next(kept) for shape in stats_shapes(a)))
        dq, dkt, dvt, dks, dvs, dscale = module.backward(a, grad, s, text_kv=text_kv, id_kv=id_kv)
    else:
        dq, dkt, dvt, dks, dvs, dscale = reference_bwd.backward(a, grad)
    wanted = [dscale, *((dkt, dvt) if text_kv else ()), *((*dks, *dvs) if id_kv else ())]
    # Queries are views of [B, Lq, H D]: in that memory order their gradient reaches to_q without a copy.
    return [dq.transpose(1, 2).contiguous().transpose(1, 2), *(t.contiguous() for t in wanted)]


@_bwd.register_fake
def _bwd_fake(
    grad, stats, q, k_text, v_text, k_id, v_id, scale, mask, text_bias, stage, merge, num_zero, num_global, backend,
    text_kv, id_kv,
):  # fmt: skip
    likes = (scale, *((k_text, v_text) if text_kv else ()), *((*k_id, *v_id) if id_kv else ()))
    return [_new_out(q), *(t.new_empty(t.shape) for t in likes)]


def _setup(ctx, inputs, output) -> None:
    q, k_text, v_text, k_id, v_id, scale, mask, text_bias, stage, *ctx.plain = inputs
    extra = [mask, text_bias, stage]
    ctx.n, ctx.has = len(k_id), [t is not None for t in extra]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(q, k_text, v_text, scale, *k_id, *v_id, *(t for t in extra if t is not None), *output[1:])


def _backward(ctx, grads):
    """Gradients of q, k_text, v_text, k_id, v_id and scale; a frozen text or identity side costs nothing."""
    nothing = (None,) * 13
    grad = grads[0]
    if grad is None:
        return nothing
    q, k_text, v_text, scale, *rest = ctx.saved_tensors
    n = ctx.n
    k_id, v_id, rest = list(rest[:n]), list(rest[n : 2 * n]), list(rest[2 * n :])
    extra = [rest.pop(0) if has else None for has in ctx.has]
    needs = ctx.needs_input_grad
    text_kv, id_kv = needs[1] or needs[2], n > 0 and (_any(needs[3]) or _any(needs[4]))
    got = torch.ops.idcore.id_attention_grad(
        grad, rest, q, k_text, v_text, k_id, v_id, scale, *extra, *ctx.plain, text_kv, id_kv
    )
    dq, dscale, *kv = got
    dkt, dvt = (kv.pop(0), kv.pop(0)) if text_kv else (None, None)
    dks, dvs = (kv[:n], kv[n:]) if id_kv else ([None] * n, [None] * n)
    return dq, dkt, dvt, dks, dvs, dscale, *nothing[6:]


def _any(needs) -> bool:
    return any(needs) if isinstance(needs, (list, tuple)) else bool(needs)


_train.register_autograd(_backward, setup_context=_setup)
