"""LoRA files of Stable Diffusion 1.5, 2.1 and SDXL: kohya's, diffusers' and peft's layout, read and written.

| layout | keys | strength |
|---|---|---|
| kohya | `lora_unet_..._to_q.lora_down.weight`, `.lora_up.weight`, `.alpha` | alpha / rank |
| diffusers | `unet....to_q.lora_A.weight`, `.lora_B.weight`; older `.lora.down`, `to_q_lora.down` | metadata, else 1 |
| peft | a folder: `adapter_model.safetensors` with `base_model.model....lora_A.weight` | its `adapter_config.json` |

Written to diffusers and peft the strength is folded into the upper matrix, so that every reader draws the same.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .errors import InputError, WeightsError
from .files import read_safetensors, write_safetensors
from .lora_names import KOHYA, from_kohya, to_kohya

LAYOUTS = ("kohya", "diffusers", "peft")
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
PEFT_FILE, DIFFUSERS_FILE = "adapter_model.safetensors", "pytorch_lora_weights.safetensors"
PEFT_HEAD = "base_model.model."
FAMILIES = {"sd15": 768, "sd21": 1024, "sdxl": 2048}  # width of the text that cross-attention reads
_KOHYA_KEY = re.compile(r"^(lora_[^.]+)\.(lora_down|lora_up)\.weight$|^(lora_[^.]+)\.(alpha)$")
_PEFT_KEY = re.compile(r"^(.+?)\.(?:lora_([AB])(?:\.default)?|lora(?:_linear_layer)?\.(down|up))\.weight$")
_OLD_KEY = re.compile(r"^(.+?)(?:\.processor)?\.(to_[qkv]|to_out)_lora\.(down|up)\.weight$")
_REFUSED = {
    "dora_scale": "DoRA (a learned length of each weight's columns)",
    "lora_magnitude_vector": "DoRA (a learned length of each weight's columns)",
    "hada_w1_a": "LoHa (a product of two low-rank matrices)",
    "lokr_w1": "LoKr (a Kronecker product)",
    "oft_": "OFT (a rotation)",
    "lora_mid": "LoCon with a middle tensor (Tucker form)",
    "lora_embedding_": "a LoRA of embeddings",
    "diff_b": "full differences of biases",
}


@dataclass(frozen=True)
class Layer:
    """down [r, in(, k, k)], up [out, r(, 1, 1)]: the weight changes by alpha / r * up @ down."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def strength(self) -> float:
        return self.alpha / self.rank

    def folded(self) -> Layer:
        """The same change with alpha equal to the rank."""
        if self.strength == 1:
            return self
        return Layer(self.down, (self.up.float() * self.strength).to(self.up.dtype), float(self.rank))


@dataclass
class Lora:
    """Layers by (component, module path of diffusers), and the file's metadata."""

    layers: dict[tuple[str, str], Layer]
    layout: str = ""
    metadata: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        counts = {c: sum(k[0] == c for k in self.layers) for c in COMPONENTS}
        ranks = sorted({layer.rank for layer in self.layers.values()})
        parts = ", ".join(f"{c} {n}" for c, n in counts.items() if n)
        return f"LoRA ({self.layout}): {len(self.layers)} layers ({parts}), rank {', '.join(map(str, ranks))}"

    def family(self) -> str:
        """ "sd15", "sd21" or "sdxl" by the width of the text that it reads, else by a second text encoder; "" where it
        cannot be told."""
        for (component, path), layer in self.layers.items():
            if component == "unet" and path.endswith(("attn2.to_k", "attn2.to_v")):
                return next((f for f, width in FAMILIES.items() if layer.down.shape[1] == width), "")
        return "sdxl" if any(c == "text_encoder_2" for c, _ in self.layers) else ""


def layout_of(keys: Iterable[str]) -> str:
    """ "kohya", "diffusers", "peft", or "" where these keys are no LoRA's."""
    keys = list(keys)
    if any(k.startswith(tuple(f"{h}_" for h in KOHYA)) for k in keys):
        return "kohya"
    if any(k.startswith(PEFT_HEAD) and ".lora_" in k for k in keys):
        return "peft"
    with_component = any(k.startswith(tuple(f"{c}." for c in COMPONENTS)) and "lora" in k for k in keys)
    return "diffusers" if with_component else ""


