"""Files of face embeddings as diffusers' users keep them (`image_embeds.ipadpt`), for `FaceID.encode`.

diffusers' guide saves the list that `prepare_ip_adapter_image_embeds` gives, one tensor per adapter, with `torch.save`:
[2, n, D] or [2, n, 1, D], the unconditional half first.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from idcore.encoders.face_features import FaceFeatures
from idcore.errors import InputError, WeightsError
from idcore.files import read_safetensors, sniff


def read_embeds(path: str | os.PathLike, *, guidance: bool = True, unpickle: bool = False) -> list[FaceFeatures]:
    """Face embeddings of each adapter in a file, ready for `encode` of a system that reads them.

    Args:
        path: Safetensors (the tensors in the order of their names), or a torch pickle.
        guidance: The first half of the rows is unconditional, as diffusers prepares them; False: all rows are people.
        unpickle: Allow a torch pickle; nothing of it but tensors is read (`weights_only=True`).

    Returns:
        One :class:`FaceFeatures` per tensor: [B, n, D] of B people with n photos each.

    Raises:
        WeightsError: the file is missing, damaged, or a pickle without `unpickle`.
        InputError: tensors of another form.
    """
    kind = sniff(path)
    if kind != "torch pickle":
        tensors, _ = read_safetensors(path, what="face embeddings")
        return as_features([tensors[k] for k in sorted(tensors)], guidance=guidance)
    if not unpickle:
        raise WeightsError(
            f"{path} is a torch pickle, which can carry code; it is not opened unless you pass unpickle=True "
            "(only tensors are read then), or save the embeddings as safetensors"
        )
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises many kinds; each means that the file is no plain set of tensors
        raise WeightsError(f"{path} does not open as plain tensors ({type(e).__name__}); no code of it was run") from e
    return as_features(loaded, guidance=guidance)


def as_features(embeds: Any, *, guidance: bool = True) -> list[FaceFeatures]:
    """The same for what is in memory: a tensor, or diffusers' `ip_adapter_image_embeds` list.

    Raises:
        InputError: no tensors of the form [rows, n, D] or [rows, n, 1, D], or an odd number of rows with guidance.
    """
    items = [embeds] if isinstance(embeds, Tensor) else embeds
    if not isinstance(items, Sequence) or not items or not all(isinstance(t, Tensor) for t in items):
        raise InputError(f"face embeddings: wanted a tensor or a list of tensors, got {type(embeds).__name__}")
    return [_one(t, guidance) for t in items]


def _one(t: Tensor, guidance: bool) -> FaceFeatures:
    if t.ndim == 4 and t.shape[2] == 1:
        t = t[:, :, 0]
    if t.ndim != 3 or not t.is_floating_point() or 0 in t.shape:
        raise InputError(
            f"face embeddings: wanted [rows, photos, D] or [rows, photos, 1, D] of floating point, got {list(t.shape)} "
            f"{t.dtype}; image tokens of CLIP are no face embeddings"
        )
    t = t.detach().to(torch.float32)
    if not guidance:
        return FaceFeatures(t)
    if t.shape[0] % 2:
        raise InputError(
            f"face embeddings: {t.shape[0]} rows have no unconditional half; pass guidance=False for people alone"
        )
    uncond, cond = t.chunk(2)
    return FaceFeatures(cond, uncond_embeds=uncond)
