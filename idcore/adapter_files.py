"""Files of the IP-Adapter family: ``image_proj.*`` and ``ip_adapter.{index}.*``, as safetensors.

Published as nested torch pickles (``idcore convert FILE --out FILE --unpickle`` makes safetensors with dotted keys)
or as safetensors with these very keys. ``index`` counts `unet.attn_processors`, self-attention included, so that keys
and values stand at odd numbers; FaceID files also carry a LoRA for every layer, at all numbers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from idcore.errors import WeightsError
from idcore.files import check_container, read_safetensors, sniff

KINDS = ("faceid", "faceid-plus", "resampler", "image")
LAYER = re.compile(r"^ip_adapter\.(\d+)\.to_([kv])_ip\.weight$")
LORA = re.compile(r"^ip_adapter\.(\d+)\.to_(q|k|v|out)_lora\.(down|up)\.weight$")


def adapter_kind(keys: Iterable[str]) -> str:
    """Which projector these keys hold, "" where they are no IP-Adapter's.

    "faceid": face embedding through an MLP; "faceid-plus": the MLP, then a perceiver over image tokens (Plus and PlusV2
    have the same keys); "resampler": queries over given vectors (InstantID; IP-Adapter Plus, for images); "image":
    IP-Adapter for whole images.
    """
    keys = set(keys)
    if not any(LAYER.match(k) for k in keys):
        return ""
    if "image_proj.perceiver_resampler.proj_in.weight" in keys:
        return "faceid-plus"
    if {"image_proj.proj.0.weight", "image_proj.proj.2.weight", "image_proj.norm.weight"} <= keys:
        return "faceid"
    if {"image_proj.latents", "image_proj.proj_in.weight"} <= keys:
        return "resampler"
    return "image" if keys & {"image_proj.proj.weight", "image_proj.proj.3.weight"} else ""


def read_adapter(
    path: str | os.PathLike, wanted: str, what: str
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, str]]:
    """Tensors of an adapter file, its LoRA part apart, and the metadata.

    Args:
        path: A safetensors file.
        wanted: The kind (see :func:`adapter_kind`) that the caller reads.
        what: Named in errors.

    Raises:
        WeightsError: the file cannot be read, is a torch pickle, or holds another kind.
    """
    if sniff(path) == "torch pickle":
        raise WeightsError(
            f"{what}: {path} is a torch pickle, which can carry code; it is not opened here. Convert it once: "
            f"`idcore convert {path} --out adapter.safetensors --unpickle`"
        )
    found = adapter_kind(check_container(path, what)[0])
    if found != wanted:
        raise WeightsError(f"{what}: wanted weights of the kind {wanted!r}, {path} holds {_words(found)}")
    tensors, metadata = read_safetensors(path, what=what)
    lora = {k: t for k, t in tensors.items() if LORA.match(k)}
    return {k: t for k, t in tensors.items() if k not in lora}, lora, metadata


def layers_of(tensors: Mapping[str, Tensor]) -> tuple[tuple[int, int], ...]:
    """(index, C) of each layer with keys and values, in order."""
    found = ((LAYER.match(k), t) for k, t in tensors.items())
    return tuple(sorted((int(m[1]), t.shape[0]) for m, t in found if m and m[2] == "k"))


def _words(kind: str) -> str:
    names = {
        "faceid": "an IP-Adapter FaceID (idcore.systems.faceid)",
        "faceid-plus": "an IP-Adapter FaceID Plus or PlusV2 (idcore.systems.faceid)",
        "resampler": "a resampler adapter: InstantID (idcore.systems.instantid), or IP-Adapter Plus",
        "image": "an IP-Adapter for whole images, which is no identity system (diffusers' load_ip_adapter reads it)",
    }
    return names.get(kind, "no IP-Adapter (image_proj.* with ip_adapter.*.to_k_ip.weight)")
