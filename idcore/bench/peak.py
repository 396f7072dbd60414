"""What the machine reaches: the yardsticks that shares and floors refer to."""

from __future__ import annotations

from typing import Any

from ..errors import MissingDependencyError
from ..testing.timing import copy_bandwidth


def _module():
    import torch  # noqa: F401  (first, so that one OpenMP runtime serves both)

    try:
        from .. import _C
    except ImportError as e:
        raise MissingDependencyError(
            f"bench peak: the compiled module does not load ({e}); build it with pip install ."
        ) from e
    return _C


def gflops(threads: int, dtype: str = "fp32", windows: int = 15) -> float:
    """Multiply-add rate in registers of the instruction set in use, over `threads` threads: the best of some windows.

    bf16 means the bf16 dot product where the instruction set has one, else what fp32 reaches.
    """
    return max(_module().cpu_peak_gflops(threads, 0.01, dtype == "bf16") for _ in range(windows))


def rows(threads: int) -> list[dict[str, Any]]:
    """One row per usable instruction set and operand type, and the copy bandwidth."""
    module, found = _module(), []
    before = module.cpu_isa()
    try:
        for isa in module.usable_isas():
            module.set_cpu_isa(isa)
            for dtype in ("fp32", "bf16") if isa.endswith("bf16") else ("fp32",):
                rate = round(gflops(threads, dtype), 1)
                found.append({"what": "multiply-adds", "isa": isa, "dtype": dtype, "gflops": rate})
    finally:
        module.set_cpu_isa(before)
    found.append({"what": "copy", "gb_per_s": round(copy_bandwidth(), 1)})
    return found
