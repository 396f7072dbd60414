"""Textual inversion files (`learned_embeds.safetensors`) in diffusers' form, in and out.

One text encoder: one tensor [E] or [k, E] under the placeholder's name. SDXL: `clip_l` [k, 768] and `clip_g` [k, 1280],
as diffusers' training script writes and `load_textual_inversion` reads them; the placeholder stands in the metadata,
where this module wrote the file.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from ..files import check_container, read_safetensors, write_safetensors
from ..identity import Identity
from .placeholders import check_placeholder

PAIR = ("clip_l", "clip_g")


def is_inversion(path: str | os.PathLike) -> bool:
    """Whether a safetensors file has the keys of a textual inversion file, read from its header alone."""
    header, metadata = check_container(path, "identity")
    alone = len(header) == 1 and len(next(iter(header.values()))["shape"]) in (1, 2)
    return (alone or set(header) == set(PAIR)) and not metadata.get("format", "").startswith("idcore-")


def read_words(path: str | os.PathLike, placeholder: str | None = None) -> Identity:
    """Words of a textual inversion file as an identity that `idcore.attach(pipe, None, identity)` takes.

    Args:
        path: Safetensors. A pickle (`learned_embeds.bin`) is refused; `idcore.weights.convert_pickle` makes
            safetensors of it.
        placeholder: What prompts shall say; default: the file's own name for it, else "S*".

    Returns:
        Tokens [1, k, E] of the system "words".

    Raises:
        WeightsError: the file cannot be read.
        InputError: it holds something else than words.
    """
    tensors, metadata = read_safetensors(path, what="textual inversion")
    pair = set(tensors) == set(PAIR)
    if not pair and len(tensors) != 1:
        raise InputError(
            f"{path} is no textual inversion file: wanted one tensor, or clip_l and clip_g, got {len(tensors)} tensors "
            f"({', '.join(sorted(tensors)[:4])})"
        )
    names = PAIR if pair else tuple(tensors)
    parts = [_rows(tensors[n], n, path) for n in names]
    if len({len(p) for p in parts}) != 1:
        raise InputError(f"{path}: clip_l has {len(parts[0])} words and clip_g {len(parts[1])}; wanted as many")
    own = metadata.get("placeholder", "S*") if pair else names[0]
    meta = {"placeholder": placeholder or own, "widths": [p.shape[-1] for p in parts], "file": Path(path).name}
    check_placeholder(meta["placeholder"])
    return Identity(torch.cat(parts, -1)[None], None, "words", meta)


def write_words(
    path: str | os.PathLike, tokens: Tensor, widths: list[int], placeholder: str, metadata: dict[str, str] | None = None
) -> Path:
    """Write words [k, sum of widths] as a textual inversion file.

    Args:
        path: The file, by custom `learned_embeds.safetensors`.
        tokens: The words, one text encoder's beside the other's.
        widths: Of the text encoders: one, or SDXL's two.
        placeholder: The tensor's name (one text encoder), or in the metadata (two).
        metadata: Further strings for the file.

    Raises:
        InputError: shapes that do not fit.
        WeightsError: the file cannot be written.
    """
    check_placeholder(placeholder)
    if tokens.ndim != 2 or len(widths) not in (1, 2) or tokens.shape[-1] != sum(widths):
        raise InputError(
            f"textual inversion: wanted words [k, {' + '.join(map(str, widths))}] for one or two text encoders, got "
            f"{list(tokens.shape)}"
        )
    names = (placeholder,) if len(widths) == 1 else PAIR
    parts = tokens.detach().cpu().split(list(widths), -1)
    return write_safetensors(path, dict(zip(names, parts)), {"placeholder": placeholder, **(metadata or {})})


def _rows(t: Tensor, name: str, path: str | os.PathLike) -> Tensor:
    """[k, E] float32"""
    t = t[None] if t.ndim == 1 else t
    if t.ndim != 2 or 0 in t.shape or not t.is_floating_point():
        raise InputError(f"{path}: {name} must be word embeddings [k, E] or [E], got {list(t.shape)} {t.dtype}")
    return t.to(torch.float32, copy=True)
