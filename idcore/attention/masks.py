"""Region masks of identities: from user's forms to one weight per image token."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from .kv_bank import normal_mode
from .regions import layout_masks

_GRIDS_KEPT = 64  # resized masks: identities times resolutions times picture sizes


class PeopleMasks:
    """Masks of the identities of one `attach`, and what was resized of them for layers.

    Attributes:
        given: per identity float32 [1 or images, H, W], or None: everywhere.
        some: whether there is a mask at all.
        grids: masks per token, by identity, grid and device.
    """

    def __init__(self, given: tuple[Tensor | None, ...]) -> None:
        self.given = given
        self.some = any(m is not None for m in given)
        self.grids: dict[Any, Tensor] = {}

    def to(self, device: torch.device) -> PeopleMasks:
        """The same masks on a device, nothing resized yet."""
        with normal_mode():
            return PeopleMasks(tuple(None if m is None else m.to(device) for m in self.given))

    def at(self, q: Tensor, size: tuple[int, int] | None, parts: int) -> list[Tensor | None]:
        """Per identity None or a weight per token, [1 or B, Lq].

        Args:
            q: queries [B, H, Lq, D].
            size: height and width of the UNet's input; None: not known.
            parts: of guidance, into which the batch falls.

        Raises:
            InputError: no size, or masks for another number of images.
        """
        if size is None:
            raise InputError(
                "id_mask: the size of the latent is not known, because the layer was called outside of its UNet; "
                "call the UNet, or drop the masks"
            )
        batch, _, tokens, _ = q.shape
        grid, images = grid_of(tokens, *size), batch // parts
        small = (self._one(j, mask, grid, images, q.device) for j, mask in enumerate(self.given))
        return [m if m is None or m.shape[0] == 1 else m.repeat(parts, 1) for m in small]

    def _one(self, j: int, mask: Tensor | None, grid: tuple[int, int], images: int, device: Any) -> Tensor | None:
        if mask is None:
            return None
        if mask.shape[0] not in (1, images):
            raise InputError(
                f"id_mask: mask {j} has {mask.shape[0]} rows for {images} images; give one, or one per image"
            )
        if torch.compiler.is_compiling():
            return to_tokens(mask.to(device), grid)
        key = (j, grid, device)
        small = self.grids.get(key)  # another thread may clear them at any time
        if small is None:
            if len(self.grids) >= _GRIDS_KEPT:
                self.grids.clear()
            with normal_mode():
                small = self.grids[key] = to_tokens(mask.to(device), grid)
        return small


def read_masks(masks: Any, count: int) -> tuple[Tensor | None, ...]:
    """One float32 mask [1 or n, H, W] per identity, or None (everywhere).

    Args:
        masks: None; a layout such as "left, right" or "1 1 / 1" (see `attention.regions`); for one identity a mask; a
            sequence with one mask or None per identity; a tensor [count, H, W]; or diffusers'
            `IPAdapterMaskProcessor.preprocess` result [count, 1, H, W], also as its list form [[1, count, H, W]]. A
            mask is a PIL image, array or tensor [H, W] (one for all images) or [n, H, W] (one per image of the batch,
            without the guidance halves); bool, uint8 0..255 or float 0..1. Whatever its size, it is stretched over
            the whole picture.
        count: number of identities.

    Raises:
        InputError: wrong number, rank, dtype or range.
    """
    if masks is None:
        return (None,) * count
    if isinstance(masks, str):
        masks = layout_masks(masks)
    if isinstance(masks, (list, tuple)):
        items = list(masks)
        if len(items) == 1 and count > 1:
            items = _split(_tensor(items[0]), count)
    else:
        items = _split(_tensor(masks), count)
    if len(items) != count:
        raise InputError(f"id_mask: {count} identities need {count} masks (None for everywhere), got {len(items)}")
    return tuple(None if m is None else _one(_tensor(m), j) for j, m in enumerate(items))


def grid_of(tokens: int, height: int, width: int) -> tuple[int, int]:
    """Token grid (rows, columns) of a layer with `tokens` queries in a UNet whose input is height x width.

    A diffusers UNet halves each side, rounding up, once per resolution.

    Raises:
        InputError: no number of halvings gives that many tokens.
    """
    h, w = height, width
    while True:
        if h * w == tokens:
            return h, w
        if h * w < tokens or (h == 1 and w == 1):
            raise InputError(
                f"id_mask: a layer has {tokens} image tokens, which no halving of the latent {height}x{width} "
                "gives; masks work on UNets that halve height and width at each resolution"
            )
        h, w = (h + 1) // 2, (w + 1) // 2


def to_tokens(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean of the mask over each token's cell. [n, H, W] -> [n, rows * columns], 0..1

    Area averaging (our choice; diffusers: bicubic) keeps the range and is exactly 0 where a whole cell is 0.
    """
    return F.adaptive_avg_pool2d(mask[:, None], grid).flatten(1)


def _tensor(mask: Any) -> Tensor:
    if mask is None:
        raise InputError("id_mask: None stands for one identity in a list; pass None itself to drop all masks")
    if isinstance(mask, Tensor):
        t = mask
    else:
        if hasattr(mask, "convert"):
            mask = mask.convert("L")
        try:
            t = torch.from_numpy(np.array(mask))
        except TypeError as e:
            raise InputError(
                f"id_mask: wanted a PIL image, an array or a tensor [H, W], got {type(mask).__name__}"
            ) from e
    if t.dtype == torch.uint8:
        t = t.float() / 255
    if t.dtype != torch.bool and not t.dtype.is_floating_point:
        raise InputError(f"id_mask: wanted bool, uint8 (0..255) or float (0..1), got {t.dtype}")
    return t.detach().to(torch.float32)


def _split(t: Tensor, count: int) -> list[Tensor]:
    if count == 1:
        return [t]
    if t.dim() == 4 and t.shape[0] == 1:
        t = t[0]
    if t.dim() not in (3, 4) or t.shape[0] != count:
        raise InputError(
            f"id_mask: {count} identities need [{count}, H, W], [{count}, 1, H, W] or a list of {count} masks, "
            f"got one of shape {list(t.shape)}"
        )
    return list(t)


def _one(t: Tensor, j: int) -> Tensor:
    if t.dim() == 2:
        t = t[None]
    if t.dim() == 4 and t.shape[1] == 1:
        t = t[:, 0]
    if t.dim() != 3 or t.numel() == 0:
        raise InputError(f"id_mask: mask {j} must be [H, W] or [images, H, W], got {list(t.shape)}")
    if not bool(((t >= 0) & (t <= 1)).all()):
        raise InputError(
            f"id_mask: mask {j} must lie in 0..1 (uint8: 0..255), got {float(t.min()):g}..{float(t.max()):g}"
        )
    return t
