"""Is a backend right? Its error against float64 may be at most twice that of eager PyTorch in the same dtype.

The rule has no hand-picked tolerance: truth is float64 on the same rounded inputs, eager is `idcore.testing.eager`, and
a floor (1e-6 for float32, 1e-5 for 16 bit) covers shapes at which eager is exact. Gradients likewise, but the floor
counts from the largest gradient of the call, since one of them may be the small difference of large terms; in 16 bit it
is half the unit roundoff, since a gradient is rounded once more and eager may be lucky.

GPU kernels may round to 16 bit between two passes (h of ortho, probabilities before a tensor-core product), PyTorch's
own attention does so between its ops, and ortho's alpha is a quotient of small sums where there are few image tokens.
So what fails the rule is judged again, by `DRAWS` near calls, whose inputs are off by about one rounding. Eager's error
is then its largest, that of the call with its channels in reverse order (the same numbers, rounded otherwise) and those
of the near calls, each against its own truth, among them: where large terms cancel, eager may be lucky once. Added is
the largest effect that one rounding of the inputs has on the float64 truth: once for `cpu` and `reference`, four times
for the others, whose gradients may then be off by three times eager's error, those of an ill-posed call
(`Case.ill_posed`) by six times on every backend.

Works for every op: a case knows its inputs, its op, its eager form and its truth.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops import id_attention
from .cases import DTYPES, Case

FLOOR = {"fp32": 1e-6, "bf16": 1e-5, "fp16": 1e-5}
UNIT_ROUNDOFF = {"fp32": 2.0**-24, "bf16": 2.0**-8, "fp16": 2.0**-11}
GRADIENT_FLOOR = {"fp32": 1e-6, "bf16": 2.0**-9, "fp16": 2.0**-12}
DRAWS = 4  # near calls of the second look (our choice)
ROUNDINGS = {"cpu": 1.0, "reference": 1.0}  # of the inputs, granted at the second look; others get 4


@dataclass(frozen=True)
class Parity:
    """Largest absolute errors against float64, relative to the largest magnitude of the truth where that is above 1."""

    error: float
    eager_error: float
    limit: float
    finite: bool
    what: str = "out"  # or the gradient's name

    @property
    def ok(self) -> bool:
        """Within the rule, and no NaN was left where a number belongs."""
        return self.finite and self.error <= self.limit


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every tensor that PyTorch allocates without a value holds NaN: what a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill


def poisoned(like: Tensor) -> Tensor:
    """A result tensor full of NaN in memory order B, Lq, H, D."""
    b, h, lq, d = like.shape
    return like.new_full((b, lq, h, d), float("nan")).transpose(1, 2)


def _double(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_double(v) for v in value)
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _widened(given: dict[str, Any], kept: tuple[str, ...] = ("id_scale", "id_mask", "text_bias")) -> dict[str, Any]:
    """Inputs in float64; scales, masks and biases stay: every backend takes them in float32."""
    return {name: value if name in kept else _double(value) for name, value in given.items()}


def truth(given: dict[str, Any]) -> Tensor:
    """`id_attention` by the reference backend in float64. [B, H, Lq, D]"""
    return id_attention(**_widened(given), backend="reference")


def _error(got: Tensor, want: Tensor, size: float | None = None) -> float:
    if want.numel() == 0:
        return 0.0
    largest = want.abs().max().clamp_min(1.0) if size is None else size
    return float((got.double() - want).abs().max() / largest)


def _all_finite(got: Tensor, *others: Tensor) -> bool:
    """Whether got is finite where the truth is and eager is (float16 overflows where float64 does not)."""
    return bool(torch.isfinite(got).all()) or not all(bool(torch.isfinite(t).all()) for t in others)


def _moved_by_a_rounding(given: dict[str, Any], dtype: str, names: tuple[str, ...], draw: int = 0) -> dict[str, Any]:
    """Float64 inputs, those named moved by about one rounding of the dtype."""
    gen = torch.Generator().manual_seed(7 + draw)

    def move(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(move(v) for v in value)
        if not isinstance(value, Tensor) or value.dtype != torch.float64:
            return value
        noise = torch.randn(value.shape, generator=gen, dtype=torch.float64).to(value.device)
        return value * (1 + UNIT_ROUNDOFF[dtype] * noise)

    return {name: move(value) if name in names else value for name, value in given.items()}


def _rounded(given: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """Values in the dtypes of others."""

    def cast(value: Any, to: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(cast(v, t) for v, t in zip(value, to, strict=True))
        return value.to(to.dtype) if isinstance(value, Tensor) else value

    return {name: cast(value, like[name]) for name, value in given.items()}


def _mirrored(value: Any) -> Any:
    """[.., H, L, D] with its channels in reverse order; other shapes as they are."""
    if isinstance(value, tuple):
        return tuple(_mirrored(v) for v in value)
    return value.flip(-1) if isinstance(value, Tensor) and value.dim() >= 4 else value


def _mirror(given: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: _mirrored(value) if name in names else value for name, value in given.items()}


@torch.no_grad()
def check_parity(case: Any, backend: str | None, *, seed: int = 0, device: str = "cpu") -> Parity:
    """Run a case's forward on a backend into NaN-poisoned memory and judge it by the rule."""
    given = case.inputs(seed, device)
    wide = _widened(given)
    want = case.truth(wide)
    with poisoned_memory():
        if isinstance(case, Case):
            got = id_attention(**given, backend=backend, out=poisoned(given["q"]))
        else:
            got = case.run(given, backend)
    if got.shape != want.shape:
        return Parity(float("inf"), 0.0, 0.0, False)
    eager = case.eager(given)
    eager_error, error = _error(eager, want), _error(got, want)
    limit = 2.0 * eager_error + FLOOR[case.dtype]
    if error > limit:
        again, effect = _second_look_forward(case, given, wide, want)
        limit += 2.0 * max(0.0, again - eager_error) + ROUNDINGS.get(backend or "", 4.0) * effect
    return Parity(error, eager_error, limit, _all_finite(got, want, eager))


