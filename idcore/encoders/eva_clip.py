"""The visual tower of EVA02-CLIP-L-14-336 (arXiv 2303.15389; layers as in EVA-02, arXiv 2303.11331).

A plain vision transformer with 2-D rotary positions on the patches, SwiGLU, and a LayerNorm before each output
projection. Key names are the published ones behind ``visual.``. PuLID reads its 768-d image embedding and the
inputs of five of its blocks.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idcore.errors import InputError, WeightsError
from idcore.weights import detect, fingerprint, read_safetensors, require_keys

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_EPS = 1e-6
_THETA = 10_000.0
# The tables in the file were made in float32 and stored in 16 bits; another grid or theta is off by far more.
_ROPE_TOLERANCE = 2e-3


@dataclass(frozen=True)
class EvaClipConfig:
    """Sizes; the defaults are EVA02-CLIP-L-14-336.

    Attributes:
        image_size, patch_size: In pixels; the grid is image_size / patch_size on each side.
        width, depth, heads, mlp_dim: Of the transformer; width / heads must be a multiple of 4.
        embed_dim: Width of the image embedding.
        rope_grid: Side of the grid of the pretraining that rotary positions are scaled to.
        taps: Blocks whose inputs are handed out.
    """

    image_size: int = 336
    patch_size: int = 14
    width: int = 1024
    depth: int = 24
    heads: int = 16
    mlp_dim: int = 2730
    embed_dim: int = 768
    rope_grid: int = 16
    taps: tuple[int, ...] = (4, 8, 12, 16, 20)

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size or self.width % (4 * self.heads):
            raise InputError(f"EVA-CLIP: image_size must be a multiple of patch_size, and width of 4 heads; got {self}")
        if not all(0 <= t < self.depth for t in self.taps):
            raise InputError(f"EVA-CLIP: taps must lie in 0..{self.depth - 1}, got {self.taps}")

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    @property
    def length(self) -> int:
        """T: CLS and one token per patch."""
        return self.grid**2 + 1


def rope_tables(config: EvaClipConfig) -> tuple[Tensor, Tensor]:
    """cos and sin, each [grid*grid, head_dim] float32.

    The first half of the channels turns with the row, the second with the column; neighbouring channels form
    pairs. Positions are scaled so that the grid spans the ``rope_grid`` of the pretraining.
    """
    half = config.width // config.heads // 2
    frequency = _THETA ** (-torch.arange(0, half, 2, dtype=torch.float64) / half)
    position = torch.arange(config.grid, dtype=torch.float64) * config.rope_grid / config.grid
    angle = torch.outer(position, frequency).repeat_interleave(2, 1)
    g = config.grid
    rows, columns = angle[:, None].expand(g, g, half), angle[None].expand(g, g, half)
    table = torch.cat([rows, columns], -1).reshape(g * g, 2 * half)
    return table.cos().float(), table.sin().float()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the patches of [B, H, T, D]; CLS stays."""
    cls, patches = x[:, :, :1], x[:, :, 1:]
    even, odd = patches.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], -1).flatten(-2)
    return torch.cat([cls, patches * cos + turned * sin], 2)


class _Attention(nn.Module):
    def __init__(self, c: EvaClipConfig) -> None:
        super().__init__()
        self.heads = c.heads
        self.q_proj = nn.Linear(c.width, c.width, bias=False)
        self.k_proj = nn.Linear(c.width, c.width, bias=False)
        self.v_proj = nn.Linear(c.width, c.width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(c.width))
        self.v_bias = nn.Parameter(torch.zeros(c.width))
        self.inner_attn_ln = nn.LayerNorm(c.width, eps=_EPS)
        self.proj = nn.Linear(c.width, c.width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = F.linear(x, self.q_proj.weight, self.q_bias)
        k = self.k_proj(x)
        v = F.linear(x, self.v_proj.weight, self.v_bias)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v)
        return self.proj(self.inner_attn_ln(out.transpose(1, 2).flatten(2)))


