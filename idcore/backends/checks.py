"""Checks the arguments of one `id_attention` call and brings them into their normal form, `call.Args`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError
from .call import MERGES, Args


def _shape(t: Tensor) -> str:
    return str(list(t.shape))


def _check_kv(name: str, t: Tensor, q: Tensor, length: int | None) -> None:
    b, h, _, d = q.shape
    if t.dim() != 4 or t.shape[1] != h or t.shape[3] != d or (length is not None and t.shape[2] != length):
        want = "L" if length is None else str(length)
        raise InputError(
            f"id_attention: {name} must be [1 or B, H, L, D] = [1 or {b}, {h}, {want}, {d}], got {_shape(t)}"
        )
    if t.shape[0] == 0 or b % t.shape[0] != 0:
        raise InputError(
            f"id_attention: the batch of {name} must divide q's batch {b} (1: the same for all; {b}: one each; "
            f"2: cond/uncond halves), got {t.shape[0]}"
        )
    if t.dtype != q.dtype:
        raise InputError(f"id_attention: {name} has dtype {t.dtype}, q has {q.dtype}; cast it with .to(q.dtype)")
    if t.device != q.device:
        raise InputError(f"id_attention: {name} is on {t.device}, q on {q.device}; move it with .to(q.device)")


def _as_tuple(x: Tensor | Sequence[Tensor] | None) -> tuple[Tensor, ...]:
    if x is None:
        return ()
    return (x,) if isinstance(x, Tensor) else tuple(x)


def normal_scale(id_scale, n: int, q: Tensor) -> tuple[float, ...] | Tensor:
    """Floats stay floats; tensors become float32 [n, B] on q's device.

    Args:
        id_scale: float, sequence of n floats, or tensor [], [n] or [n, B].
    """
    if isinstance(id_scale, Tensor):
        b = q.shape[0]
        if id_scale.device != q.device:
            raise InputError(
                f"id_attention: id_scale is on {id_scale.device}, q on {q.device}; move it with .to(q.device)"
            )
        s = id_scale.to(torch.float32)
        if s.dim() == 0:
            return s.expand(n, b)
        if s.dim() == 1 and s.shape[0] == n:
            return s[:, None].expand(n, b)
        if s.dim() == 2 and tuple(s.shape) == (n, b):
            return s
        raise InputError(
            f"id_attention: id_scale must be [], [n] = [{n}] or [n, B] = [{n}, {b}], got {_shape(id_scale)}"
        )
    if isinstance(id_scale, (int, float)):
        return (float(id_scale),) * n
    scales = tuple(float(s) for s in id_scale)
    if len(scales) != n:
        raise InputError(f"id_attention: {n} identities need {n} values of id_scale, got {len(scales)}")
    return scales


def _one_mask(m: Tensor | None, j: int, q: Tensor) -> Tensor:
    b, _, lq, _ = q.shape
    if m is None:
        return torch.ones(1, lq, device=q.device)
    if m.dim() == 1:
        m = m[None]
    if m.dim() != 2 or m.shape[1] != lq or m.shape[0] not in (1, b):
        raise InputError(
            f"id_attention: id_mask of identity {j} must be [1 or B, Lq] = [1 or {b}, {lq}], got {_shape(m)}"
        )
    if m.device != q.device:
        raise InputError(f"id_attention: id_mask of identity {j} is on {m.device}, q on {q.device}")
    return m.to(torch.float32)


def normal_mask(id_mask, n: int, q: Tensor) -> Tensor | None:
    """None, or float32 [n, 1 or B, Lq]. Accepts one mask for one identity, a sequence, or the stacked tensor."""
    if id_mask is None:
        return None
    if isinstance(id_mask, Tensor) and id_mask.dim() == 3:
        if id_mask.shape[0] != n or id_mask.shape[2] != q.shape[2] or id_mask.shape[1] not in (1, q.shape[0]):
            raise InputError(
                f"id_attention: stacked id_mask must be [n, 1 or B, Lq] = [{n}, 1 or {q.shape[0]}, {q.shape[2]}], "
                f"got {_shape(id_mask)}"
            )
        return id_mask.to(torch.float32)
    masks = [id_mask] if isinstance(id_mask, Tensor) else list(id_mask)
    if len(masks) != n:
        raise InputError(f"id_attention: {n} identities need {n} masks (None for everywhere), got {len(masks)}")
    if all(m is None for m in masks):
        return None
    rows = [_one_mask(m, j, q) for j, m in enumerate(masks)]
    width = max(r.shape[0] for r in rows)
    return torch.stack([r.expand(width, -1) for r in rows])


def _check_numbers(merge: str, num_zero: int, num_global: int, li: tuple[int, ...]) -> None:
    if merge not in MERGES:
        raise InputError(f"id_attention: merge must be one of {', '.join(MERGES)}, got {merge!r}")
    if not isinstance(num_zero, int) or num_zero < 0:
        raise InputError(f"id_attention: num_zero must be an integer >= 0, got {num_zero!r}")
    if not isinstance(num_global, int) or num_global < 1:
        raise InputError(f"id_attention: num_global must be an integer >= 1, got {num_global!r}")
    if any(n == 0 for n in li) and num_zero == 0:
        raise InputError("id_attention: an identity with no tokens needs num_zero >= 1, got Li = 0 and num_zero = 0")


def _check_text_bias(bias: Tensor, q: Tensor, lt: int) -> None:
    want = (q.shape[0], q.shape[1], q.shape[2], lt)
    fits = bias.dim() == 4 and all(x in (1, w) for x, w in zip(bias.shape, want, strict=True))
    if not fits:
        raise InputError(
            f"id_attention: text_bias must be broadcastable to [B, H, Lq, Lt] = {list(want)}, got {_shape(bias)}"
        )


def _check_bank(k: Tensor, v: Tensor) -> None:
    if k.dim() != 5 or v.dim() != 5 or k.shape[0] != v.shape[0] or k.shape[0] == 0:
        raise InputError(
            "id_attention: with stage= k_text and v_text must be banks [S, Bt, H, Lt, D] of the same S >= 1, "
            f"got {_shape(k)} and {_shape(v)}"
        )


def _pick_stage(k: Tensor, v: Tensor, stage: int) -> tuple[Tensor, Tensor]:
    if not 0 <= stage < k.shape[0]:
        raise InputError(f"id_attention: stage must be 0 to {k.shape[0] - 1} for this bank, got {stage}")
    return k[stage], v[stage]


def _normal_stage(stage: Tensor, q: Tensor, stages: int) -> Tensor:
    """int32 [1 or B]. Values are looked at where that costs no wait; kernels keep them inside the bank."""
    if not isinstance(stage, Tensor):
        raise InputError(f"id_attention: stage must be an int or an integer tensor, got {type(stage).__name__}")
    if stage.is_floating_point() or stage.dtype == torch.bool or stage.dim() > 1:
        raise InputError(
            f"id_attention: stage must be an integer tensor [], [1] or [B], got {stage.dtype} {_shape(stage)}"
        )
    if stage.numel() not in (1, q.shape[0]):
        raise InputError(f"id_attention: stage must hold 1 or B = {q.shape[0]} numbers, got {stage.numel()}")
    if stage.device != q.device:
        raise InputError(f"id_attention: stage is on {stage.device}, q on {q.device}; move it with .to(q.device)")
    check_stage_range(stage, stages)
    return stage.reshape(-1).to(torch.int32)


def check_stage_range(stage: Tensor, stages: int) -> None:
    """Raise InputError where the CPU can see an index outside of the bank."""
    if stage.device.type != "cpu" or torch.compiler.is_compiling():
        return
    values = stage.numpy()  # no operation is dispatched
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= stages:
        raise InputError(f"id_attention: stage must be 0 to {stages - 1} for this bank, got {low} to {high}")


def _check_text(q: Tensor, k: Tensor, v: Tensor) -> None:
    _check_kv("k_text", k, q, None)
    _check_kv("v_text", v, q, k.shape[2])
    if k.shape[2] == 0:
        raise InputError("id_attention: k_text must hold at least one token, got Lt = 0")


def _check_identities(q: Tensor, ks: tuple[Tensor, ...], vs: tuple[Tensor, ...]) -> None:
    if len(ks) != len(vs):
        raise InputError(
            f"id_attention: k_id and v_id must hold the same number of identities, got {len(ks)} and {len(vs)}"
        )
    for j, (k, v) in enumerate(zip(ks, vs, strict=True)):
        _check_kv(f"k_id[{j}]", k, q, None)
        _check_kv(f"v_id[{j}]", v, q, k.shape[2])
        if v.shape[0] != k.shape[0]:
            raise InputError(f"id_attention: v_id[{j}] must have k_id[{j}]'s batch {k.shape[0]}, got {v.shape[0]}")


def normalize(
    q, k_text, v_text, k_id, v_id, *, id_scale, id_mask, merge, num_zero, num_global, text_bias, stage=None
) -> Args:
    """Check shapes, dtypes and devices once; raise `InputError` with what was wanted and what came."""
    for name, t in (("q", q), ("k_text", k_text), ("v_text", v_text)):
        if not isinstance(t, Tensor):
            raise InputError(f"id_attention: {name} must be a torch tensor, got {type(t).__name__}")
    if q.dim() != 4:
        raise InputError(f"id_attention: q must be [B, H, Lq, D], got {_shape(q)}")
    if not q.dtype.is_floating_point:
        raise InputError(f"id_attention: q must be float32, bfloat16, float16 or float64, got {q.dtype}")
    if stage is not None:
        _check_bank(k_text, v_text)
    if isinstance(stage, int):
        k_text, v_text = _pick_stage(k_text, v_text, stage)
        stage = None
    if stage is not None:
        stage = _normal_stage(stage, q, k_text.shape[0])
    _check_text(q, *((k_text, v_text) if stage is None else (k_text[0], v_text[0])))
    ks, vs = _as_tuple(k_id), _as_tuple(v_id)
    _check_identities(q, ks, vs)
    _check_numbers(merge, num_zero, num_global, tuple(k.shape[2] for k in ks))
    if text_bias is not None:
        _check_text_bias(text_bias, q, k_text.shape[-2])
    scale = normal_scale(id_scale, len(ks), q)
    mask = normal_mask(id_mask, len(ks), q)
    return Args(q, k_text, v_text, ks, vs, scale, mask, text_bias, merge, num_zero, num_global, stage)