def _second_look_forward(case: Any, given: dict[str, Any], wide: dict[str, Any], want: Tensor) -> tuple[float, float]:
    """Eager's largest error on this call mirrored and near it, and the largest effect of one rounding of the inputs."""
    names, effects = case.gradients, []
    errors = [_error(_mirrored(case.eager(_mirror(given, names))), want)]
    for draw in range(DRAWS):
        moved = _moved_by_a_rounding(wide, case.dtype, names, draw)
        effects.append(_error(case.truth(moved), want))
        near = _rounded(moved, given)
        errors.append(_error(case.eager(near), case.truth(_widened(near))))
    return max(errors), max(effects)


def recorded(given: dict[str, Any], names: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The same inputs with gradients wanted, and the leaves by name ("k_id[0]" for members of tuples)."""
    leaves: dict[str, Tensor] = {}

    def leaf(name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(leaf(f"{name}[{j}]", v) for j, v in enumerate(value))
        if not isinstance(value, Tensor):
            return value
        leaves[name] = value.detach().requires_grad_()
        return leaves[name]

    return {name: leaf(name, value) if name in names else value for name, value in given.items()}, leaves


def cotangent(like: Tensor, seed: int) -> Tensor:
    """A seeded gradient for a result, in its dtype and on its device."""
    gen = torch.Generator().manual_seed(seed + 1)
    return torch.randn(like.shape, generator=gen, dtype=torch.float64).to(like)


def _gradients(call: Any, given: dict[str, Any], names: tuple[str, ...], g: Tensor | None, seed: int):
    inputs, leaves = recorded(given, names)
    with torch.enable_grad():
        out = call(inputs)
        g = cotangent(out, seed) if g is None else g.to(out.dtype)
        found = torch.autograd.grad(out, list(leaves.values()), g, allow_unused=True)
    zero = {n: torch.zeros_like(t) if x is None else x for (n, t), x in zip(leaves.items(), found, strict=True)}
    return zero, g


def check_gradients(case: Any, backend: str | None, *, seed: int = 0, device: str = "cpu") -> list[Parity]:
    """Forward and backward of a case on a backend in NaN-poisoned memory; one verdict per gradient."""
    given = case.inputs(seed, device)
    wide, names = _widened(given), case.gradients
    eager, g = _gradients(case.eager, given, names, None, seed)
    want, _ = _gradients(case.truth, wide, names, g, seed)
    with poisoned_memory():
        got, _ = _gradients(lambda x: case.run(x, backend), given, names, g, seed)
    size = max([1.0, *(float(t.abs().max()) for t in want.values() if t.numel())])
    errors = {name: _error(got[name], x, size) for name, x in want.items()}
    eager_errors = {name: _error(eager[name], x, size) for name, x in want.items()}
    limits = {name: 2.0 * eager_errors[name] + GRADIENT_FLOOR[case.dtype] for name in want}
    if any(errors[name] > limits[name] for name in want):
        limits = _second_look(case, backend, (given, wide), (want, g, size), eager_errors, seed)
    return [Parity(errors[n], eager_errors[n], limits[n], _all_finite(got[n], x, eager[n]), n) for n, x in want.items()]


def _second_look(case, backend, inputs, target, eager_errors, seed) -> dict[str, float]:
    (given, wide), (want, g, size), names = inputs, target, case.gradients
    again, _ = _gradients(case.eager, _mirror(given, names), names, _mirrored(g), seed)
    errors = {name: max(eager_errors[name], _error(_mirrored(again[name]), x, size)) for name, x in want.items()}
    effects = dict.fromkeys(want, 0.0)
    for draw in range(DRAWS):
        moved = _moved_by_a_rounding(wide, case.dtype, names, draw)
        there, _ = _gradients(case.truth, moved, names, g, seed)
        near = _rounded(moved, given)
        eager, _ = _gradients(case.eager, near, names, g, seed)
        right, _ = _gradients(case.truth, _widened(near), names, g, seed)
        for name, x in want.items():
            effects[name] = max(effects[name], _error(there[name], x, size))
            errors[name] = max(errors[name], _error(eager[name], right[name], size))
    more, times = ROUNDINGS.get(backend or "", 4.0), 2.0 if backend in ROUNDINGS else 3.0
    times = 6.0 if getattr(case, "ill_posed", False) else times
    return {name: times * errors[name] + GRADIENT_FLOOR[case.dtype] + more * effects[name] for name in want}


def _complaint(case: Any, backend: str | None, seed: int, device: str, wrong: Parity, call: str) -> str:
    kind = type(case).__name__
    return (
        f"{case.op}, {backend}, {wrong.what}: error {wrong.error:.3g} above {wrong.limit:.3g} "
        f"(eager {wrong.eager_error:.3g}), finite={wrong.finite}\n"
        f"reproduce: from idcore.testing import {kind}, {call}; "
        f"{call}({case!r}, {backend!r}, seed={seed}, device={device!r})"
    )


def assert_parity(case: Any, backend: str | None, *, seed: int = 0, device: str = "cpu") -> Parity:
    """As `check_parity`; raises AssertionError with a line that reproduces the failure."""
    result = check_parity(case, backend, seed=seed, device=device)
    if not result.ok:
        raise AssertionError(_complaint(case, backend, seed, device, result, "assert_parity"))
    return result


def assert_gradients(case: Any, backend: str | None, *, seed: int = 0, device: str = "cpu") -> list[Parity]:
    """As `check_gradients`; raises AssertionError with a line that reproduces the failure."""
    results = check_gradients(case, backend, seed=seed, device=device)
    for result in results:
        if not result.ok:
            raise AssertionError(_complaint(case, backend, seed, device, result, "assert_gradients"))
    return results


__all__ = [
    "DTYPES", "Parity", "assert_gradients", "assert_parity", "check_gradients", "check_parity", "cotangent",
    "poisoned", "poisoned_memory", "recorded", "truth",
]  # fmt: skip
