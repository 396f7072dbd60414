"""`id_attention` in Triton: forward and backward on NVIDIA GPUs, sm_80 or newer.

On the CPU it runs under TRITON_INTERPRET=1, for tests.

Triton and the kernels are imported by the first call, never by importing this module.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import shutil
from types import ModuleType

import torch
from torch import Tensor

from .call import Args, Call, Stats

NAME = "triton"
DIFFERENTIABLE = False

# float32 tiles above would spill
MAX_HEAD_DIM = {torch.float32: 128, torch.bfloat16: 256, torch.float16: 256}
MIN_VERSION = (3, 4)  # constant tuples as kernel arguments; 3.3 cannot index them


def interpreted() -> bool:
    """True where kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _installation() -> tuple[str, ...]:
    """What the installation lacks, whatever the call."""
    if importlib.util.find_spec("triton") is None:
        return ("Triton is not installed (pip install 'triton>=3.4')",)
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("triton")
    except PackageNotFoundError:
        found = "3.4"  # a build without metadata: let it try
    if tuple(int(x) for x in found.split(".")[:2]) < MIN_VERSION:
        return (f"Triton {found} is too old (needs 3.4 or newer, which PyTorch 2.8 and newer bring)",)
    if importlib.util.find_spec("idcore.kernels") is None:
        return ("the kernels are not part of this installation (idcore.kernels); reinstall idcore",)
    return ()


@functools.cache
def _compiler_missing() -> bool:
    """Triton builds a small launcher in C at the first launch."""
    return not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc"))


def unusable(device: str) -> list[str]:
    """Reasons against running any call on this device type."""
    reasons = list(_installation())
    if device == "cpu" and not interpreted():
        reasons.append("tensors are on the CPU (needs a CUDA device; TRITON_INTERPRET=1 runs it slowly, for tests)")
    elif device not in ("cpu", "cuda"):
        reasons.append(f"device={device} (needs cuda)")
    if device == "cuda":
        if torch.version.hip:
            reasons.append("PyTorch is a ROCm build (the kernels are compiled for NVIDIA GPUs only)")
        elif not torch.cuda.is_available():
            reasons.append("no usable CUDA device (no driver, no GPU, or a PyTorch without CUDA)")
        elif torch.cuda.get_device_capability()[0] < 8:
            reasons.append("the GPU is older than sm_80")
        if _compiler_missing():
            reasons.append("no C compiler for Triton's launcher (install gcc or clang, or set CC)")
    return reasons


def why_not(call: Call) -> list[str]:
    """Reasons against running the call here."""
    reasons = unusable(call.device)
    dtype = str(call.dtype).removeprefix("torch.")
    if call.dtype not in MAX_HEAD_DIM:
        reasons.append(f"dtype={dtype} (needs float32, bfloat16 or float16)")
    elif call.batch * call.heads > 65535:
        reasons.append(f"{call.batch} samples of {call.heads} heads (at most 65535 together: the third grid dimension)")
    elif call.head_dim > MAX_HEAD_DIM[call.dtype]:
        reasons.append(f"head_dim={call.head_dim} (at most {MAX_HEAD_DIM[call.dtype]} for {dtype})")
    return reasons


def _launch(name: str = "launch") -> ModuleType:
    return importlib.import_module(f"idcore.kernels.{name}")


def forward(a: Args, out: Tensor | None = None) -> Tensor:
    """[B, H, Lq, D], dtype of q."""
    return _launch().forward(a, out)


def forward_stats(a: Args, out: Tensor | None = None) -> tuple[Tensor, Stats]:
    """`forward`, and the float32 statistics (`call.Stats`) that spare `backward` a pass."""
    return _launch().forward_stats(a, out)


def backward(a: Args, g: Tensor, stats: Stats, *, text_kv: bool = True, id_kv: bool = True):
    """Gradients in the form of `reference_bwd.backward`.

    Args:
        g: gradient of the output. [B, H, Lq, D]
        stats: of `forward_stats`.
        text_kv, id_kv: False leaves those gradients out (None in their places), for frozen projections.
    """
    return _launch("launch_bwd").backward(a, g, stats, text_kv=text_kv, id_kv=id_kv)
