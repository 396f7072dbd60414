"""The embedded model: text encoder, identity system and a small diffusers UNet on 64x64 pictures."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.sites import find_sites
from ..systems.tiny import GRID, LOOK, TinySystem, identity_map
from .tiny_text import TextEncoder, WordTokenizer

MAP = 36  # channels of the refined identity map, our choice


@dataclass(frozen=True)
class TinyConfig:
    """Hyper-parameters of the embedded model (all our choice)."""

    size: int = 64
    channels: tuple[int, ...] = (48, 64, 128)
    width: int = 128
    text_length: int = 24
    text_buckets: int = 64
    text_layers: int = 2

    def as_dict(self) -> dict:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict) -> TinyConfig:
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _positions(edge: int) -> Tensor:
    unit = (torch.arange(edge) + 0.5) / edge * 2 - 1
    y, x = torch.meshgrid(unit, unit, indexing="ij")
    waves = [f(k * math.pi * v) for k in (0.5, 1.0) for v in (x, y) for f in (torch.sin, torch.cos)]
    return torch.stack(waves)[None]


class TinyModel(nn.Module):
    """Predicts the clean picture from a noisy one, a text and identity tokens.

    Pictures are RGB in [-1, 1], [B, 3, 64, 64], folded to 12 channels at 32x32 for the UNet. The identity
    enters twice: through `id_attention` in the UNet's cross-attentions (put on by `attach`, or by the
    training's own processors) and as an aligned map beside the noisy picture.
    """

    def __init__(self, config: TinyConfig | None = None) -> None:
        super().__init__()
        from diffusers import UNet2DConditionModel

        self.config = config = config or TinyConfig()
        self.tokenizer = WordTokenizer(config.text_length, config.text_buckets)
        self.text = TextEncoder(self.tokenizer.size, config.text_length, config.width, config.text_layers)
        deep = len(config.channels) - 1
        self.unet = UNet2DConditionModel(
            sample_size=config.size // 2,
            in_channels=12 + 12 + MAP + 8,
            out_channels=12,
            layers_per_block=1,
            block_out_channels=config.channels,
            cross_attention_dim=config.width,
            norm_num_groups=16,
            down_block_types=("DownBlock2D",) * deep + ("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * deep,
            attention_head_dim=tuple(c // 32 for c in config.channels),
            use_linear_projection=True,
            class_embed_type="projection",
            projection_class_embeddings_input_dim=config.width,
            resnet_time_scale_shift="scale_shift",
        )
        self.system = TinySystem(find_sites(self.unet), config.width)
        c = config.width // 4
        self.look = nn.Conv2d(c, LOOK, 3, padding=1)  # the reference as the features show it
        self.map = nn.Sequential(nn.Conv2d(c, 64, 3, padding=1), nn.SiLU(), nn.Conv2d(64, MAP, 1))
        self.register_buffer("positions", _positions(2 * GRID), persistent=False)

    @property
    def reference_channels(self) -> int:
        """Channels of `forward`'s reference."""
        return 12 + MAP

    def reference(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(look [N, 12, 32, 32], map [N, MAP, 32, 32]) of identity tokens."""
        m = identity_map(tokens)
        return self.look(m), self.map(m)

    def forward(self, x: Tensor, t: Tensor, text: Tensor, pooled: Tensor, reference: Tensor) -> Tensor:
        """Predict the clean picture.

        Args:
            x: noisy picture [B, 3, 64, 64]; t: its noise level [B], 0 clean to 1 noise.
            text: [B, L, E]; pooled: [B, E], from `self.text`.
            reference: [B, 12 + MAP, 32, 32], `torch.cat(self.reference(tokens), 1)` or zeros.
        """
        inp = torch.cat([F.pixel_unshuffle(x, 2), reference, self.positions.expand(len(x), -1, -1, -1).to(x.dtype)], 1)
        inp = inp.contiguous(memory_format=torch.channels_last)  # the faster order on CPUs
        out = self.unet(inp, t * 1000, encoder_hidden_states=text, class_labels=pooled).sample
        return F.pixel_shuffle(out + reference[:, :12], 2)
