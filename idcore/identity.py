"""One person (or one per sample) as tokens: made once by a system's `encode`, saved, mixed, batched, attached."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from idcore.errors import InputError, WeightsError
from idcore.weights import read_safetensors, write_safetensors

FORMAT = "idcore-identity"
FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class StoredBank:
    """An identity's keys and values for every layer of one base model: what an adapter's weights would give.

    Attributes:
        data: 1-D, float16, bfloat16 or float32: layer by layer the keys, then the values, each [R, H, L, D].
        rows: R, rows of [uncond, cond] tokens, or of cond tokens alone.
        layers: (index, heads, head dim) of every layer, as in `systems.base.Site`.
        options: Arguments of the system's `AttentionOptions`.
    """

    data: Tensor
    rows: int
    layers: tuple[tuple[int, int, int], ...]
    options: dict[str, Any]

    def __post_init__(self) -> None:
        per_token = 2 * self.rows * sum(h * d for _, h, d in self.layers)
        if self.data.ndim != 1 or not per_token or self.data.numel() % per_token or not self.data.numel():
            raise InputError(
                f"StoredBank: data must be 1-D, a multiple of {per_token} numbers for {self.rows} rows of "
                f"{len(self.layers)} layers, got {list(self.data.shape)}"
            )

    @property
    def length(self) -> int:
        """L, tokens."""
        return self.data.numel() // (2 * self.rows * sum(h * d for _, h, d in self.layers))

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Per layer keys and values [R, H, L, D], views of `data`."""
        shapes = [(self.rows, h, self.length, d) for _, h, d in self.layers for _ in "kv"]
        parts = self.data.split([r * h * n * d for r, h, n, d in shapes])
        split = [t.view(shape) for t, shape in zip(parts, shapes, strict=True)]
        return list(zip(split[::2], split[1::2], strict=True))

    def header(self) -> dict[str, Any]:
        """What a file's metadata must say."""
        return {"rows": self.rows, "layers": self.layers, "options": self.options}


@dataclass(eq=False)
class Identity:
    """Identity tokens of one system.

    Attributes:
        tokens: [Bi, L, E] float32, conditional tokens; Bi is 1 (for all samples) or one row per sample.
        uncond_tokens: [1 or Bi, L, E] float32 for the unconditional half of classifier-free guidance, or None
            where the system wants the identity left out of that half.
        system: Name of the system that made them ("pulid-v1"); only that system can use them.
        meta: Plain values that JSON can hold: encoder names and hashes, preprocessing, number of photos.
        banks: Keys and values for whole base models, one `StoredBank` each; see :meth:`with_bank`.

    Raises:
        InputError: wrong shapes, an empty tensor, NaN or infinity, or no system's name.
    """

    tokens: Tensor
    uncond_tokens: Tensor | None
    system: str
    meta: dict[str, Any] = field(default_factory=dict)
    banks: tuple[StoredBank, ...] = ()

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
        banks = f", {len(self.banks)} banks" if self.banks else ""
        return f"Identity({self.system}, {bi} x {length} tokens x {width}{uncond}{photos}{banks})"

    def __len__(self) -> int:
        """Bi, the number of rows."""
        return self.tokens.shape[0]

    def to(self, device: torch.device | str) -> Identity:
        """A copy on another device; the tokens stay float32."""
        uncond = None if self.uncond_tokens is None else self.uncond_tokens.to(device)
        banks = tuple(replace(b, data=b.data.to(device)) for b in self.banks)
        return Identity(self.tokens.to(device), uncond, self.system, dict(self.meta), banks)

    def with_bank(self, system: Any, pipe_or_unet: Any, dtype: torch.dtype = torch.float16) -> Identity:
        """A copy that also holds its keys and values for every layer of a base model.

        Saved, it can be attached to any UNet of that architecture without the adapter's weights:
        ``idcore.attach(pipe, None, Identity.load(...))``. A bank for the same layers is replaced.

        Args:
            system: The system that made this identity, with its weights.
            pipe_or_unet: A pipeline or UNet of the base model; only its layers' sizes are looked at.
            dtype: What the bank is kept in: float16, bfloat16 or float32.

        Raises:
            InputError: another system's identity, a UNet that does not fit, or another dtype.
        """
        from idcore.systems.banked import stored_bank

        bank = stored_bank(system, self, pipe_or_unet, dtype)
        others = tuple(b for b in self.banks if b.layers != bank.layers)
        return replace(self, meta=dict(self.meta), banks=(*others, bank))

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
        header = {"format": FORMAT, "format_version": str(FORMAT_VERSION), "system": self.system, "meta": meta}
        if self.banks:
            tensors |= {f"bank.{i}": b.data.cpu() for i, b in enumerate(self.banks)}
            header["banks"] = json.dumps([b.header() for b in self.banks])
        write_safetensors(path, tensors, header)

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
        banks = _banks_of(tensors, header, path)
        return cls(tensors["tokens"], tensors.get("uncond_tokens"), header.get("system", ""), meta, banks)

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


def _banks_of(tensors: Mapping[str, Tensor], header: Mapping[str, str], path: Any) -> tuple[StoredBank, ...]:
    try:
        said = json.loads(header.get("banks", "[]"))
        return tuple(
            StoredBank(
                tensors[f"bank.{i}"], int(b["rows"]), tuple(tuple(map(int, x)) for x in b["layers"]), b["options"]
            )
            for i, b in enumerate(said)
        )
    except (ValueError, KeyError, TypeError, InputError) as e:
        raise WeightsError(f"{path}: the identity's stored keys and values are damaged ({e}); make them again") from e


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
