"""Weight files: safetensors in and out, the published key layouts, and the one way in for torch pickles.

Three layouts of PuLID's SDXL adapters are read (all hold the same tensors):

- ``pulid``: ``id_adapter.*`` and ``id_adapter_attn_layers.{odd}.id_to_{k,v}.weight`` (v1.1 safetensors);
- ``community``: ``image_proj.*`` and ``ip_adapter.{odd}.to_{k,v}_ip.weight`` (community re-key);
- v1's torch pickle with the keys of ``pulid``: never opened in passing, only by :func:`convert_pickle`.
"""

from __future__ import annotations

import dataclasses
import os
import re
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from idcore.adapter_files import adapter_kind
from idcore.errors import InputError, WeightsError
from idcore.files import (
    check_container,
    fingerprint,
    first_few,
    read_safetensors,
    require_finite,
    require_keys,
    sniff,
    write_safetensors,
)
from idcore.lora_files import layout_of

__all__ = [
    "PULID_LAYOUTS",
    "WeightsInfo",
    "convert",
    "convert_pickle",
    "describe",
    "detect",
    "fingerprint",
    "read_pulid",
    "read_safetensors",
    "require_finite",
    "require_keys",
    "to_layout",
    "write_safetensors",
]

PULID_LAYOUTS = ("pulid", "community")
_SITE = re.compile(r"^id_adapter_attn_layers\.(\d+)\.id_to_([kv])\.weight$")
_SITE_IP = re.compile(r"^ip_adapter\.(\d+)\.to_([kv])_ip\.weight$")
_BLOCK_ROPE = re.compile(r"^visual\.blocks\.\d+\.attn\.rope\.")
_ONE_LAYOUT = ("lora", "ip_adapter", "eva_clip", "bisenet", "retinaface")
_WRAPPERS = ("state_dict", "model", "module", "params_ema", "params")


@dataclass(frozen=True)
class WeightsInfo:
    """What a weights file holds, read from its header alone.

    ``layout`` is "pulid", "community", "pulid_flux", "ip_adapter", "eva_clip", "bisenet", "retinaface",
    "lora", "identity" or "unknown";
    ``version`` is "v1" or "v1.1" for PuLID, the kind of `idcore.adapter_files` for IP-Adapters,
    "kohya", "diffusers" or "peft" for LoRA, else "".
    ``dtypes`` counts tensors per dtype name.
    """

    path: Path
    container: str
    layout: str = "unknown"
    version: str = ""
    tensors: int = 0
    parameters: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    note: str = ""

    def __str__(self) -> str:
        dtypes = ", ".join(f"{n} {d}" for d, n in self.dtypes.items())
        what = " ".join(x for x in (self.layout, self.version) if x)
        line = f"{self.path}: {self.container}, {what}, {self.tensors} tensors ({dtypes}), "
        return line + f"{self.parameters:,} numbers" + (f"; {self.note}" if self.note else "")


def detect(keys: Iterable[str]) -> tuple[str, str]:
    """(layout, version) that these keys speak of; ("unknown", "") where none."""
    keys = set(keys)

    def version(prefix: str) -> str:
        return "v1.1" if f"{prefix}.latents" in keys else "v1" if f"{prefix}.body.0.weight" in keys else ""

    if any(k.startswith("pulid_ca.") for k in keys):
        return "pulid_flux", version("pulid_encoder")
    if any(k.startswith(("id_adapter.", "id_adapter_attn_layers.")) for k in keys):
        return "pulid", version("id_adapter")
    if adapter_kind(keys):
        return "ip_adapter", adapter_kind(keys)
    if layout_of(keys):
        return "lora", layout_of(keys)
    if any(_SITE_IP.match(k) for k in keys):
        return "community", version("image_proj")
    if any(k.endswith("blocks.0.attn.inner_attn_ln.weight") for k in keys):
        return "eva_clip", ""
    if "cp.resnet.conv1.weight" in keys:
        return "bisenet", ""
    if "LandmarkHead.0.conv1x1.weight" in keys:
        return "retinaface", ""
    return "unknown", ""


def describe(path: str | os.PathLike) -> WeightsInfo:
    """Layout, version, counts and dtypes of a weights file, without reading its tensors.

    A torch pickle is named as one and not opened. Raises WeightsError for a file that cannot be read.
    """
    path = Path(path)
    if sniff(path) == "torch pickle":
        return WeightsInfo(path, "torch pickle", note="not opened; convert_pickle(src, dst) makes safetensors of it")
    header, metadata = check_container(path, "weights")
    layout, version = detect(header)
    if metadata.get("format") == "idcore-identity":
        layout = "identity"
    counts = Counter(entry["dtype"] for entry in header.values())
    numbers = sum(torch.Size(entry["shape"]).numel() for entry in header.values())
    return WeightsInfo(path, "safetensors", layout, version, len(header), numbers, dict(counts), metadata)