class _SwiGLU(nn.Module):
    def __init__(self, c: EvaClipConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(c.width, c.mlp_dim)
        self.w2 = nn.Linear(c.width, c.mlp_dim)
        self.ffn_ln = nn.LayerNorm(c.mlp_dim, eps=_EPS)
        self.w3 = nn.Linear(c.mlp_dim, c.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(self.ffn_ln(F.silu(self.w1(x)) * self.w2(x)))


class _Block(nn.Module):
    def __init__(self, c: EvaClipConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(c.width, eps=_EPS)
        self.attn = _Attention(c)
        self.norm2 = nn.LayerNorm(c.width, eps=_EPS)
        self.mlp = _SwiGLU(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class _PatchEmbed(nn.Module):
    def __init__(self, c: EvaClipConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, c.width, c.patch_size, c.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class EvaClipVisual(nn.Module):
    """The tower: images to one embedding and the tapped hidden states."""

    def __init__(self, config: EvaClipConfig | None = None) -> None:
        super().__init__()
        c = self.config = config or EvaClipConfig()
        self.patch_embed = _PatchEmbed(c)
        self.cls_token = nn.Parameter(torch.randn(1, 1, c.width) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, c.length, c.width) * 0.02)
        self.blocks = nn.ModuleList(_Block(c) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width, eps=_EPS)
        self.head = nn.Linear(c.width, c.embed_dim)
        self.weights_hash: str | None = None
        self._set_rope()

    def _set_rope(self) -> None:
        cos, sin = rope_tables(self.config)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Image embedding and tapped hidden states.

        Args:
            pixels: [N, 3, S, S] RGB with S = image_size, normalised by ``CLIP_MEAN`` and ``CLIP_STD``.

        Returns:
            [N, embed_dim], not normalised, and per tap the input of that block, [N, T, width], CLS first.

        Raises:
            InputError: another shape.
        """
        c = self.config
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, c.image_size, c.image_size):
            raise InputError(
                f"EVA-CLIP: pixels must be [N, 3, {c.image_size}, {c.image_size}], got {list(pixels.shape)}"
            )
        x = self.patch_embed(pixels)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        cos, sin = self.rope_cos.to(x.dtype), self.rope_sin.to(x.dtype)
        tapped = {}
        for i, block in enumerate(self.blocks):
            if i in c.taps:
                tapped[i] = x
            x = block(x, cos, sin)
        return self.head(self.norm(x[:, 0])), tuple(tapped[i] for i in c.taps)

    @classmethod
    def from_weights(
        cls, path: str | os.PathLike, *, config: EvaClipConfig | None = None, dtype: torch.dtype = torch.float32
    ) -> EvaClipVisual:
        """Load the tower from a safetensors file; keys with ``visual.`` in front, or without.

        The published ``EVA02_CLIP_L_336_psz14_s6B.pt`` is a torch pickle: convert it once with
        ``idcore.weights.convert_pickle``. Keys of the text tower are left aside; rotary tables in the file are
        checked against ours and not kept.

        Raises:
            WeightsError: not such a file, or its keys, shapes, values or rotary tables do not fit.
        """
        state, _ = read_safetensors(path, what="EVA-CLIP weights")
        if detect(state)[0] != "eva_clip":
            raise WeightsError(
                f"{path} is not an EVA02-CLIP file: it has no blocks.*.attn.inner_attn_ln; wanted "
                "EVA02_CLIP_L_336_psz14_s6B, converted to safetensors"
            )
        if any(k.startswith("visual.") for k in state):
            state = {k.removeprefix("visual."): t for k, t in state.items() if k.startswith("visual.")}
        with torch.device("meta"):
            tower = cls(config)
        ropes = {k: state.pop(k) for k in list(state) if ".rope." in f".{k}"}
        _check_ropes(ropes, tower.config, path)
        require_keys(state, {k: t.shape for k, t in tower.state_dict().items()}, f"EVA-CLIP weights {path}")
        tower.load_state_dict({k: t.to(dtype, copy=True) for k, t in state.items()}, assign=True)
        tower._set_rope()
        tower.weights_hash = fingerprint(state)
        return tower.eval().requires_grad_(False)


def _check_ropes(found: dict[str, Tensor], config: EvaClipConfig, path: str | os.PathLike) -> None:
    ours = dict(zip(("freqs_cos", "freqs_sin"), rope_tables(config)))
    for key, table in found.items():
        want = ours.get(key.rpartition(".")[2])
        if want is None:
            raise WeightsError(f"{path}: unexpected key {key}; wanted rope.freqs_cos and rope.freqs_sin")
        if table.shape != want.shape or float((table.float() - want).abs().max()) > _ROPE_TOLERANCE:
            raise WeightsError(
                f"{path}: {key} {list(table.shape)} is not the rotary table of a {config.grid}x"
                f"{config.grid} grid scaled to {config.rope_grid} (wanted {list(want.shape)}); "
                "it is the tower of another resolution"
            )
