"""Keys and values of identities per layer, projected once and kept as long as they are true."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .guidance import HALVES
from .types import Site

Pair = tuple[Tensor, Tensor]


def normal_mode() -> contextlib.AbstractContextManager:
    """Leaves inference mode: a tensor made in it that is kept could never serve a later call with gradients."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _outside_inference_mode()


@contextlib.contextmanager
def _outside_inference_mode() -> Iterator[None]:
    recording = torch.is_grad_enabled()
    # inference_mode(False) alone would switch gradients on.
    with torch.inference_mode(False), torch.set_grad_enabled(recording):
        yield


def people_of(identity: Any, system: Any) -> tuple[Any, ...]:
    """One identity or a sequence of them, checked, as a tuple.

    Raises:
        InputError: nothing, something without tokens, or an identity that another system made.
    """
    people = tuple(identity) if isinstance(identity, (list, tuple)) else (identity,)
    if not people:
        raise InputError("attach: got an empty list of identities; give one Identity or a list of them")
    for j, person in enumerate(people):
        tokens = getattr(person, "tokens", None)
        if not isinstance(tokens, Tensor) or tokens.dim() != 3 or not tokens.dtype.is_floating_point:
            raise InputError(
                f"attach: identity {j} must be an Identity with floating-point tokens [Bi, L, E], got "
                f"{type(person).__name__}; idcore.Identity.load(FILE) reads a saved one, system.encode(PHOTO) makes one"
            )
        made_by = getattr(person, "system", None)
        if made_by is not None and made_by != system.name:
            raise InputError(
                f"attach: identity {j} was made by system {made_by!r}, this system is {system.name!r}; "
                "encode the photo with the system that you attach"
            )
    return people


class KvBank:
    """Keys and values of some identities at every layer of one system.

    They are projected once per dtype and device. They are projected anew when weights or tokens were changed in
    place, and not kept at all while gradients flow into them.
    """

    def __init__(self, system: Any, people: Sequence[Any], sites: Sequence[Site]) -> None:
        self.system = system
        self.people = tuple(people)
        self.sites = {site.name: site for site in sites}
        self._kept: dict[str, dict[Any, Any]] = {}
        self._versions_seen: tuple[tuple[int, bool], ...] = ()
        self._place: tuple[torch.dtype, torch.device] | None = None

    def __len__(self) -> int:
        return sum(len(layer) for layer in self._kept.values())

    def forget(self) -> None:
        """Drop all keys and values."""
        self._kept = {}

    def begin(self) -> None:
        """Called before each forward of the UNet: replace what became untrue by changes in place."""
        versions = self._versions()
        if versions != self._versions_seen:
            self.forget()
            self._versions_seen = versions
        wanted_anew = torch.is_grad_enabled() and self._trainable()
        if self._place is not None and not self._kept and not wanted_anew:
            # A compiled graph cannot keep what it projects: have it ready.
            self.fill(*self._place)

    def fill(self, dtype: torch.dtype, device: torch.device) -> None:
        """Project everything now, and again whenever it was dropped."""
        self._place = (dtype, device)
        self._versions_seen = self._versions()
        like = torch.empty(0, dtype=dtype, device=device)
        for name in self.sites:
            for rows in HALVES:
                self.pairs(name, rows, like)

    def pairs(self, name: str, rows: tuple[str, ...], like: Tensor) -> tuple[Pair, ...]:
        """Keys and values of every identity at a layer for these batch parts. n times ([R, H, L, D] twice)"""
        kept = self._kept
        found = self._find(kept, name, rows, like)
        if found is not None:
            return found
        whole = self.whole(name, like)
        pairs = tuple(_parts(pair, person, rows) for pair, person in zip(whole, self.people, strict=True))
        self._keep(kept, name, rows, pairs)
        return pairs

    def whole(self, name: str, like: Tensor) -> tuple[Pair, ...]:
        """Keys and values of every identity for [uncond, cond], or for cond alone where there is no uncond."""
        kept = self._kept
        pairs = self._find(kept, name, None, like)
        if pairs is None and self._project_all(kept, like):
            pairs = self._find(kept, name, None, like)
        if pairs is None:
            with normal_mode():
                pairs = tuple(self._project(name, person, like) for person in self.people)
            self._keep(kept, name, None, pairs)
        return pairs

    def _project_all(self, kept: dict[str, dict[Any, Any]], like: Tensor) -> bool:
        """Every layer at once, where the system can and nothing of it belongs to an autograd graph."""
        bank = getattr(self.system, "bank", None)
        if bank is None or torch.compiler.is_compiling() or (torch.is_grad_enabled() and self._trainable()):
            return False
        sites = tuple(self.sites.values())
        with normal_mode(), torch.no_grad():
            whole = [bank(person, sites) for person in self.people]
            if any(layers is None for layers in whole):
                return False
            for i, site in enumerate(sites):
                pairs = tuple(tuple(_checked_heads(self.system, site, t).to(like) for t in w[i]) for w in whole)
                self._keep(kept, site.name, None, pairs)
        return True

    def _find(self, kept: dict[str, dict[Any, Any]], name: str, rows: Any, like: Tensor) -> tuple[Pair, ...] | None:
        entry = kept.get(name, {}).get((rows, like.dtype, like.device))
        if entry is None or (torch.is_grad_enabled() and not entry[0]):
            return None
        return entry[1]

    def _keep(self, kept: dict[str, dict[Any, Any]], name: str, rows: Any, pairs: tuple[Pair, ...]) -> None:
        """Store a result unless it belongs to one autograd graph; mark whether calls with gradients may use it.

        A layer keeps one dtype and device: those of the last call.
        """
        if torch.compiler.is_compiling() or any(k.requires_grad or v.requires_grad for k, v in pairs):
            return
        dtype, device = pairs[0][0].dtype, pairs[0][0].device
        layer = {key: entry for key, entry in kept.get(name, {}).items() if key[1:] == (dtype, device)}
        layer[rows, dtype, device] = (torch.is_grad_enabled() or not self._trainable(), pairs)
        kept[name] = layer

    def _trainable(self) -> bool:
        if any(p.tokens.requires_grad for p in self.people):
            return True
        return isinstance(self.system, nn.Module) and any(p.requires_grad for p in self.system.parameters())

    def _versions(self) -> tuple[tuple[int, bool], ...]:
        tensors = [t for p in self.people for t in (p.tokens, getattr(p, "uncond_tokens", None)) if t is not None]
        if isinstance(self.system, nn.Module):
            tensors += self.system.parameters()
        return tuple((0 if t.is_inference() else t._version, t.requires_grad) for t in tensors)

    def _project(self, name: str, person: Any, like: Tensor) -> Pair:
        site = self.sites[name]
        k, v = _checked_kv(self.system, site, tokens_of(person))
        return _heads(k, site, like), _heads(v, site, like)


