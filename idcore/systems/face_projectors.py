"""From face embeddings to identity tokens: the projectors of IP-Adapter FaceID, its Plus forms, and InstantID.

Parameter names are the published ones, without the leading ``image_proj.``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from idcore.errors import InputError
from idcore.systems.pulid_encoders import PerceiverAttention

KINDS = ("faceid", "faceid-plus", "instantid")
HEAD = 64  # width of an attention head in all published files


@dataclass(frozen=True)
class ProjectorConfig:
    """Sizes of a projector.

    Attributes:
        kind: "faceid", "faceid-plus" (Plus and PlusV2) or "instantid".
        width: E, width of an identity token: 768 for SD 1.5, 2048 for SDXL.
        tokens: Tokens per photo (FaceID 4, its portrait files 16), or in all (InstantID 16).
        id_dim: Width of the face embedding.
        clip_dim: "faceid-plus": width of the image tokens (1280, CLIP ViT-H/14).
        inner: "instantid": width inside (1280).
        depth: Perceiver layers.
    """

    kind: str = "faceid"
    width: int = 2048
    tokens: int = 4
    id_dim: int = 512
    clip_dim: int = 1280
    inner: int = 1280
    depth: int = 4

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"face adapter: kind must be one of {', '.join(KINDS)}, got {self.kind!r}")

    def build(self) -> nn.Module:
        """The projector with fresh weights, on the current default device."""
        return {"faceid": FaceMLP, "faceid-plus": FacePlus, "instantid": FaceResampler}[self.kind](self)


class _Perceiver(nn.Module):
    """Latents read a context through `depth` layers; both ends are projected."""

    def __init__(self, context: int, inner: int, out: int, depth: int) -> None:
        super().__init__()
        heads = max(1, inner // HEAD)
        self.proj_in = nn.Linear(context, inner)
        self.proj_out = nn.Linear(inner, out)
        self.norm_out = nn.LayerNorm(out)
        self.layers = nn.ModuleList(
            nn.ModuleList([
                PerceiverAttention(inner, heads),
                nn.Sequential(nn.LayerNorm(inner), nn.Linear(inner, 4 * inner, bias=False), nn.GELU(),
                              nn.Linear(4 * inner, inner, bias=False)),
            ]) for _ in range(depth)
        )  # fmt: skip

    def forward(self, latents: Tensor, context: Tensor) -> Tensor:
        """[B, M, inner] and [B, N, context] to [B, M, out]."""
        context = self.proj_in(context)
        for attention, feed_forward in self.layers:
            latents = latents + attention(context, latents)
            latents = latents + feed_forward(latents)
        return self.norm_out(self.proj_out(latents))


class FaceMLP(nn.Module):
    """FaceID: the embedding through an MLP to a few tokens, each normalised."""

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        c = self.config = config
        self.proj = nn.Sequential(
            nn.Linear(c.id_dim, 2 * c.id_dim), nn.GELU(), nn.Linear(2 * c.id_dim, c.tokens * c.width)
        )
        self.norm = nn.LayerNorm(c.width)

    def forward(self, embeds: Tensor, clip: Tensor | None = None, shortcut: float | None = None) -> Tensor:
        """[B, n, id_dim] to [B, n * tokens, E]: the tokens of n photos stand side by side."""
        x = self.norm(self.proj(embeds).unflatten(-1, (self.config.tokens, self.config.width)))
        return x.flatten(1, 2)


class FacePlus(FaceMLP):
    """FaceID Plus and PlusV2: the MLP's tokens ask the image tokens of the face; PlusV2 adds the answer to them."""

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__(config)
        c = config
        self.perceiver_resampler = _Perceiver(c.clip_dim, c.width, c.width, c.depth)

    def forward(self, embeds: Tensor, clip: Tensor | None = None, shortcut: float | None = None) -> Tensor:
        """Tokens [B, n * tokens, E].

        Args:
            embeds: [B, n, id_dim].
            clip: [B, n, T, clip_dim], image tokens of the same photos.
            shortcut: PlusV2's strength of the image tokens; None: Plus, which keeps the answer alone.
        """
        c = self.config
        x = super().forward(embeds).unflatten(1, (-1, c.tokens))
        answer = self.perceiver_resampler(x.flatten(0, 1), clip.flatten(0, 1)).view_as(x)
        return (answer if shortcut is None else x + shortcut * answer).flatten(1, 2)


class FaceResampler(_Perceiver):
    """InstantID: learned queries read the embeddings of all photos; always the same number of tokens."""

    def __init__(self, config: ProjectorConfig) -> None:
        c = config
        super().__init__(c.id_dim, c.inner, c.width, c.depth)
        self.config = c
        self.latents = nn.Parameter(torch.randn(1, c.tokens, c.inner) * c.inner**-0.5)

    def forward(self, embeds: Tensor, clip: Tensor | None = None, shortcut: float | None = None) -> Tensor:
        """[B, n, id_dim] to [B, tokens, E]."""
        return super().forward(self.latents.expand(embeds.shape[0], -1, -1), embeds)
