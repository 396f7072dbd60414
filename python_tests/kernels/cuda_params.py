"""`csrc/id_attention.h` in ctypes: the C struct of validated arguments,
for tests that call the C++ side directly."""

from __future__ import annotations

import ctypes as c

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MERGES = {"add": 0, "ortho": 1, "ortho_v2": 2}


def struct(name: str, **fields):
    """A ctypes structure of these fields."""
    return type(name, (c.Structure,), {"_fields_": list(fields.items())})


HeadTensor = struct(
    "HeadTensor", data=c.c_void_p, batch=c.c_int64, stride_batch=c.c_int64, stride_head=c.c_int64, stride_row=c.c_int64
)
TextBias = struct(
    "TextBias", data=c.c_void_p, dtype=c.c_int32, stride_batch=c.c_int64, stride_head=c.c_int64,
    stride_row=c.c_int64,
    stride_token=c.c_int64,
)  # fmt: skip
Identity = struct(
    "Identity", k=HeadTensor, v=HeadTensor, length=c.c_int64, scale=c.c_float, scale_data=c.c_void_p,
    scale_stride=c.c_int64, mask=c.c_void_p, mask_stride_batch=c.c_int64, mask_stride_row=c.c_int64,
)  # fmt: skip
StageBank = struct(
    "StageBank", index=c.c_void_p, count=c.c_int64, stride=c.c_int64, k_stride=c.c_int64, v_stride=c.c_int64
)
Params = struct(
    "Params", dtype=c.c_int32, merge=c.c_int32, batch=c.c_int64, heads=c.c_int64, lq=c.c_int64, lt=c.c_int64,
    head_dim=c.c_int64, num_zero=c.c_int32, num_global=c.c_int32, num_identities=c.c_int32, q=HeadTensor,
    k_text=HeadTensor, v_text=HeadTensor, out=HeadTensor, text_bias=TextBias, identity=Identity * 16,
    stage=StageBank,
)  # fmt: skip


def head_tensor(t: torch.Tensor) -> HeadTensor:
    assert t.stride(-1) == 1
    return HeadTensor(t.data_ptr(), t.shape[-4], *t.stride()[-4:-1])


def params(a, out: torch.Tensor) -> Params:
    """The struct; keeps no reference, so `a` and `out` must outlive it."""
    b, h, lq, d = a.q.shape
    p = Params(
        DTYPES[a.q.dtype], MERGES[a.merge], b, h, lq, a.text_length, d, a.num_zero, a.num_global,
        len(a.k_id),
        head_tensor(a.q), head_tensor(a.k_text), head_tensor(a.v_text), head_tensor(out),
    )  # fmt: skip
    if a.text_bias is not None:
        t = a.text_bias
        steps = [s if n > 1 else 0 for s, n in zip(t.stride(), t.shape)]
        p.text_bias = TextBias(t.data_ptr(), DTYPES[t.dtype], *steps)
    for j, (k, v) in enumerate(zip(a.k_id, a.v_id)):
        i = Identity(head_tensor(k), head_tensor(v), k.shape[2])
        if isinstance(a.scale, torch.Tensor):
            i.scale_data = a.scale[j].data_ptr()
            i.scale_stride = a.scale.stride(1)
        else:
            i.scale = a.scale[j]
        if a.mask is not None:
            m = a.mask[j]
            i.mask, i.mask_stride_row = m.data_ptr(), m.stride(1)
            i.mask_stride_batch = m.stride(0) if m.shape[0] > 1 else 0
        p.identity[j] = i
    if a.stage is not None:
        per_sample = a.stage.stride(0) if a.stage.shape[0] > 1 else 0
        p.stage = StageBank(a.stage.data_ptr(), a.k_text.shape[0], per_sample, a.k_text.stride(0), a.v_text.stride(0))
    return p
