"""PuLID's two identity encoders (arXiv 2404.16022, sec. 3.2; the sizes are those of the published weights).

Both read one face embedding ``id_cond`` (ArcFace 512, raw, then CLIP 768, L2-normalised) and five hidden states
of a vision tower per photo, and give tokens that the UNet's cross-attention layers attend to:

- :class:`IDEncoder` (v1): MLPs; 5 global and 5 local tokens; several photos are set side by side as tokens.
- :class:`IDFormer` (v1.1): a perceiver with 32 queries; several photos are more context for the same 32.

Parameter names are the published ones, without the leading ``id_adapter.``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idcore.errors import InputError

SCALES = 5
GLOBAL_TOKENS = 5


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of an identity encoder; the defaults are the published ones.

    Attributes:
        version: "v1" (IDEncoder) or "v1.1" (IDFormer).
        id_dim: Width of ``id_cond``: ArcFace 512 + CLIP 768.
        vit_dim: Width of the vision tower.
        width: Width inside the encoder.
        output_dim: E, width of the identity tokens.
        queries, heads, layers_per_scale, ff_mult: v1.1 only.
    """

    version: str = "v1"
    id_dim: int = 1280
    vit_dim: int = 1024
    width: int = 1024
    output_dim: int = 2048
    queries: int = 32
    heads: int = 16
    layers_per_scale: int = 2
    ff_mult: int = 4

    def __post_init__(self) -> None:
        if self.version not in ("v1", "v1.1"):
            raise InputError(f"PuLID encoder: version must be 'v1' or 'v1.1', got {self.version!r}")
        if self.version == "v1.1" and self.width % self.heads:
            raise InputError(f"PuLID encoder: width {self.width} must be a multiple of heads {self.heads}")

    def build(self) -> IDEncoder | IDFormer:
        """The encoder with fresh weights, on the current default device."""
        return IDEncoder(self) if self.version == "v1" else IDFormer(self)


def _mlp(d_in: int, width: int, d_out: int) -> nn.Sequential:
    """Linear, LN, LeakyReLU, twice, then Linear: the one MLP that both encoders are made of."""
    return nn.Sequential(
        nn.Linear(d_in, width), nn.LayerNorm(width), nn.LeakyReLU(),
        nn.Linear(width, width), nn.LayerNorm(width), nn.LeakyReLU(),
        nn.Linear(width, d_out),
    )  # fmt: skip


def check_features(id_cond: Tensor, hidden: Sequence[Tensor], config: EncoderConfig) -> None:
    """Raise InputError unless ``id_cond`` is [B, n, id_dim] and ``hidden`` five of [B, n, T, vit_dim], T >= 2."""
    if id_cond.ndim != 3 or id_cond.shape[-1] != config.id_dim or 0 in id_cond.shape:
        raise InputError(
            f"PuLID encoder: id_cond must be [B, n, {config.id_dim}] (n photos of each of B people), "
            f"got {list(id_cond.shape)}"
        )
    if len(hidden) != SCALES:
        raise InputError(f"PuLID encoder: wanted {SCALES} hidden states of the vision tower, got {len(hidden)}")
    for i, h in enumerate(hidden):
        fits = h.ndim == 4 and h.shape[:2] == id_cond.shape[:2] and h.shape[2] >= 2 and h.shape[3] == config.vit_dim
        if not fits:
            b, n = id_cond.shape[:2]
            raise InputError(
                f"PuLID encoder: hidden state {i} must be [B, n, T, {config.vit_dim}] with B={b}, n={n} "
                f"as in id_cond and T >= 2 (CLS and patches), got {list(h.shape)}"
            )


