"""The calls of `id_attention` that are timed: the cross-attention layers of the SDXL UNet, by merge and dtype."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from ..testing.cases import MERGES, MODEL_CASES, SDXL_LAYERS, Case

CASES = {case.name: case for case in MODEL_CASES}
DEFAULT_CASES = tuple(case.name for case in SDXL_LAYERS)
__all__ = ["CASES", "DEFAULT_CASES", "MERGES", "cases"]


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """One case per dtype, layer, batch and merge."""
    for dtype in options.dtype:
        for name in options.cases:
            for batch in options.batch:
                for merge in options.merge:
                    zeros = 0 if merge == "none" else options.num_zero
                    yield CASES[name].with_(dtype=dtype, batch=batch, merge=merge, num_zero=zeros, text_batch=batch)
