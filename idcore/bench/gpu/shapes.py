"""The calls of `id_attention` that the GPU parts run."""

from __future__ import annotations

import argparse

from ...testing.cases import SDXL_LAYERS, Case, random_case
from .. import ops

HEAD_DIMS = (40, 64, 80, 128, 160)
MERGES = ("add", "ortho", "ortho_v2")
BASE = Case("race", "bench gpu", batch=2, heads=2, li=(5, 32), id_batch=2, num_zero=8, mask=True, scale=0.7)

# 60 calls whose bits must not change: every head dim, merge and dtype, a long and a short sequence with a tail.
RACES = tuple(
    BASE.with_(name=f"d{d}-{merge}-{dtype}-{lq}", head_dim=d, merge=merge, dtype=dtype, lq=lq)
    for d in HEAD_DIMS for merge in MERGES for dtype in ("fp16", "bf16") for lq in (1025, 333)
)  # fmt: skip

# Those of them whose gradients are repeated: one of each head dim, all merges.
TRAINED = tuple(RACES[i] for i in (0, 20, 29, 44, 58))


def _taken(case: Case) -> bool:
    return case.dtype != "fp32" and case.head_dim in HEAD_DIMS and case.batch > 0 and case.lq > 0


# 40 small random calls, all of which both backends take, for compute-sanitizer.
SANITIZED = tuple(case for case in map(random_case, range(600)) if _taken(case))[:40]

# What is timed: the layers of SDXL at 1024 px, one picture and a guided pair, and four pairs for the bandwidth.
TIMED = tuple(
    layer.with_(dtype=dtype, batch=batch, text_batch=batch, merge=merge, num_zero=8)
    for layer in SDXL_LAYERS for dtype, batch in (("bf16", 1), ("bf16", 2), ("bf16", 8), ("fp16", 2))
    for merge in MERGES
)  # fmt: skip
# The 70 cross-attention layers of SDXL's UNet at 1024 px, as (layer, how often).
UNET = ((SDXL_LAYERS[0], 10), (SDXL_LAYERS[1], 60))

# Every op forward and backward on Triton, timed by the CPU benchmark's code.
OPTIONS = argparse.Namespace(
    backend="triton", against=("eager",), dtype=("bf16",), cases=tuple(c.name for c, _ in UNET),
    merge=("add", "ortho_v2"), batch=(2,), num_zero=8, clock="wall", rounds=20, passes=("fwd", "bwd"),
)  # fmt: skip
OPS = tuple(case for cases in ops.OPS.values() for case in cases(OPTIONS))
