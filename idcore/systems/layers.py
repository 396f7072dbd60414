"""What systems with one pair of projections per layer share: layers of known base models, the check against a UNet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from idcore.attention.sites import find_sites
from idcore.errors import InputError
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
    layers = tuple(layers)
    wanted, sites = dict(layers), find_sites(unet)
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
