"""One person (or one per sample) as tokens: made once by a system's `encode`, saved, mixed, batched, attached."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from idcore.errors import InputError, WeightsError
from idcore.weights import read_safetensors, write_safetensors

FORMAT = "idcore-identity"
FORMAT_VERSION = 1


@dataclass(eq=False)
class Identity:
    """Identity tokens of one system.

    Attributes:
        tokens: [Bi, L, E] float32, conditional tokens; Bi is 1 (for all samples) or one row per sample.
        uncond_tokens: [1 or Bi, L, E] float32 for the unconditional half of classifier-free guidance, or None
            where the system wants the identity left out of that half.
        system: Name of the system that made them ("pulid-v1"); only that system can use them.
        meta: Plain values that JSON can hold: encoder names and hashes, preprocessing, number of photos.

    Raises:
        InputError: wrong shapes, an empty tensor, NaN or infinity, or no system's name.
    """

    tokens: Tensor
    uncond_tokens: Tensor | None
    system: str
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.system, str) or not self.system:
            raise InputError(f"Identity: system must be the name of the system that made it, got {self.system!r}")
        if not isinstance(self.meta, dict):
            raise InputError(f"Identity: meta must be a dictionary, got {type(self.meta).__name__}")
        self.tokens = _checked(self.tokens, "tokens")
        if self.uncond_tokens is None:
            return
        self.uncond_tokens = _checked(self.uncond_tokens, "uncond_tokens")
        bi, length, width = self.tokens.shape
        rows, *rest = self.uncond_tokens.shape
        if rest != [length, width] or rows not in (1, bi):
            raise InputError(
                f"Identity: uncond_tokens must be [1 or {bi}, {length}, {width}] to go with tokens "
                f"{list(self.tokens.shape)}, got {list(self.uncond_tokens.shape)}"
            )
        self.uncond_tokens = self.uncond_tokens.to(self.tokens.device)

    def __repr__(self) -> str:
        bi, length, width = self.tokens.shape
        uncond = "" if self.uncond_tokens is None else ", with uncond"
        photos = f", {self.meta['photos']} photos" if "photos" in self.meta else ""
        return f"Identity({self.system}, {bi} x {length} tokens x {width}{uncond}{photos})"

    def __len__(self) -> int:
        """Bi, the number of rows."""
        return self.tokens.shape[0]

    def to(self, device: torch.device | str) -> Identity:
        """A copy on another device; the tokens stay float32."""
        uncond = None if self.uncond_tokens is None else self.uncond_tokens.to(device)
        return Identity(self.tokens.to(device), uncond, self.system, dict(self.meta))

    def require_system(self, name: str) -> None:
        """Raise InputError unless the identity was made by the system ``name``."""
        if self.system != name:
            raise InputError(
                f"this identity was made by the system {self.system!r}, {name!r} cannot read its tokens; "
                f"encode the photos again with {name!r}"
            )

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file (all or nothing). It describes a person's face: treat it as personal data.

        Raises:
            InputError: meta holds something that JSON cannot.
            WeightsError: the file cannot be written.
        """
        try:
            meta = json.dumps(self.meta, sort_keys=True)
        except (TypeError, ValueError) as e:
            raise InputError(f"Identity.save: meta must hold plain values that JSON knows: {e}") from e
        tensors = {"tokens": self.tokens.cpu()}
        if self.uncond_tokens is not None:
            tensors["uncond_tokens"] = self.uncond_tokens.cpu()
        write_safetensors(path, tensors, {
            "format": FORMAT, "format_version": str(FORMAT_VERSION), "system": self.system, "meta": meta,
        })  # fmt: skip

    @classmethod
    def load(cls, path: str | os.PathLike) -> Identity:
        """Read what :meth:`save` wrote.

        Raises:
            WeightsError: the file is missing, truncated or damaged.
            InputError: a safetensors file that is no identity, or of a newer format.
        """
        tensors, header = read_safetensors(path, what="identity", check_finite=False)
        if header.get("format") != FORMAT or "tokens" not in tensors:
            raise InputError(
                f"{path} is a safetensors file, but no saved identity (format {header.get('format')!r}, "
                f"wanted {FORMAT!r}); make one with `idcore encode`"
            )
        version = header.get("format_version", "")
        if version != str(FORMAT_VERSION):
            raise InputError(
                f"{path} has identity format {version!r}, this idcore reads {FORMAT_VERSION}; "
                "update idcore or encode the photos again"
            )
        try:
            meta = json.loads(header.get("meta", "{}"))
        except ValueError as e:
            raise WeightsError(f"{path}: the identity's meta is damaged ({e}); encode the photos again") from e
        tensors = {k: t.clone() for k, t in tensors.items()}  # away from the file, which may be overwritten
        return cls(tensors["tokens"], tensors.get("uncond_tokens"), header.get("system", ""), meta)

    @classmethod
    def batch(cls, identities: Sequence[Identity]) -> Identity:
        """One identity per sample, in order; for several people in one picture give attach a list instead.

        Raises:
            InputError: none given, different systems or encoders, or different numbers of tokens.
        """
        first = _alike(identities, "Identity.batch")
        unconds = [i.uncond_tokens for i in identities]
        uncond = first.uncond_tokens
        if uncond is not None and not all(u.shape[0] == 1 and torch.equal(u, uncond) for u in unconds):
            uncond = torch.cat([u.expand(len(i), -1, -1) for u, i in zip(unconds, identities)])
        meta = {**_shared_meta(identities), "batch_of": len(identities)}
        return cls(torch.cat([i.tokens for i in identities]), uncond, first.system, meta)

    @classmethod
    def mix(cls, identities: Sequence[Identity], weights: Sequence[float] | None = None) -> Identity:
        """A weighted mean of tokens, between people or between photos of one (our choice; no paper gives it).

        Args:
            identities: Same system, encoder and shape.
            weights: One per identity, normalised to sum 1; equal by default. Negative ones are allowed.

        Raises:
            InputError: identities that do not fit together, or weights that are not finite or sum to 0 or less.
        """
        first = _alike(identities, "Identity.mix", same_rows=True)
        weights = [1.0] * len(identities) if weights is None else [float(w) for w in weights]
        total = sum(weights)
        if len(weights) != len(identities) or not (1e-6 < total < float("inf")):
            raise InputError(f"Identity.mix: wanted {len(identities)} finite weights with a sum above 0, got {weights}")
        parts = [w / total for w in weights]
        tokens = sum(w * i.tokens for w, i in zip(parts, identities))
        uncond = first.uncond_tokens
        if uncond is not None:
            uncond = sum(w * i.uncond_tokens for w, i in zip(parts, identities))
        meta = {**_shared_meta(identities), "mix_weights": parts}
        return cls(tokens, uncond, first.system, meta)