def convert_pickle(src: str | os.PathLike, dst: str | os.PathLike) -> WeightsInfo:
    """Turn a torch pickle (.bin, .pt, .pth) into safetensors, dtypes unchanged.

    Opened with ``weights_only=True``: only tensors and plain containers, no code from the file runs.
    Nested dictionaries are flattened with dots. Of an EVA-CLIP file only the visual tower is kept, without
    the copies of the rotary tables that each block carries.

    Returns:
        The description of ``dst``; its note says what was left out.

    Raises:
        WeightsError: not a torch pickle, one that holds more than tensors, or ``dst`` cannot be written.
    """
    src = Path(src)
    kind = sniff(src)
    if kind != "torch pickle":
        raise WeightsError(f"convert_pickle wants a torch pickle (.bin, .pt, .pth), {src} is {kind}")
    try:
        loaded = torch.load(src, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises many kinds; each means that the file is not a plain set of tensors
        first = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise WeightsError(
            f"{src} cannot be opened as a plain set of tensors ({first}); no code from it was run. "
            "It is damaged or holds other objects: ask its publisher for safetensors"
        ) from e
    flat, skipped = _flatten(loaded)
    if not flat:
        raise WeightsError(f"{src} holds no tensors by name; wanted a state dict")
    left_out = f"left out {len(skipped)} entries that are no tensors: {first_few(skipped)}" if skipped else ""
    if detect(flat)[0] == "eva_clip":
        kept = {k: t for k, t in flat.items() if k.startswith("visual.") and not _BLOCK_ROPE.match(k)}
        left_out = f"left out {len(flat) - len(kept)} tensors that are not the visual tower"
        flat = kept
    require_finite(flat, f"weights {src}")
    write_safetensors(dst, flat, {"converted_from": src.name, "note": left_out})
    return dataclasses.replace(describe(dst), note=left_out)


def _flatten(loaded: object) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors by dotted name, and the names of entries that are none."""
    while isinstance(loaded, Mapping):
        inner = [k for k in _WRAPPERS if isinstance(loaded.get(k), Mapping)]
        if not inner:
            break
        loaded = loaded[inner[0]]
    flat: dict[str, Tensor] = {}
    skipped: list[str] = []

    def walk(node: object, name: str) -> None:
        if isinstance(node, Tensor):
            flat[name] = node
        elif isinstance(node, Mapping):
            for k, v in node.items():
                walk(v, f"{name}.{k}" if name else str(k))
        else:
            skipped.append(name or type(node).__name__)

    walk(loaded, "")
    if flat and all(k.startswith("module.") for k in flat):
        flat = {k.removeprefix("module."): t for k, t in flat.items()}
    return flat, skipped


def to_layout(key: str, layout: str) -> str:
    """A PuLID key in another layout ("pulid" or "community"); an unknown key comes back as it is."""
    m = _SITE.match(key) or _SITE_IP.match(key)
    if m:
        index, kv = m.groups()
        if layout == "community":
            return f"ip_adapter.{index}.to_{kv}_ip.weight"
        return f"id_adapter_attn_layers.{index}.id_to_{kv}.weight"
    old, new = ("id_adapter.", "image_proj.") if layout == "community" else ("image_proj.", "id_adapter.")
    return new + key.removeprefix(old) if key.startswith(old) else key


def read_pulid(path: str | os.PathLike) -> tuple[dict[str, Tensor], WeightsInfo]:
    """Tensors of a PuLID file in any of its layouts, under the keys of layout "pulid".

    Raises:
        WeightsError: not a PuLID file for SDXL, or one of the failures of :func:`read_safetensors`.
    """
    info = describe(path)
    if info.container == "torch pickle":
        raise WeightsError(
            f"{path} is a torch pickle, which can carry code; it is not opened here. Convert it once: "
            f"idcore.weights.convert_pickle({str(path)!r}, 'pulid.safetensors')"
        )
    if info.layout == "pulid_flux":
        raise WeightsError(f"{path} is a PuLID-FLUX file (pulid_ca.*); wanted the SDXL adapters of v1 or v1.1")
    if info.layout not in PULID_LAYOUTS:
        raise WeightsError(
            f"{path} is no PuLID file (layout {info.layout}, {info.tensors} tensors); wanted "
            "id_adapter.* with id_adapter_attn_layers.*, or image_proj.* with ip_adapter.*"
        )
    tensors, _ = read_safetensors(path, what="PuLID weights")
    out: dict[str, Tensor] = {}
    for key, t in tensors.items():
        new = to_layout(key, "pulid")
        if new in out:
            raise WeightsError(f"{path} mixes two layouts: {key} and another key both stand for {new}")
        out[new] = t
    return out, info


def convert(
    src: str | os.PathLike, dst: str | os.PathLike, *, layout: str = "pulid", unpickle: bool = False
) -> WeightsInfo:
    """Any weights that idcore reads, as safetensors, dtypes unchanged.

    PuLID weights come out in the layout asked for. EVA-CLIP, face parsing, FaceID and InstantID weights have one
    layout only; they need this once, because they are published as torch pickles.

    Args:
        src: Safetensors, or with ``unpickle`` a torch pickle (see :func:`convert_pickle`).
        dst: The safetensors file to write.
        layout: For PuLID: "pulid" or "community".
        unpickle: Allow a torch pickle; nothing of it but tensors is read.

    Raises:
        InputError: another layout.
        WeightsError: as in :func:`read_pulid`, :func:`convert_pickle` and :func:`write_safetensors`.
    """
    if layout not in PULID_LAYOUTS:
        raise InputError(f"convert: layout must be 'pulid' or 'community', got {layout!r}")
    dst = Path(dst)
    if not (unpickle and sniff(src) == "torch pickle"):
        return _write_layout(src, dst, layout)
    between = dst.with_name(f".{dst.name}.{secrets.token_hex(4)}.unpickled")
    try:
        info = convert_pickle(src, between)
        if info.layout not in (*_ONE_LAYOUT, layout):
            return _write_layout(between, dst, layout)
        os.replace(between, dst)
        return dataclasses.replace(info, path=dst)
    finally:
        between.unlink(missing_ok=True)


def _write_layout(src: str | os.PathLike, dst: Path, layout: str) -> WeightsInfo:
    state, info = read_pulid(src)
    write_safetensors(dst, {to_layout(k, layout): t for k, t in state.items()}, info.metadata)
    return describe(dst)
