"""What systems with one pair of projections per layer share: layers of known base models, the check against a UNet,
and keys and values of all layers at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from idcore.attention.kv_bank import tokens_of
from idcore.attention.sites import find_sites
from idcore.errors import InputError
from idcore.ops.kv_bank import assign_views, kv_bank, lay_out, one_block
from idcore.systems.base import Site


def _runs(*runs: tuple[int, int, int]) -> tuple[tuple[int, int], ...]:
    return tuple((first + 2 * i, hidden) for first, count, hidden in runs for i in range(count))


# (index, C) of each cross-attention in diffusers' attn_processors order: down, up, mid. Published weights are keyed
# by these indices. From runs of (first index, layers, C).
SDXL_LAYERS = _runs((1, 4, 640), (9, 50, 1280), (109, 6, 640), (121, 10, 1280))
SD15_LAYERS = _runs((1, 2, 320), (5, 2, 640), (9, 2, 1280), (13, 3, 1280), (19, 3, 640), (25, 3, 320), (31, 1, 1280))
_BASES = {SDXL_LAYERS: "an SDXL base model", SD15_LAYERS: "an SD 1.5 base model"}


def matching_sites(name: str, layers: Iterable[tuple[int, int]], unet: nn.Module) -> list[Site]:
    """The UNet's cross-attention layers, each checked against the weights of system ``name`` by index and width.

    Args:
        name: Named in the error.
        layers: (index, C) of the layers that there are weights for.
        unet: A diffusers UNet.

    Raises:
        InputError: the UNet has other layers than the weights.
    """
    return fitting_sites(name, layers, find_sites(unet))


def fitting_sites(name: str, layers: Iterable[tuple[int, int]], sites: list[Site]) -> list[Site]:
    """The sites, if they are those that there are weights for; arguments and errors as in :func:`matching_sites`."""
    layers = tuple(layers)
    wanted = dict(layers)
    found = {s.index: s.hidden for s in sites}
    if found == wanted:
        return sites
    problems = _differences(sites, wanted)
    raise InputError(
        f"{name}: the weights are for a UNet with {_census(wanted.values())}, this one has "
        f"{_census(found.values())}; {problems[0]}"
        + (f" and {len(problems) - 1} more" if problems[1:] else "")
        + f". Use {_BASES.get(layers, 'such a base model')}, or weights made for this one"
    )


def _differences(sites: list[Site], wanted: Mapping[int, int]) -> list[str]:
    problems = [
        f"{s.name} (index {s.index}) has C={s.hidden}, weights have {wanted.get(s.index, 'none')}"
        for s in sites
        if wanted.get(s.index) != s.hidden
    ]
    found = {s.index for s in sites}
    return problems + [f"index {i} (C={wanted[i]}) has weights but no layer" for i in wanted if i not in found]


def _census(widths: Iterable[int]) -> str:
    """ "70 cross-attention layers (10 x C=640, 60 x C=1280)"."""
    widths = list(widths)
    parts = ", ".join(f"{widths.count(c)} x C={c}" for c in sorted(set(widths)))
    return f"{len(widths)} cross-attention layers" + (f" ({parts})" if parts else "")


class OneBlock(nn.Module):
    """For systems whose keys and values are two bias-free linear layers per site: all of them by one GEMM.

    `lay_out_weights` moves them one behind the other once; they stay there through `.to(...)`, and their parameters
    remain what they were for state dicts and optimisers.
    """

    def kv_weights(self) -> dict[int, tuple[Tensor, Tensor]]:
        """(W_k, W_v) by the layer's index, in order."""
        raise NotImplementedError

    def lay_out_weights(self) -> None:
        """Move all keys' and values' weights into one piece of memory."""
        lay_out(self._flat())

    def bank(self, person: Any, sites: Sequence[Site]) -> list[tuple[Tensor, Tensor]] | None:
        """Keys and values [R, H, L, D] of a person at every site, for [uncond, cond] rows or cond alone; see
        `attention.kv_bank.tokens_of`. None where the weights do not lie together: then layer by layer.
        """
        weights = self.kv_weights()
        if any(s.index not in weights for s in sites) or one_block(self._flat()) is None:
            return None
        first = next(iter(weights.values()))[0]
        tokens = tokens_of(person)
        if tokens.shape[-1] != first.shape[1]:
            return None
        return kv_bank(tokens.to(first), [weights[s.index] for s in sites], [s.heads for s in sites])

    def _flat(self) -> list[Tensor]:
        return [w for pair in self.kv_weights().values() for w in pair]

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        # As a whole, so that they lie together where they are going; super() then finds them already there.
        flat = self._flat()
        block = one_block(flat)
        if block is not None and not torch.compiler.is_compiling():
            moved = fn(block)
            if moved is not block and torch._has_compatible_shallow_copy_type(flat[0], moved):
                assign_views(flat, moved)
        return super()._apply(fn, recurse)
