"""Identities that bring their keys and values along, in place of an adapter's weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from idcore.attention.kv_bank import KvBank
from idcore.attention.sites import find_sites, unwrap
from idcore.errors import InputError
from idcore.identity import Identity, StoredBank
from idcore.systems.base import AttentionOptions, Site

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_HOW = "make one with identity.with_bank(system, pipe) where the adapter's weights are, and save it"


def _layers(sites: Sequence[Site]) -> tuple[tuple[int, int, int], ...]:
    return tuple((s.index, s.heads, s.head_dim) for s in sites)


def stored_bank(system: Any, person: Identity, pipe_or_unet: Any, dtype: torch.dtype) -> StoredBank:
    """The bank that `Identity.with_bank` adds. Arguments and errors as there."""
    person.require_system(system.name)
    if hasattr(system, "put_on"):
        raise InputError(
            f"with_bank: {system.name} acts through the prompt and has no keys and values of its own; attach its "
            "identity without a bank, it needs no adapter's weights"
        )
    if dtype not in DTYPES:
        raise InputError(f"with_bank: dtype must be float16, bfloat16 or float32, got {dtype}")
    unet = unwrap(getattr(pipe_or_unet, "unet", pipe_or_unet))
    sites = list(system.sites(unet))
    weight = next(system.parameters(), None) if isinstance(system, nn.Module) else None
    like = torch.empty(0, device="cpu" if weight is None else weight.device)
    bank = KvBank(system, (person,), sites)
    with torch.no_grad():
        pairs = [bank.whole(site.name, like)[0] for site in sites]
    data = torch.cat([t.reshape(-1).to("cpu", dtype) for pair in pairs for t in pair])
    if not bool(torch.isfinite(data).all()):
        raise InputError(f"with_bank: keys and values beyond the range of {dtype}; take dtype=torch.bfloat16")
    return StoredBank(data, pairs[0][0].shape[0], _layers(sites), asdict(system.options))


def _fitting(person: Any, layers: tuple) -> StoredBank | None:
    return next((b for b in getattr(person, "banks", ()) if b.layers == layers), None)


class BankedSystem:
    """Stands for the system that made some identities; a `systems.base.System` that reads their stored banks.

    Args:
        name: Of the system that made them.
        sites: The UNet's cross-attention layers.
        options: The merge that the banks were made for.
    """

    def __init__(self, name: str, sites: Sequence[Site], options: AttentionOptions) -> None:
        self.name, self.options, self._layers = name, options, _layers(sites)

    @classmethod
    def of(cls, identity: Any, unet: nn.Module) -> BankedSystem:
        """For one identity or a sequence of them, and the UNet that they are to be attached to.

        Raises:
            InputError: an identity has no bank for this UNet, or two of them disagree about the merge.
        """
        people = tuple(identity) if isinstance(identity, (list, tuple)) else (identity,)
        if not people or not all(isinstance(p, Identity) for p in people):
            raise InputError(
                f"attach: without a system, Identity objects with stored banks are needed, got {identity!r}; {_HOW}"
            )
        sites = find_sites(unet)
        layers = _layers(sites)
        found = [_fitting(p, layers) for p in people]
        for j, (person, bank) in enumerate(zip(people, found, strict=True)):
            if bank is None:
                raise InputError(
                    f"attach: no system was given and identity {j} has {len(person.banks)} stored banks, none for this "
                    f"UNet's {len(layers)} cross-attention layers; {_HOW}"
                )
            if bank.options != found[0].options:
                raise InputError(
                    f"attach: the identities' banks want {found[0].options} and {bank.options}; attach them one by one"
                )
        return cls(people[0].system, sites, AttentionOptions(**found[0].options))

    def sites(self, unet: nn.Module) -> list[Site]:
        """The UNet's cross-attention layers; raises InputError where they are not those of the banks."""
        sites = find_sites(unet)
        if _layers(sites) != self._layers:
            raise InputError(f"attach: the stored banks are for another UNet than this one with {len(sites)} layers")
        return sites

    def bank(self, person: Any, sites: Sequence[Site]) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [R, H, L, D] of a person at every site; raises InputError where none are stored."""
        found = _fitting(person, self._layers)
        if found is None:
            raise InputError(f"attach: this identity holds no keys and values for this UNet; {_HOW}")
        places = {index: i for i, (index, _, _) in enumerate(self._layers)}
        pairs = found.pairs()
        return [pairs[places[s.index]] for s in sites]

    def project(self, site: Site, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """There is nothing to project with: gradients into tokens need the adapter's weights."""
        raise InputError(
            f"attach: keys and values of {site.name} would have to be projected, and no system was given, only stored "
            "banks; give attach the system with its weights"
        )
