"""Times `kv_bank` with the weights in one block against two linear layers per site."""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import kv_bank
from ..ops.kv_bank import lay_out
from ..testing.cases import DTYPES
from .rows import figures

LAYERS, HIDDEN, HEADS, WIDTH = 10, 1280, 20, 2048  # SDXL's block of 10; its 70 layers hold 6.5 times as many weights
TOKENS = ((2, 32), (2, 77))  # an identity's, the text's: guidance halves
Weights = list[tuple[Tensor, Tensor]]


def _per_layer(context: Tensor, weights: Weights) -> list[Tensor]:
    return [
        F.linear(context, w).unflatten(-1, (HEADS, -1)).transpose(1, 2).contiguous() for pair in weights for w in pair
    ]


def _errors(context: Tensor, weights: Weights) -> tuple[float, float]:
    """Ours and that of two linear layers a site, against float64, relative to the largest value."""
    ours = [t for pair in kv_bank(context, weights, [HEADS] * LAYERS) for t in pair]
    truth = _per_layer(context.double(), [(k.double(), v.double()) for k, v in weights])
    size = max(t.abs().max().item() for t in truth)
    both = (ours, _per_layer(context, weights))
    return tuple(max((a - t).abs().max().item() for a, t in zip(some, truth, strict=True)) / size for some in both)


def _row(context: Tensor, weights: Weights, dtype: str, options: argparse.Namespace, gflops: float | None, gb: float):
    batch, length, _ = context.shape
    error, eager = _errors(context, weights)
    head = {
        "op": "kv_bank", "case": f"sdxl-{LAYERS}x{HIDDEN}-{length}", "backend": "torch", "dtype": dtype, "merge": None,
        "batch": batch, "pass": "fwd",
    }  # fmt: skip
    calls = {"ours": lambda: kv_bank(context, weights, [HEADS] * LAYERS)}
    if "eager" in options.against:
        calls["eager"] = lambda: _per_layer(context, weights)
    values = 2 * LAYERS * HIDDEN * WIDTH
    arithmetic = 2 * batch * length * values / gflops if gflops else 0.0
    floor = max(arithmetic, values * context.element_size() / gb) * 1e-6
    limit = 2 * eager + (1e-6 if dtype == "fp32" else 1e-5)
    return figures(head, error, limit, calls, floor, options, context.device.type)


def rows(
    options: argparse.Namespace, device: str, peaks: dict[str, float | None], gb_per_s: float
) -> list[dict[str, Any]]:
    """One row per dtype and number of tokens. The op is made of PyTorch's products on every device."""
    found = []
    for dtype in options.dtype if "fwd" in options.passes else ():
        gen = torch.Generator().manual_seed(0)
        flat = [torch.randn(HIDDEN, WIDTH, generator=gen).to(device, DTYPES[dtype]) for _ in range(2 * LAYERS)]
        lay_out(flat)
        weights = list(zip(flat[::2], flat[1::2], strict=True))
        for batch, length in TOKENS:
            context = torch.randn(batch, length, WIDTH, generator=gen).to(device, DTYPES[dtype])
            found.append(_row(context, weights, dtype, options, peaks[dtype], gb_per_s))
    return found