class IDEncoder(nn.Module):
    """v1: ten tokens per photo, five from the embedding (global) and one per hidden state (local)."""

    def __init__(self, config: EncoderConfig | None = None) -> None:
        super().__init__()
        c = config or EncoderConfig("v1")
        self.config = c
        self.body = _mlp(c.id_dim, c.width, GLOBAL_TOKENS * c.output_dim)
        for i in range(SCALES):
            self.add_module(f"mapping_{i}", _mlp(c.vit_dim, c.width, c.output_dim))
            self.add_module(f"mapping_patch_{i}", _mlp(c.vit_dim, c.width, c.output_dim))

    def forward(self, id_cond: Tensor, hidden: Sequence[Tensor], *, id_mix: bool = False) -> Tensor:
        """Tokens of B people from n photos each.

        Args:
            id_cond: [B, n, id_dim].
            hidden: Five of [B, n, T, vit_dim], CLS first.
            id_mix: Of the second photo on, take all ten tokens instead of the five global ones.

        Returns:
            [B, 10 + (n - 1) * (10 if id_mix else 5), E]: the first photo's tokens first.
        """
        check_features(id_cond, hidden, self.config)
        b, n = id_cond.shape[:2]
        tokens = [self.body(id_cond).unflatten(-1, (GLOBAL_TOKENS, self.config.output_dim))]
        for i, h in enumerate(hidden):
            of_cls = getattr(self, f"mapping_{i}")(h[:, :, :1])
            of_patches = getattr(self, f"mapping_patch_{i}")(h[:, :, 1:]).mean(2, keepdim=True)
            tokens.append(of_cls + of_patches)
        each = torch.cat(tokens, 2)
        extra = each[:, 1:] if id_mix else each[:, 1:, :GLOBAL_TOKENS]
        return torch.cat([each[:, 0], extra.reshape(b, -1, self.config.output_dim)], 1)


class PerceiverAttention(nn.Module):
    """Latents attend to the context and to themselves; no biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(width, 2 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)

    def forward(self, context: Tensor, latents: Tensor) -> Tensor:
        """[B, N, W] and [B, M, W] to [B, M, W]."""
        latents = self.norm2(latents)
        kv = self.to_kv(torch.cat([self.norm1(context), latents], 1))
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.to_q(latents), *kv.chunk(2, -1)))
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class IDFormer(nn.Module):
    """v1.1: 32 queries and five identity tokens per photo read the hidden states, scale by scale."""

    def __init__(self, config: EncoderConfig | None = None) -> None:
        super().__init__()
        c = config or EncoderConfig("v1.1")
        self.config = c
        self.latents = nn.Parameter(torch.randn(1, c.queries, c.width) * c.width**-0.5)
        self.proj_out = nn.Parameter(torch.randn(c.width, c.output_dim) * c.width**-0.5)
        inner = c.width * c.ff_mult
        self.layers = nn.ModuleList(
            nn.ModuleList([
                PerceiverAttention(c.width, c.heads),
                nn.Sequential(nn.LayerNorm(c.width), nn.Linear(c.width, inner, bias=False), nn.GELU(),
                              nn.Linear(inner, c.width, bias=False)),
            ]) for _ in range(SCALES * c.layers_per_scale)
        )  # fmt: skip
        for i in range(SCALES):
            self.add_module(f"mapping_{i}", _mlp(c.vit_dim, c.width, c.width))
        self.id_embedding_mapping = _mlp(c.id_dim, c.width, GLOBAL_TOKENS * c.width)

    def forward(self, id_cond: Tensor, hidden: Sequence[Tensor], *, id_mix: bool = False) -> Tensor:
        """Tokens of B people from n photos each: [B, queries, E] whatever n is.

        Args:
            id_cond: [B, n, id_dim].
            hidden: Five of [B, n, T, vit_dim], CLS first.
            id_mix: Only v1 knows it; True raises InputError.
        """
        check_features(id_cond, hidden, self.config)
        if id_mix:
            raise InputError("PuLID v1.1 always mixes all photos into its tokens; id_mix=True is an option of v1 only")
        c = self.config
        b = id_cond.shape[0]
        # B first and photos beside one another: [B, n, 5W] -> [B, 5n, W].
        identity = self.id_embedding_mapping(id_cond).reshape(b, -1, c.width)
        latents = torch.cat([self.latents.expand(b, -1, -1), identity], 1)
        for i, h in enumerate(hidden):
            context = torch.cat([identity, getattr(self, f"mapping_{i}")(h.flatten(1, 2))], 1)
            for attention, feed_forward in self.layers[i * c.layers_per_scale : (i + 1) * c.layers_per_scale]:
                latents = latents + attention(context, latents)
                latents = latents + feed_forward(latents)
        return latents[:, : c.queries] @ self.proj_out