def read_lora(source: str | os.PathLike | Mapping[str, Tensor], what: str = "LoRA") -> Lora:
    """A LoRA from a safetensors file, a folder of peft, or tensors by key.

    Raises:
        WeightsError: no such file, no LoRA, a kind that is not one product of two matrices (DoRA, LoHa, LoKr, ...),
            half a layer, ranks that do not agree, or a layer that no Stable Diffusion has.
    """
    if isinstance(source, Mapping):
        return _parse(dict(source), {}, {}, what)
    path = Path(source)
    if path.is_dir():
        several = [path / c for c in COMPONENTS if (path / c / PEFT_FILE).is_file()]
        if several:
            parts = [read_lora(p, what) for p in several]
            return Lora({k: v for p in parts for k, v in p.layers.items()}, "peft")
        path = next((path / n for n in (PEFT_FILE, DIFFUSERS_FILE) if (path / n).is_file()), path / PEFT_FILE)
    tensors, metadata = read_safetensors(path, what=what)
    config = _peft_config(path.parent, tensors)
    if config and path.parent.name in COMPONENTS:  # as written here; peft's own folders do not say it
        name = path.parent.name
        tensors = {f"{name}.{k.removeprefix(PEFT_HEAD)}": t for k, t in tensors.items()}
        lora = _parse(tensors, metadata, {name: config}, f"{what} {path}")
        return Lora(lora.layers, "peft", metadata)
    return _parse(tensors, metadata, {c: config for c in COMPONENTS} if config else {}, f"{what} {path}")


