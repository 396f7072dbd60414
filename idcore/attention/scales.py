"""`id_scale` per layer, in the grammar of diffusers' `set_ip_adapter_scale`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from torch import Tensor

from ..errors import InputError
from .types import Site

_SIDES = {"down": "down_blocks", "up": "up_blocks", "mid": "mid_block"}


def expand(scale: Any, sites: Sequence[Site], count: int) -> dict[str, tuple[float, ...]] | Tensor:
    """Scale of every identity at every site.

    Args:
        scale: A number for all; a mapping such as ``{"down": 0.5, "up": {"block_0": [0.0, 1.0, 0.0]}, "mid": 1.0}``
            (blocks that are not named get 0.0, a list holds one value per transformer of the block); a list of
            `count` numbers or mappings, one per identity; or a float32 tensor [], [count] or [count, images], read at
            every call, so that it may be changed in place or learned.
        sites: Sites to set.
        count: n, number of identities.

    Returns:
        {site name: n floats}, or the tensor as given.

    Raises:
        InputError: unknown blocks, wrong counts, values that are not finite numbers.
    """
    if isinstance(scale, Tensor):
        return _checked_tensor(scale, count)
    if isinstance(scale, Sequence) and not isinstance(scale, str):
        if len(scale) != count:
            raise InputError(f"id_scale: {count} identities need {count} values, got {len(scale)}")
        columns = [_one(s, sites) for s in scale]
    else:
        columns = [_one(scale, sites)] * count
    return {site.name: tuple(c[site.name] for c in columns) for site in sites}


def _checked_tensor(scale: Tensor, count: int) -> Tensor:
    fits = tuple(scale.shape) in ((), (count,)) or (scale.dim() == 2 and len(scale) == count and scale.shape[1] > 0)
    if not scale.dtype.is_floating_point or not fits:
        raise InputError(
            f"id_scale: a tensor must be floating point with shape [], [{count}] or [{count}, images], "
            f"got {scale.dtype} {list(scale.shape)}"
        )
    return scale


def _number(value: Any, where: str) -> float:
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        raise InputError(f"id_scale: {where} must be a finite number, got {value!r}")
    return float(value)


def _one(scale: Any, sites: Sequence[Site]) -> dict[str, float]:
    if not isinstance(scale, Mapping):
        value = _number(scale, "the value")
        return {site.name: value for site in sites}
    blocks = _blocks(sites)
    wanted = _by_transformer(scale, blocks)
    return {site.name: wanted.get(site.block, 0.0) for site in sites}


def _blocks(sites: Sequence[Site]) -> dict[str, dict[str, list[str]]]:
    """{"down": {"block_1": [transformer paths]}, "up": {...}, "mid": {"": [...]}} of the blocks with sites."""
    blocks: dict[str, dict[str, list[str]]] = {"down": {}, "mid": {}, "up": {}}
    for site in sites:
        parts = site.block.split(".")
        side = next((s for s, prefix in _SIDES.items() if prefix == parts[0]), None)
        if side is None:
            continue
        paths = blocks[side].setdefault("" if side == "mid" else f"block_{parts[1]}", [])
        if site.block not in paths:
            paths.append(site.block)
    return blocks


def _by_transformer(scale: Mapping[str, Any], blocks: dict[str, dict[str, list[str]]]) -> dict[str, float]:
    wanted: dict[str, float] = {}
    for side, value in scale.items():
        if side not in _SIDES:
            raise InputError(f"id_scale: unknown key {side!r}; known are 'down', 'mid', 'up'")
        if side == "mid" or not isinstance(value, Mapping):
            for block, paths in blocks[side].items():
                wanted.update(_spread(value, paths, f"{side} {block}".strip()))
            _number(value, side) if not blocks[side] else None
            continue
        for block, inner in value.items():
            if block not in blocks[side]:
                known = ", ".join(sorted(blocks[side])) or "none"
                raise InputError(f"id_scale: {side!r} has no conditioned {block!r}; known are {known}")
            wanted.update(_spread(inner, blocks[side][block], f"{side}.{block}"))
    return wanted


def _spread(value: Any, paths: list[str], where: str) -> dict[str, float]:
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if len(values) == 1:
        values = values * len(paths)
    if len(values) != len(paths):
        raise InputError(f"id_scale: {where} has {len(paths)} transformers, got {len(values)} values")
    return {path: _number(v, where) for path, v in zip(paths, values, strict=True)}