def _checked(t: Tensor, name: str) -> Tensor:
    if not isinstance(t, Tensor) or t.ndim != 3 or 0 in t.shape or not t.is_floating_point():
        got = f"{list(t.shape)} {t.dtype}" if isinstance(t, Tensor) else type(t).__name__
        raise InputError(f"Identity: {name} must be a floating tensor [Bi, L, E], none of them 0, got {got}")
    if not t.is_meta and not bool(torch.isfinite(t).all()):
        raise InputError(f"Identity: {name} hold NaN or infinity; the photo's encoding failed or the file is damaged")
    return t.to(torch.float32)


def _alike(identities: Sequence[Identity], what: str, same_rows: bool = False) -> Identity:
    """The first identity, once all are known to fit together."""
    if not identities or not all(isinstance(i, Identity) for i in identities):
        raise InputError(f"{what}: wanted a sequence of at least one Identity, got {identities!r}")
    first = identities[0]
    for other in identities[1:]:
        other.require_system(first.system)
        start = 0 if same_rows else 1
        if other.tokens.shape[start:] != first.tokens.shape[start:]:
            raise InputError(
                f"{what}: tokens must have the same shape, got {list(first.tokens.shape)} and "
                f"{list(other.tokens.shape)}; encode all with the same number of photos"
            )
        if (other.uncond_tokens is None) != (first.uncond_tokens is None):
            raise InputError(f"{what}: some identities have uncond_tokens and some have none")
        if other.meta.get("encoder") != first.meta.get("encoder"):
            raise InputError(
                f"{what}: the identities come from different encoder weights "
                f"({first.meta.get('encoder')} and {other.meta.get('encoder')}); encode again with one"
            )
    return first


def _shared_meta(identities: Sequence[Identity]) -> dict[str, Any]:
    """What is the same in all."""
    metas: list[Mapping[str, Any]] = [i.meta for i in identities]
    return {k: v for k, v in metas[0].items() if all(m.get(k) == v for m in metas[1:])}