def _peft_config(folder: Path, tensors: Mapping[str, Tensor]) -> dict:
    path = folder / "adapter_config.json"
    if layout_of(tensors) != "peft":
        return {}
    if not path.is_file():
        raise WeightsError(
            f"LoRA: {folder} has peft's weights and no adapter_config.json, which says how strong they are"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise WeightsError(f"LoRA: {path} is not JSON ({e})") from e


def _parse(tensors: dict[str, Tensor], metadata: dict[str, str], configs: dict[str, dict], what: str) -> Lora:
    layout = layout_of(tensors)
    if not layout:
        first = next(iter(tensors), "nothing")
        raise WeightsError(f"{what} is no LoRA of kohya, diffusers or peft: its first key is {first!r}")
    for key in tensors:
        for mark, name in _REFUSED.items():
            if mark in key:
                raise WeightsError(
                    f"{what}: {key} makes it {name}; only plain LoRA is read, merge it into a model instead"
                )
    configs = configs or _metadata_configs(metadata)
    if dora := [c for c, v in configs.items() if v.get("use_dora")]:
        raise WeightsError(f"{what}: its configuration of the {dora[0]} says use_dora; only plain LoRA is read")
    parts: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, t in tensors.items():
        name, side = _split(key, layout, what)
        parts.setdefault(name, {})[side] = t
    return Lora({k: _layer(k, p, configs.get(k[0], {}), what) for k, p in parts.items()}, layout, metadata)


def _metadata_configs(metadata: Mapping[str, str]) -> dict[str, dict]:
    """diffusers' `lora_adapter_metadata`: peft configurations, keys led by the component."""
    try:
        flat = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError as e:
        raise WeightsError(f"LoRA: the metadata lora_adapter_metadata is not JSON ({e})") from e
    return {c: {k.removeprefix(f"{c}."): v for k, v in flat.items() if k.startswith(f"{c}.")} for c in COMPONENTS}


def _split(key: str, layout: str, what: str) -> tuple[tuple[str, str], str]:
    """((component, path), "down", "up" or "alpha")."""
    if layout == "kohya":
        if m := _KOHYA_KEY.match(key):
            return from_kohya(m[1] or m[3]), (m[2] or m[4]).removeprefix("lora_")
    elif m := _OLD_KEY.match(key):
        return _component(f"{m[1]}.{_renamed(m[1], m[2])}"), m[3]
    elif m := _PEFT_KEY.match(key):
        return _component(m[1]), m[3] or {"A": "down", "B": "up"}[m[2]]
    elif key.endswith(".alpha"):
        return _component(key.removesuffix(".alpha")), "alpha"
    raise WeightsError(f"{what}: {key!r} is no part of a LoRA layer ({layout})")


def _renamed(parent: str, name: str) -> str:
    """Old names of processors: of text encoders, too."""
    if "self_attn" in parent:
        return {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}[name]
    return "to_out.0" if name == "to_out" else name


def _component(path: str) -> tuple[str, str]:
    if path.startswith(PEFT_HEAD):
        path = path.removeprefix(PEFT_HEAD)
        return ("text_encoder" if "self_attn" in path or ".mlp." in path else "unet"), path
    component, _, rest = path.partition(".")
    if component not in COMPONENTS:
        raise WeightsError(f"LoRA layer {path!r} is of none of {', '.join(COMPONENTS)}")
    return component, rest


def _layer(name: tuple[str, str], part: dict[str, Tensor], config: dict, what: str) -> Layer:
    said = ".".join(name)
    if not {"down", "up"} <= part.keys():
        missing = "down" if "down" not in part else "up"
        raise WeightsError(f"{what}: layer {said} has no {missing} matrix; the file is damaged or not whole")
    down, up = part["down"], part["up"]
    if down.ndim not in (2, 4) or up.ndim != down.ndim or down.shape[0] != up.shape[1]:
        shapes = f"{list(down.shape)} and {list(up.shape)}"
        raise WeightsError(
            f"{what}: layer {said} has shapes {shapes}; wanted [r, in, ...] and [out, r, ...] of one rank"
        )
    rank = down.shape[0]
    alpha = float(part["alpha"]) if "alpha" in part else _configured(config, name[1], rank)
    return Layer(down, up, alpha)


def _configured(config: Mapping, path: str, rank: int) -> float:
    """Alpha of peft's configuration (patterns end a module's path); the rank where nothing is said."""
    if "lora_alpha" not in config:
        return float(rank)
    fits = [v for k, v in (config.get("alpha_pattern") or {}).items() if re.match(rf"(.*\.)?({k})$", path)]
    alpha = float(fits[0] if fits else config["lora_alpha"])
    return alpha * rank**0.5 if config.get("use_rslora") else alpha


def to_state(lora: Lora, layout: str, *, family: str = "") -> dict[str, Tensor]:
    """Tensors by key in layout "kohya" or "diffusers".

    Args:
        family: "sd15", "sd21" or "sdxl", for kohya's names; needed where the LoRA itself does not tell (no keys and
            values of the UNet's cross-attention).

    Raises InputError for an unknown layout or family, or where the family cannot be told.
    """
    if layout not in ("kohya", "diffusers"):
        raise InputError(f'LoRA: layout must be "kohya" or "diffusers", got {layout!r}')
    if layout == "diffusers":
        out = {}
        for (component, path), layer in lora.layers.items():
            layer = layer.folded()
            out[f"{component}.{path}.lora_A.weight"], out[f"{component}.{path}.lora_B.weight"] = layer.down, layer.up
        return out
    family = family or lora.family()
    if family not in FAMILIES:
        raise InputError(
            f"LoRA: kohya's names differ between models and this LoRA does not tell its own (got family {family!r}); "
            f"give family, one of {', '.join(FAMILIES)}"
        )
    out = {}
    for (component, path), layer in lora.layers.items():
        name = to_kohya(component, path, sdxl=family == "sdxl")
        out[f"{name}.lora_down.weight"], out[f"{name}.lora_up.weight"] = layer.down, layer.up
        out[f"{name}.alpha"] = torch.tensor(layer.alpha, dtype=torch.float32)
    return out


def write_lora(
    lora: Lora, out: str | os.PathLike, layout: str, *, family: str = "", metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a LoRA as one safetensors file, or for "peft" a folder with one of peft's folders per component.

    `metadata` is written into the file beside what the layout wants (not for "peft").

    Raises InputError as `to_state`, WeightsError where it cannot be written.
    """
    out = Path(out)
    if layout == "peft":
        return _write_peft(lora, out)
    metadata = {**(metadata or {}), "format": "pt"}
    if layout == "kohya":
        ranks = {layer.rank for layer in lora.layers.values()}
        rank = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
        metadata |= {"ss_network_module": "networks.lora", "ss_network_dim": rank}
    return write_safetensors(out, to_state(lora, layout, family=family), metadata)


def _write_peft(lora: Lora, out: Path) -> Path:
    for component in COMPONENTS:
        layers = {path: layer.folded() for (c, path), layer in lora.layers.items() if c == component}
        if not layers:
            continue
        ranks = {path: layer.rank for path, layer in layers.items()}
        most = max(set(ranks.values()), key=list(ranks.values()).count)
        others = {path: r for path, r in ranks.items() if r != most}
        config = {
            "peft_type": "LORA", "r": most, "lora_alpha": most, "rank_pattern": others, "alpha_pattern": others,
            "target_modules": sorted(layers), "bias": "none", "lora_dropout": 0.0, "use_dora": False,
            "use_rslora": False,
        }  # fmt: skip
        folder = out / component
        folder.mkdir(parents=True, exist_ok=True)
        state = {f"{PEFT_HEAD}{p}.lora_A.weight": layer.down for p, layer in layers.items()}
        state |= {f"{PEFT_HEAD}{p}.lora_B.weight": layer.up for p, layer in layers.items()}
        write_safetensors(folder / PEFT_FILE, state, {"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
    return out
