"""A vision transformer for faces in timm's key names (`vit_base_patch16_224` and its like; arXiv 2010.11929).

Sizes are read from the weights. It hands out the class token after chosen blocks, and a face's identity vector.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idcore.errors import InputError, WeightsError
from idcore.files import require_keys
from idcore.weights import fingerprint, read_safetensors

_EPS = 1e-6
_HEAD_DIM = 64  # of every published ViT: heads do not show in the weights


@dataclass(frozen=True)
class FaceViTConfig:
    """Sizes; the defaults are ViT-B/16 at 224 pixels.

    Attributes:
        image_size, patch_size: In pixels; the grid has image_size // patch_size cells a side.
        width, depth, heads, mlp_dim: Of the transformer.
        id_dim: Width of the identity vector, by a linear head on the last class token (our choice: 512, as face
            recognisers have); 0: no head, the normalised class token itself (as StableIdentity reads its ViT).
    """

    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_dim: int = 3072
    id_dim: int = 512

    def __post_init__(self) -> None:
        values = dataclasses.asdict(self)
        wrong = [n for n, v in values.items() if not isinstance(v, int) or v < (0 if n == "id_dim" else 1)]
        if wrong or self.image_size % self.patch_size or self.width % self.heads:
            raise InputError(
                "face ViT: sizes must be whole numbers above 0, image_size a multiple of patch_size and width one of "
                f"heads; got {self}"
            )

    @classmethod
    def small(cls, **changes: int) -> FaceViTConfig:
        """For machines without an accelerator: 112 pixels, 2.8 M parameters (our choice)."""
        base = {"image_size": 112, "patch_size": 14, "width": 192, "depth": 6, "heads": 3, "mlp_dim": 768}
        return cls(**{**base, "id_dim": 128, **changes})

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    @property
    def id_width(self) -> int:
        """Width of the identity vector."""
        return self.id_dim or self.width


class _PatchEmbed(nn.Module):
    def __init__(self, c: FaceViTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, c.width, c.patch_size, c.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class _Attention(nn.Module):
    def __init__(self, c: FaceViTConfig) -> None:
        super().__init__()
        self.heads = c.heads
        self.qkv = nn.Linear(c.width, 3 * c.width)
        self.proj = nn.Linear(c.width, c.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, c: FaceViTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(c.width, c.mlp_dim)
        self.fc2 = nn.Linear(c.mlp_dim, c.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _Block(nn.Module):
    def __init__(self, c: FaceViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(c.width, eps=_EPS)
        self.attn = _Attention(c)
        self.norm2 = nn.LayerNorm(c.width, eps=_EPS)
        self.mlp = _Mlp(c)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class FaceViT(nn.Module):
    """Pixels to an identity vector and the class token after chosen blocks. State dicts have timm's keys."""

    def __init__(self, config: FaceViTConfig | None = None) -> None:
        super().__init__()
        c = self.config = config or FaceViTConfig()
        self.cls_token = nn.Parameter(torch.randn(1, 1, c.width) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, c.grid**2 + 1, c.width) * 0.02)
        self.patch_embed = _PatchEmbed(c)
        self.blocks = nn.ModuleList(_Block(c) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width, eps=_EPS)
        self.head = nn.Linear(c.width, c.id_dim) if c.id_dim else nn.Identity()

    def forward(self, pixels: Tensor, taps: tuple[int, ...] = ()) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Identity vector and class tokens.

        Args:
            pixels: [N, 3, S, S] RGB in -1..1, S = image_size.
            taps: Blocks counted from 1: the class token behind each is handed out, not normalised.

        Returns:
            [N, id_width], not normalised, and per tap [N, width].

        Raises:
            InputError: another shape, or no such block.
        """
        c = self.config
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, c.image_size, c.image_size):
            raise InputError(
                f"face ViT: pixels must be [N, 3, {c.image_size}, {c.image_size}], got {list(pixels.shape)}"
            )
        check_taps(taps, c.depth)
        x = self.patch_embed(pixels)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        seen = {}
        for i, block in enumerate(self.blocks, 1):
            x = block(x)
            if i in taps:
                seen[i] = x[:, 0]
        return self.head(self.norm(x[:, 0])), tuple(seen[i] for i in taps)

    @classmethod
    def from_weights(
        cls,
        path: str | os.PathLike,
        *,
        image_size: int | None = None,
        heads: int | None = None,
        head: str = "auto",
        dtype: torch.dtype = torch.float32,
    ) -> FaceViT:
        """Read a timm ViT from a safetensors file (a pickle: `idcore.weights.convert_pickle` first).

        Args:
            path: The file; keys may have one prefix ("model.", "backbone.").
            image_size: Side of the pictures that it shall read; the position embedding is resized. Default: its own.
            heads: Default: width / 64, as in every published size.
            head: "auto": the file's linear head, where it has one; "none": leave it out (a classifier's head is no
                identity vector).
            dtype: Of the loaded weights.

        Raises:
            WeightsError: not such a file, or keys of a kind that this network lacks.
            InputError: an unknown `head`, or sizes that do not fit.
        """
        tensors, _ = read_safetensors(path, what="face ViT weights")
        return cls.from_tensors(tensors, path, image_size=image_size, heads=heads, head=head, dtype=dtype)

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        where: str | os.PathLike,
        *,
        image_size: int | None = None,
        heads: int | None = None,
        head: str = "auto",
        dtype: torch.dtype = torch.float32,
    ) -> FaceViT:
        """As `from_weights`, of tensors that were read from `where`."""
        if head not in ("auto", "none"):
            raise InputError(f'face ViT: head must be "auto" or "none", got {head!r}')
        state = _unprefixed(tensors, where)
        if head == "none":
            state = {k: t for k, t in state.items() if not k.startswith("head.")}
        config = _sizes(state, where, image_size, heads)
        if state["pos_embed"].shape[1] != config.grid**2 + 1:
            state["pos_embed"] = resized_positions(state["pos_embed"], config.grid)
        with torch.device("meta"):
            made = cls(config)
        require_keys(state, {k: t.shape for k, t in made.state_dict().items()}, f"face ViT weights {where}")
        made.load_state_dict({k: t.to(dtype, copy=True) for k, t in state.items()}, assign=True)
        return made.eval().requires_grad_(False)

    def weights_hash(self) -> str:
        """Names these weights in files."""
        return fingerprint(self.state_dict())


def check_taps(taps: tuple[int, ...], depth: int) -> None:
    """Raise InputError unless all are blocks 1 to `depth`."""
    if any(not 1 <= t <= depth for t in taps) or len(set(taps)) != len(taps):
        raise InputError(f"face ViT: taps must be different blocks of 1 to {depth}, got {tuple(taps)}")


def resized_positions(table: Tensor, grid: int) -> Tensor:
    """A position embedding [1, 1 + g * g, W] for another grid: bicubic with antialiasing, as timm resizes.

    Raises:
        InputError: the table is that of no square grid with one class token.
    """
    side = math.isqrt(table.shape[1] - 1)
    if side * side != table.shape[1] - 1:
        raise InputError(f"face ViT: a position embedding of {table.shape[1]} rows is no square grid and a class token")
    cells = table[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    cells = F.interpolate(cells, size=(grid, grid), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([table[:, :1], cells.flatten(2).transpose(1, 2).to(table.dtype)], 1)


def _unprefixed(tensors: Mapping[str, Tensor], where: str | os.PathLike) -> dict[str, Tensor]:
    end = "patch_embed.proj.weight"
    prefix = next((k[: -len(end)] for k in tensors if k.endswith(end)), None)
    if prefix is None or f"{prefix}cls_token" not in tensors or f"{prefix}pos_embed" not in tensors:
        raise WeightsError(
            f"{where} is no ViT in timm's key names: wanted patch_embed.proj.weight, cls_token, pos_embed and "
            f"blocks.*, got {', '.join(sorted(tensors)[:3])}, ..."
        )
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def _sizes(
    state: Mapping[str, Tensor], where: str | os.PathLike, image_size: int | None, heads: int | None
) -> FaceViTConfig:
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    depth = len({k.split(".")[1] for k in state if k.startswith("blocks.")})
    mlp = state.get("blocks.0.mlp.fc1.weight")
    if mlp is None or heads is None and width % _HEAD_DIM:
        what = "blocks.0.mlp.fc1.weight is missing" if mlp is None else f"width {width} is no multiple of {_HEAD_DIM}"
        raise WeightsError(f"{where}: the sizes of this ViT cannot be read ({what}); give heads, or another file")
    side = math.isqrt(state["pos_embed"].shape[1] - 1) * patch
    id_dim = len(state["head.weight"]) if "head.weight" in state else 0
    size = image_size or side
    return FaceViTConfig(size, patch, width, depth, heads or width // _HEAD_DIM, len(mlp), id_dim)
