"""What is known of an `id_attention` call: checked once per combination of shapes, dtypes and devices.

A UNet repeats a few dozen calls for every step; looking up their facts costs a fraction of checking them again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.call import Args, Call, facts
from ..backends.checks import check_stage_range, normalize

MOST = 4096  # combinations that are remembered (our choice)
_known: dict[tuple, Call] = {}


def _remembered_as(
    tensors: tuple, stage: Tensor | None, merge: object, num_zero: object, num_global: object
) -> tuple | None:
    """All that `normalize` and `facts` look at in a plain call; None where something is not what it should be.

    With a stage the second and third tensor are banks, of five dimensions.
    """
    if type(merge) is not str or type(num_zero) is not int or type(num_global) is not int:
        return None
    key: list = [torch.is_grad_enabled(), merge, num_zero, num_global]
    banks = () if stage is None else (1, 2)
    for i, t in enumerate(tensors):
        if not isinstance(t, Tensor) or t.dim() != (5 if i in banks else 4):
            return None
        key += (t.shape, t.stride(-1) == 1, t.dtype, t.device, t.requires_grad)
    if stage is not None:
        key += (stage.shape, stage.device)
    return tuple(key)


def _plain_group(x: object) -> tuple | None:
    """A tuple of what stands for tensors, or None where it takes a closer look."""
    if isinstance(x, Tensor):
        return (x,)
    return tuple(x) if type(x) in (tuple, list) else () if x is None else None


def _plain_stage(stage: object) -> bool:
    """Whether a stage is as kernels read it: its form needs no change, only its values a look."""
    return isinstance(stage, Tensor) and stage.dtype == torch.int32 and stage.dim() == 1


def _plain_scale(id_scale: object, n: int) -> tuple[float, ...] | None:
    """n floats, or None where it takes a closer look."""
    if type(id_scale) in (float, int):
        return (float(id_scale),) * n
    if type(id_scale) is tuple and len(id_scale) == n and all(type(s) is float for s in id_scale):
        return id_scale
    return None


def checked(
    q, k_text, v_text, k_id, v_id, *, id_scale, id_mask, merge, num_zero, num_global, text_bias, stage
) -> tuple[Args, Call]:
    """`normalize` and `facts` of a call that is not being traced; arguments and errors are those of `normalize`.

    Calls with masks, biases or scales in a tensor are checked every time, and so are stages that are no int32 [1 or B].
    """
    key = None
    if id_mask is None and text_bias is None and (stage is None or _plain_stage(stage)):
        ks, vs = _plain_group(k_id), _plain_group(v_id)
        scale = None if ks is None else _plain_scale(id_scale, len(ks))
        if scale is not None and vs is not None and len(ks) == len(vs):
            key = _remembered_as((q, k_text, v_text, *ks, *vs), stage, merge, num_zero, num_global)
        call = None if key is None else _known.get(key)
        if call is not None:
            if stage is not None:
                check_stage_range(stage, k_text.shape[0])
            return Args(q, k_text, v_text, ks, vs, scale, None, None, merge, num_zero, num_global, stage), call
    a = normalize(
        q, k_text, v_text, k_id, v_id, id_scale=id_scale, id_mask=id_mask, merge=merge, num_zero=num_zero,
        num_global=num_global, text_bias=text_bias, stage=stage,
    )  # fmt: skip
    call = facts(a)
    if key is not None:
        if len(_known) >= MOST:
            _known.clear()
        _known[key] = call
    return a, call