def tokens_of(person: Any) -> Tensor:
    """Tokens of [uncond, cond] rows, or of cond rows alone where the person has no uncond ones. [R, L, E]"""
    tokens, uncond = person.tokens, getattr(person, "uncond_tokens", None)
    if uncond is None:
        return tokens.clone()
    return torch.cat([uncond.expand(tokens.shape[0], -1, -1), tokens])


def _parts(pair: Pair, person: Any, rows: tuple[str, ...]) -> Pair:
    """Rows of [uncond, cond] keys and values put into the order of the batch's parts."""
    count = person.tokens.shape[0]
    if getattr(person, "uncond_tokens", None) is None:
        # The uncond part takes the cond rows at scale 0; one row serves every part.
        if count == 1 or len(rows) == 1:
            return pair
        return pair[0].repeat(len(rows), 1, 1, 1), pair[1].repeat(len(rows), 1, 1, 1)
    if rows == HALVES[1]:
        return pair
    start = {"uncond": 0, "cond": count}
    k, v = ([t[start[row] : start[row] + count] for row in rows] for t in pair)
    return (k[0], v[0]) if len(rows) == 1 else (torch.cat(k), torch.cat(v))


def _heads(x: Tensor, site: Site, like: Tensor) -> Tensor:
    """[R, L, C] -> [R, H, L, D] in dtype and on the device of `like`."""
    x = x.to(device=like.device, dtype=like.dtype)
    return x.unflatten(-1, (site.heads, site.head_dim)).transpose(1, 2).contiguous()


def _checked_kv(system: Any, site: Site, tokens: Tensor) -> tuple[Tensor, Tensor]:
    result = system.project(site, tokens)
    want = (*tokens.shape[:2], site.hidden)
    good = isinstance(result, (tuple, list)) and len(result) == 2
    if not good or any(not isinstance(t, Tensor) or tuple(t.shape) != want for t in result):
        got = [list(getattr(t, "shape", ())) for t in result] if good else type(result).__name__
        raise InputError(
            f"attach: system {system.name!r} must project {site.name} to keys and values of shape {list(want)}, "
            f"got {got}"
        )
    return result[0], result[1]


def _checked_heads(system: Any, site: Site, t: Tensor) -> Tensor:
    """[R, H, L, D] of a system's own bank."""
    if t.ndim != 4 or (t.shape[1], t.shape[3]) != (site.heads, site.head_dim):
        raise InputError(
            f"attach: system {system.name!r} must give keys and values [R, {site.heads}, L, {site.head_dim}] for "
            f"{site.name}, got {list(t.shape)}"
        )
    return t
