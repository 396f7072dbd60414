"""The identity side of the embedded model: spatial identity tokens read from the recogniser's early features.

Our own system, in PuLID's manner (identity tokens with their own keys and values in every cross-attention,
Guo et al. 2024, arXiv 2404.16022, section 3.1) with DreamIdentity's observation that early multi-scale
features of a face recogniser keep what its embedding loses (Chen et al. 2023, arXiv 2307.00300, 3.2).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.sites import find_sites
from ..attention.types import AttentionOptions, Site
from ..errors import InputError

FRAME = 96  # edge of the aligned picture that identities are read from, pixels
CHIP = 150  # edge of the recogniser's input, pixels
WIDE_PADDING = 0.6
TIGHT_PADDING = 0.25
GRID = 16
NUM_GLOBAL = 4
LOOK = 12  # 2x2 RGB pixels
STAGES = ((32, 35), (64, 17), (128, 8))  # channels and edge of feat0, feat1, feat2


def stage_centres(stage: int) -> Tensor:
    """Where the cells of a feature map look, as fractions of the chip's edge.

    From the recogniser's geometry: 7x7 stride 2, 3x3 pool stride 2, then 3x3 stride 2 per stage, all
    without padding, so that cell j of stage s is centred on pixel 4j+5, 8j+9, 16j+17.
    """
    step = 4 * 2**stage
    return (torch.arange(STAGES[stage][1]) * step + step + 1 + 0.5) / CHIP


def resample_grid(stage: int, edge: int) -> Tensor:
    """Sampling grid [1, edge, edge, 2] that puts a stage's cells onto an edge x edge grid over the chip."""
    first, last = stage_centres(stage)[[0, -1]].tolist()
    want = (torch.arange(edge) + 0.5) / edge
    unit = (want - first) / (last - first) * 2 - 1
    y, x = torch.meshgrid(unit, unit, indexing="ij")
    return torch.stack([x, y], -1)[None]


def chips_of(frames: Tensor) -> tuple[Tensor, Tensor]:
    """The wide and the tight chip [N, 3, 150, 150] of aligned frames [N, 3, S, S] in the wide framing.

    Both come from the same small frame, so that a photo and a drawn person look alike to the encoder
    whatever the photo's resolution.
    """
    wide = F.interpolate(frames, size=(CHIP, CHIP), mode="bilinear", align_corners=False)
    half = (1 + 2 * TIGHT_PADDING) / (1 + 2 * WIDE_PADDING)
    unit = ((torch.arange(CHIP, device=frames.device) + 0.5) / CHIP * 2 - 1) * half
    y, x = torch.meshgrid(unit, unit, indexing="ij")
    grid = torch.stack([x, y], -1)[None].expand(len(frames), -1, -1, -1)
    return wide, F.grid_sample(frames, grid.to(frames.dtype), mode="bilinear", align_corners=False)


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(width, width, 3, padding=1)
        self.b = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(F.silu(self.a(F.silu(x))))


class IdentityEncoder(nn.Module):
    """Features of the recogniser -> identity tokens [N, 4 + 16*16, E].

    The first 4 tokens come from the 128-d embedding of the tight chip, the others, row by row, from
    feat0..feat2 of the wide chip. Every spatial token also carries a 2x2 patch of an identity map.
    """

    def __init__(self, width: int = 128, hidden: int = 64, blocks: int = 2) -> None:
        super().__init__()
        self.width = width
        for k in range(3):
            edge = 64 if k == 0 else 32
            self.register_buffer(f"grid{k}", resample_grid(k, edge), persistent=False)
            self.register_buffer(f"mean{k}", torch.zeros(STAGES[k][0], 1, 1))
            self.register_buffer(f"std{k}", torch.ones(STAGES[k][0], 1, 1))
        self.inp = nn.Conv2d(32 * 4 + 64 + 128, hidden, 1)
        self.blocks = nn.Sequential(*[_Residual(hidden) for _ in range(blocks)])
        self.out = nn.Conv2d(4 * hidden, width, 1)
        self.globals = nn.Sequential(nn.Linear(128, 2 * width), nn.GELU(), nn.Linear(2 * width, NUM_GLOBAL * width))

    def _place(self, k: int, feat: Tensor) -> Tensor:
        x = (feat - getattr(self, f"mean{k}")) / getattr(self, f"std{k}")
        grid = getattr(self, f"grid{k}").expand(len(x), -1, -1, -1).to(x.dtype)
        return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=True)

    def forward(self, feats: list[Tensor], embedding: Tensor) -> Tensor:
        """feats: feat0..feat2 of the wide chip; embedding [N, 128] of the tight chip."""
        fine = F.pixel_unshuffle(self._place(0, feats[0]), 2)
        x = torch.cat([fine, self._place(1, feats[1]), self._place(2, feats[2])], 1)
        x = self.blocks(self.inp(x.contiguous(memory_format=torch.channels_last)))
        spatial = self.out(F.pixel_unshuffle(F.silu(x), 2)).flatten(2).transpose(1, 2)
        globals_ = self.globals(embedding * 8).unflatten(1, (NUM_GLOBAL, self.width))  # * 8: about unit deviation
        return torch.cat([globals_, spatial], 1)


def identity_map(tokens: Tensor) -> Tensor:
    """The spatially aligned map [N, E/4, 32, 32] that the tokens [N, 260, E] carry."""
    spatial = tokens[:, NUM_GLOBAL:].transpose(1, 2).unflatten(2, (GRID, GRID))
    return F.pixel_shuffle(spatial, 2)


class TinySystem(nn.Module):
    """Identity encoder plus one `id_to_k` and `id_to_v` for every cross-attention; a `systems.base.System`.

    Args:
        sites: the UNet's cross-attention layers (`idcore.attention.sites.find_sites`).
        width: E, the width of an identity token.
    """

    name = "tiny"

    def __init__(self, sites: list[Site], width: int = 128) -> None:
        super().__init__()
        self.width = width
        self.site_names = [s.name for s in sites]
        self.encoder = IdentityEncoder(width)
        self.position = nn.Parameter(torch.randn(NUM_GLOBAL + GRID * GRID, width) * 0.3)
        self.norm = nn.LayerNorm(width)
        self.id_to_k = nn.ModuleList([nn.Linear(width, s.hidden, bias=False) for s in sites])
        self.id_to_v = nn.ModuleList([nn.Linear(width, s.hidden, bias=False) for s in sites])

    @property
    def options(self) -> AttentionOptions:
        return AttentionOptions(merge="add", num_zero=0, num_global=NUM_GLOBAL)

    def sites(self, unet: nn.Module) -> list[Site]:
        found = find_sites(unet)
        if [s.name for s in found] != self.site_names:
            raise InputError(
                f"the tiny system has keys and values for {len(self.site_names)} layers of its own UNet, "
                f"this UNet has {len(found)} other ones: attach it to the tiny model's UNet"
            )
        return found

    def project(self, site: Site, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [Bi, L, C] of one layer from tokens [Bi, 260, E]."""
        if tokens.ndim != 3 or tokens.shape[1:] != self.position.shape:
            want = tuple(self.position.shape)
            raise InputError(f"tiny identity tokens are [Bi, {want[0]}, {want[1]}], got {tuple(tokens.shape)}")
        return self._project(self.site_names.index(site.name), tokens)

    def _project(self, k: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(tokens.to(self.position) + self.position)
        return self.id_to_k[k](x), self.id_to_v[k](x)
