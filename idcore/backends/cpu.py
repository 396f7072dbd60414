"""`id_attention` by the compiled CPU kernels (csrc/cpu): one pass over q, text and identities fused.

float32, bfloat16 and float16 in and out, float32 inside; with AVX512_BF16 the products of bfloat16 calls take
bfloat16 operands. Threads are PyTorch's: the kernels use the OpenMP runtime that torch has loaded, so
`torch.set_num_threads` counts for both. Results are bitwise the same for any number of threads.

After `os.fork` a child of a process that has run parallel loops must call `torch.set_num_threads(1)` first, or
start by "spawn": GNU OpenMP cannot rebuild its threads in a forked child. PyTorch itself has the same limit.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from .call import Args, Call, Stats, stats_shapes
from .native import DTYPES, MAX_IDENTITIES, addresses, call_tuples, head_tensor

NAME = "cpu"
DIFFERENTIABLE = False

MAX_HEAD_DIM = 256


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    """The compiled module, or None and why it is not usable. torch is imported before, so both share one OpenMP."""
    try:
        from .. import _C
    except ImportError as e:
        return None, f"the compiled module idcore._C cannot be loaded ({e}); build it with `pip install -e .`"
    try:
        _C.cpu_isa()
    except ValueError as e:
        return None, f"{e}; unset IDCORE_CPU_ISA or take one of {', '.join(_C.compiled_isas())}"
    return _C, ""


def why_not(call: Call) -> list[str]:
    """Reasons why these kernels cannot run the call."""
    reasons = []
    if call.device != "cpu":
        reasons.append(f"device={call.device} (runs on cpu)")
    if call.dtype not in DTYPES:
        reasons.append(f"dtype={str(call.dtype).removeprefix('torch.')} (needs float32, bfloat16 or float16)")
    if call.head_dim > MAX_HEAD_DIM:
        reasons.append(f"head_dim={call.head_dim} (at most {MAX_HEAD_DIM})")
    if len(call.li) > MAX_IDENTITIES:
        reasons.append(f"{len(call.li)} identities (at most {MAX_IDENTITIES})")
    if not call.dense_last_dim:
        reasons.append("the head dim of q, k or v is not contiguous (call .contiguous() on it)")
    if _load()[0] is None:
        reasons.append(_load()[1])
    return reasons


def forward(a: Args, out: Tensor | None = None) -> Tensor:
    """[B, H, Lq, D], dtype of q, in memory order B, Lq, H, D; written into `out` if given."""
    return _run(a, out, None)


def forward_stats(a: Args, out: Tensor | None = None) -> tuple[Tensor, Stats]:
    """`forward`, and what `backward` needs of it."""
    shapes = stats_shapes(a)
    stats = Stats(*(s and torch.empty(s, dtype=torch.float32) for s in shapes))
    return _run(a, out, stats), stats


def _run(a: Args, out: Tensor | None, stats: Stats | None) -> Tensor:
    q = a.q
    b, h, lq, d = q.shape
    direct = out is not None and (out.stride(3) == 1 or d == 1)
    result = out if direct else q.new_empty(b, lq, h, d).transpose(1, 2)
    tuples, keep = call_tuples(a, result)
    if stats is None:
        _load()[0].id_attention_cpu(*tuples)
    else:
        _load()[0].id_attention_cpu_stats(*tuples, addresses(stats))
    del keep
    return result if out is None or direct else out.copy_(result)


def backward(a: Args, g: Tensor, stats: Stats, *, text_kv: bool = True, id_kv: bool = True):
    """Gradients in the form of `reference_bwd.backward`, from the statistics of `forward_stats`.

    Args:
        g: gradient of the output. [B, H, Lq, D]
        text_kv, id_kv: False leaves those gradients out (None in their places), for frozen projections.

    Returns:
        (dq, dk_text, dv_text, dks, dvs, dscale): dq in memory order B, Lq, H, D, the others contiguous; dscale
        float32 [n, B].
    """
    b, h, lq, d = a.q.shape
    n = len(a.k_id)
    g = g.to(a.q.dtype) if g.stride(3) == 1 or d == 1 else g.to(a.q.dtype).contiguous()
    new = torch.zeros if a.q.numel() == 0 else torch.empty
    dq = a.q.new_empty(b, lq, h, d).transpose(1, 2)
    dkt, dvt = (new(t.shape, dtype=t.dtype) if text_kv else None for t in (a.k_text, a.v_text))
    dks, dvs = ([new(t.shape, dtype=t.dtype) if id_kv else None for t in side] for side in (a.k_id, a.v_id))
    dscale = new((n, b), dtype=torch.float32)
    tuples, keep = call_tuples(a, dq)
    grads = (head_tensor(g), head_tensor(dq), *addresses((dkt, dvt)), addresses(dks), addresses(dvs), dscale.data_ptr())
    _load()[0].id_attention_cpu_bwd(*tuples, addresses(stats), grads)
    del keep
    return dq, dkt, dvt, dks, dvs, dscale
