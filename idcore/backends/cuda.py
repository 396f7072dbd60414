"""`id_attention` by the compiled CUDA kernels (csrc/cuda): forward for inference in float16 and bfloat16.

One launch for "add"; one for "ortho" and "ortho_v2" where the grid fits the device at once (a cooperative launch, the
tiles' results kept on the chip), else two; two as well once a device has refused such a launch. The kernels allocate
nothing and wait for nothing, so a call may be captured in a CUDA graph (scratch memory comes from PyTorch's allocator,
which a capture keeps alive). Stage indices and tensor scales are read from device memory when the kernels run.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from . import native
from .call import Args, Call

NAME = "cuda"
DIFFERENTIABLE = False

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (40, 64, 80, 128, 160)


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    """The compiled module with the CUDA kernels, or None and why there is none."""
    try:
        from .. import _C
    except ImportError as e:
        return None, f"the compiled module idcore._C cannot be loaded ({e}); build it with `pip install -e .`"
    if not hasattr(_C, "id_attention_cuda"):
        return None, "built without CUDA; put nvcc on the PATH and build again: IDCORE_CUDA=ON pip install -e ."
    return _C, ""


@functools.cache
def _device_reasons() -> tuple[str, ...]:
    """What the machine lacks; asked once."""
    if not torch.cuda.is_available():
        return ("no usable CUDA device (no driver, no GPU, or a PyTorch without CUDA)",)
    if torch.cuda.get_device_capability()[0] < 8:
        return ("the GPU is older than sm_80",)
    problem = _load()[0].id_attention_cuda_problem() if _load()[0] else None
    if problem:
        built = _load()[0].build_info()
        return (
            f"the compiled kernels (CUDA {built['cuda_compiler']}, {', '.join(built['cuda_archs'])}) do not run on "
            f"this GPU and driver ({problem}); build again on this machine: IDCORE_CUDA=ON pip install -e .",
        )
    return ()


def why_not(call: Call) -> list[str]:
    """Reasons why these kernels cannot run the call."""
    reasons = []
    if call.device != "cuda":
        reasons.append(f"device={call.device} (runs on cuda)")
    else:
        reasons.extend(_device_reasons())
    if _load()[0] is None:
        reasons.append(_load()[1])
    if call.dtype not in DTYPES:
        dtype = str(call.dtype).removeprefix("torch.")
        reasons.append(f"dtype={dtype} (bfloat16 or float16: the kernels use 16-bit tensor cores)")
    if call.head_dim not in HEAD_DIMS:
        reasons.append(f"head_dim={call.head_dim} (one of {', '.join(map(str, HEAD_DIMS))})")
    if len(call.li) > native.MAX_IDENTITIES:
        reasons.append(f"{len(call.li)} identities (at most {native.MAX_IDENTITIES})")
    if max(call.heads, call.batch) > 65535:
        reasons.append("more than 65535 heads or samples")
    if not call.dense_last_dim:
        reasons.append("the head dim of q, k or v is not contiguous (call .contiguous() on it)")
    if call.needs_grad:
        reasons.append("gradients are recorded (forward only; the triton backend has both)")
    return reasons


def call_tuples(a: Args, result: Tensor) -> tuple[tuple, Tensor | None]:
    """As in `native.call_tuples`; these kernels read text_bias in float32 or q's dtype."""
    return native.call_tuples(a, result, (torch.float32, a.q.dtype))


def launches(a: Args) -> int:
    """Kernels that `forward` starts for this call on the tensors' device."""
    with torch.cuda.device(a.q.device):
        tuples, _ = call_tuples(a, torch.empty_like(a.q))
        return _load()[0].id_attention_cuda_plan(*tuples)[1]


def forward(a: Args, out: Tensor | None = None) -> Tensor:
    """[B, H, Lq, D], dtype of q, in memory order B, Lq, H, D; written into `out` if given."""
    module, q = _load()[0], a.q
    b, h, lq, d = q.shape
    direct = out is not None and out.stride(3) == 1
    result = out if direct else q.new_empty(b, lq, h, d).transpose(1, 2)
    with torch.cuda.device(q.device):
        tuples, keep = call_tuples(a, result)
        stream = torch.cuda.current_stream().cuda_stream
        while True:  # again where the device refuses the one launch that was planned
            size = module.id_attention_cuda_plan(*tuples)[0] if a.merge != "add" else 0
            scratch = torch.empty(size, dtype=torch.uint8, device=q.device)
            if module.id_attention_cuda(*tuples, scratch.data_ptr(), size, stream):
                break
    del keep  # freed in stream order by PyTorch's allocator
    return result if out is None or direct else out.copy_(result)
