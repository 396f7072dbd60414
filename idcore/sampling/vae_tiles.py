"""How much memory a decode takes, and how it is cut where that is too much."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

SHARE = 0.8  # of the free memory that a decode may plan with (our choice)
LEAST = 32  # side of the smallest tile, in latent pixels (our choice)
OVERLAP = 0.25  # of a tile's side that it shares with the next one at least, as in diffusers


class Plan(NamedTuple):
    """How a batch of latents is decoded."""

    pictures: int  # at once
    tile: int | None  # side of a tile in latent pixels; None: whole pictures


def decode_bytes(config: Any, pictures: int, height: int, width: int, itemsize: int) -> int:
    """Memory that decoding takes at its peak, without weights and convolutions' workspaces.

    Args:
        config: of diffusers' AutoencoderKL; the blocks of its decoder count.
        pictures, height, width: of the latents.
        itemsize: bytes of a value.
    """
    channels = list(reversed(config.block_out_channels))
    most, pixels, before = 0, height * width, channels[0]
    for i, now in enumerate(channels):
        last = i == len(channels) - 1
        # The caller holds a block's input while it runs; a residual block holds its own input, the normalised one
        # and what the activation makes of that.
        first, others = 3 * before, before + 3 * now
        grown = 0 if last else before + now + 4 * 2 * now  # nearest neighbours, and their convolution
        most = max(most, pixels * max(first, others, grown))
        before, pixels = now, pixels * (1 if last else 4)
    return most * pictures * itemsize


def free_bytes(device: torch.device) -> float:
    """Memory that may be taken on a device now; infinite where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    table = Path("/proc/meminfo")
    if device.type != "cpu" or not table.exists():
        return math.inf
    (kilobytes,) = (line.split()[1] for line in table.read_text().splitlines() if line.startswith("MemAvailable"))
    return int(kilobytes) * 1024


def plan_decode(config: Any, shape: torch.Size, itemsize: int, limit: float) -> Plan:
    """Whole pictures, as many at once as fit into `limit` bytes; where not even one does, the largest tiles that do.

    Args:
        config: of the autoencoder.
        shape: of the latents.
        itemsize: bytes of a value.
        limit: bytes.
    """
    count, _, height, width = shape
    one = decode_bytes(config, 1, height, width, itemsize)
    if one <= limit:
        return Plan(int(min(count, limit / one)), None)
    tile = max(height, width)
    while tile > LEAST and decode_bytes(config, 1, min(tile, height), min(tile, width), itemsize) > limit:
        tile -= 1
    return Plan(1, tile if tile < max(height, width) else None)


def tile_starts(length: int, tile: int) -> list[int]:
    """Where tiles of one size begin so that they cover `length` evenly, neighbours sharing at least `OVERLAP`."""
    step = max(1, int(tile * (1 - OVERLAP)))
    count = max(0, math.ceil((length - tile) / step))
    return [round(i * (length - tile) / count) for i in range(count + 1)] if count else [0]


def decode_tiles(decode: Callable[[Tensor], Tensor], latents: Tensor, tile: int, factor: int) -> Tensor:
    """Decode overlapping tiles of one size and fade each into the next.

    Group norms see a tile, not the picture: colours and contrast may differ a little from a whole decode.

    Args:
        decode: [1, 4, h, w] -> [1, 3, factor h, factor w].
        latents: [1, 4, H, W].
        tile: side in latent pixels; smaller along a side that is smaller.
        factor: pixels of the picture per latent pixel.
    """
    sides = [min(tile, n) for n in latents.shape[-2:]]
    begins = [tile_starts(n, side) for n, side in zip(latents.shape[-2:], sides)]
    fades = [_fades(b, side, n, factor) for b, side, n in zip(begins, sides, latents.shape[-2:])]
    picture: Tensor | None = None
    for top, down in zip(begins[0], fades[0]):
        for left, along in zip(begins[1], fades[1]):
            made = decode(latents[..., top : top + sides[0], left : left + sides[1]])
            if picture is None:
                picture = made.new_zeros(1, made.shape[1], *(factor * n for n in latents.shape[-2:]))
            place = picture[..., factor * top : factor * (top + sides[0]), factor * left : factor * (left + sides[1])]
            place += made * down.to(made)[:, None] * along.to(made)
    return picture


def _fades(begins: list[int], tile: int, length: int, factor: int) -> list[Tensor]:
    """Weights of each tile's pixels along one side; those of all tiles add up to 1 at each pixel."""
    at = torch.arange(length * factor, dtype=torch.float64) + 0.5
    raw = torch.zeros(len(begins), length * factor, dtype=torch.float64)
    for i, begin in enumerate(begins):
        # As high as the tile's nearer edge is far; the picture's own edges do not fade.
        left = at - begin * factor if begin else torch.full_like(at, math.inf)
        right = (begin + tile) * factor - at if begin + tile < length else torch.full_like(at, math.inf)
        raw[i] = torch.minimum(left, right).clamp(0, tile * factor)
    weights = raw / raw.sum(0)
    return [w[factor * b : factor * (b + tile)] for w, b in zip(weights, begins)]
