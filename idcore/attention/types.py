"""The plain values that a system and the attention layer exchange. Neither torch nor diffusers is imported."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from ..errors import InputError

MERGES = ("add", "ortho", "ortho_v2")


@dataclass(frozen=True)
class Site:
    """One cross-attention layer of a UNet that an identity can enter.

    Attributes:
        name: Key in ``unet.attn_processors``: ``"mid_block.attentions.0.transformer_blocks.0.attn2.processor"``.
        index: Place of that key in ``unet.attn_processors`` (self-attention layers are counted: SDXL's
            cross-attentions are 1, 3, ..., 139). Published adapter weights are keyed by it.
        hidden: C, channels of queries, keys and values; ``heads * head_dim``.
        heads: H.
        head_dim: D.
    """

    name: str
    index: int
    hidden: int
    heads: int
    head_dim: int

    @property
    def path(self) -> str:
        """Path of the attention module itself: the name without ``.processor``."""
        return self.name.removesuffix(".processor")

    @property
    def block(self) -> str:
        """Path of the transformer that holds the layer, e.g. ``"up_blocks.0.attentions.1"``."""
        parts = self.name.split(".")
        if "attentions" not in parts:
            return self.path
        return ".".join(parts[: parts.index("attentions") + 2])


@dataclass(frozen=True)
class AttentionOptions:
    """How an identity joins the text attention: arguments of ``idcore.ops.id_attention`` that a system fixes.

    Attributes:
        merge: ``"add"``, ``"ortho"`` or ``"ortho_v2"``.
        num_zero: All-zero identity tokens appended in closed form, at least 0.
        num_global: Leading tokens whose attention weights ``ortho_v2`` sums, at least 1.
    """

    merge: str = "add"
    num_zero: int = 0
    num_global: int = 5

    def __post_init__(self) -> None:
        if self.merge not in MERGES:
            raise InputError(f"attention options: merge must be one of {MERGES}, got {self.merge!r}")
        for name, least in (("num_zero", 0), ("num_global", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(f"attention options: {name} must be an integer >= {least}, got {value!r}")

    def updated(self, **changes: object) -> AttentionOptions:
        """A copy with some values changed. Raises InputError that names an unknown option."""
        known = [f.name for f in fields(self)]
        unknown = sorted(set(changes) - set(known))
        if unknown:
            raise InputError(f"attention options: unknown {', '.join(unknown)}; known are {', '.join(known)}")
        return replace(self, **changes)
