"""Is a backend right? Its error against float64 may be at most twice that of eager PyTorch in the same dtype.

The rule has no hand-picked tolerance: truth is the reference backend in float64 on the same rounded inputs, eager is
`idcore.testing.eager`, and a floor (1e-6 for float32, 1e-5 for 16 bit) covers shapes at which eager is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops import id_attention
from .cases import DTYPES, Case, make_inputs
from .eager import eager_id_attention

FLOOR = {"fp32": 1e-6, "bf16": 1e-5, "fp16": 1e-5}


@dataclass(frozen=True)
class Parity:
    """Largest absolute errors against float64, relative to the largest magnitude of the truth where that is above 1."""

    error: float
    eager_error: float
    limit: float
    finite: bool

    @property
    def ok(self) -> bool:
        """Within the rule, and no NaN was left where a number belongs."""
        return self.finite and self.error <= self.limit


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, tuple) and value and isinstance(value[0], Tensor):
        return tuple(v.double() for v in value)
    return value


def truth(given: dict[str, Any]) -> Tensor:
    """The reference backend in float64. [B, H, Lq, D]"""
    kept = ("id_scale", "id_mask", "text_bias")
    wide = {name: value if name in kept else _double(value) for name, value in given.items()}
    return id_attention(**wide, backend="reference")


def _error(got: Tensor, want: Tensor) -> float:
    if want.numel() == 0:
        return 0.0
    return ((got.double() - want).abs().max() / want.abs().max().clamp_min(1.0)).item()


def poisoned(like: Tensor) -> Tensor:
    """A result tensor full of NaN in memory order B, Lq, H, D."""
    b, h, lq, d = like.shape
    return like.new_full((b, lq, h, d), float("nan")).transpose(1, 2)


@torch.no_grad()
def check_parity(case: Case, backend: str, *, seed: int = 0, device: str = "cpu") -> Parity:
    """Run a case on a backend into a NaN-poisoned result and judge it by the rule."""
    given = make_inputs(case, seed, device)
    want = truth(given)
    got = id_attention(**given, backend=backend, out=poisoned(given["q"]))
    finite = bool(torch.isfinite(got).all()) if bool(torch.isfinite(want).all()) else True
    eager_error = _error(eager_id_attention(**given), want)
    return Parity(_error(got, want), eager_error, 2.0 * eager_error + FLOOR[case.dtype], finite)


def assert_parity(case: Case, backend: str, *, seed: int = 0, device: str = "cpu") -> Parity:
    """As `check_parity`; raises AssertionError with a line that reproduces the failure."""
    result = check_parity(case, backend, seed=seed, device=device)
    if not result.ok:
        raise AssertionError(
            f"{backend}: error {result.error:.3g} above {result.limit:.3g} (eager {result.eager_error:.3g}), "
            f"finite={result.finite}\nreproduce: from idcore.testing import Case, assert_parity; "
            f"assert_parity({case!r}, {backend!r}, seed={seed}, device={device!r})"
        )
    return result


__all__ = ["DTYPES", "Parity", "assert_parity", "check_parity", "poisoned", "truth"]
