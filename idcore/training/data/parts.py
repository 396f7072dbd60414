"""Face parsing of a picture, from the chip it was made on to the crop that is trained on."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...encoders.face_parsing import LABELS
from .buckets import Crop

NAME = "parts"  # of the cached feature, and of Batch.extra
SIDE = 128  # cells of the cached map's side (our choice: 32 kB a picture in 16 bit)
UNSEEN = 255  # outside of the chip
# What makes a face (our choice): all of it but hair, neck, hat and jewels.
FACE = tuple(LABELS.index(n) for n in (
    "skin", "left brow", "right brow", "left eye", "right eye", "glasses", "left ear", "right ear", "nose", "mouth",
    "upper lip", "lower lip",
))  # fmt: skip


def parts_map(labels: np.ndarray, matrix: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Classes of a chip's pixels in the frame of its picture, stretched to a square.

    Args:
        labels: [S, S] integer, indices into `face_parsing.LABELS`.
        matrix: [2, 3], picture to chip, pixel centres at whole numbers.
        size: the picture's width and height.

    Returns:
        uint8 [SIDE, SIDE]; `UNSEEN` where the chip does not reach.
    """
    unit = (np.arange(SIDE) + 0.5) / SIDE
    x, y = np.meshgrid(unit * size[0] - 0.5, unit * size[1] - 0.5)
    at = np.stack([x, y, np.ones_like(x)], -1) @ np.asarray(matrix, np.float64).T
    column, row = (np.rint(at[..., i]).astype(int) for i in range(2))
    inside = (column >= 0) & (row >= 0) & (column < labels.shape[1]) & (row < labels.shape[0])
    found = np.full((SIDE, SIDE), UNSEEN, np.uint8)
    found[inside] = labels[row[inside], column[inside]]
    return torch.from_numpy(found)


def parts_in_crop(parts: Tensor, crop: Crop) -> Tensor:
    """A picture's map in its crop, uint8 [H, W], by the nearest cell.

    Args:
        parts: [SIDE, SIDE] of the picture as it was read for this crop: mirrored where the crop is.
        crop: cut from the picture, then mirrored or not.
    """
    if crop.flip:
        parts = parts.flip(-1)
    width, height = crop.bucket
    column = ((torch.arange(width) + crop.left + 0.5) / crop.width * SIDE).long().clamp(0, SIDE - 1)
    row = ((torch.arange(height) + crop.top + 0.5) / crop.height * SIDE).long().clamp(0, SIDE - 1)
    cut = parts.round().to(torch.uint8)[row[:, None], column[None]]
    return cut.flip(-1) if crop.flip else cut


def face_weights(parts: Tensor, size: tuple[int, int], extra: float) -> Tensor:
    """Weights [B, 1, h, w] float32 of a loss: 1 + `extra` x the face's share of a cell, mean 1 in each sample.

    Args:
        parts: uint8 [B, H, W].
        size: (h, w) of the latents; divides H and W, or nearly.
        extra: how much more the face counts.
    """
    face = torch.isin(parts, torch.tensor(FACE, dtype=parts.dtype, device=parts.device)).float()[:, None]
    weight = 1 + extra * F.adaptive_avg_pool2d(face, size)
    return weight / weight.mean((2, 3), keepdim=True)
