"""Which weights of a base model a personal training changes: LoRA through peft, or the whole UNet; text encoders too.

The losses, the data and the loop are others' matter: DreamBooth and StyleForge train through this.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import InputError, MissingDependencyError
from ..lora_files import Layer, Lora
from .bases.latent import LatentBase
from .contract import Text
from .settings import setting

ADAPTER = "idcore_tuning"  # name of the adapter in peft while it trains

# Ends of module paths. "attention" is what DreamBooth's LoRA trainings change; "all" reaches texture best.
_ATTENTION = (r"attn\d\.to_[qkv]", r"attn\d\.to_out\.0")
_LAYERS = {
    "cross": (r"attn2\.to_[qkv]", r"attn2\.to_out\.0"),
    "attention": _ATTENTION,
    "all": (
        *_ATTENTION, r"ff\.net\.0\.proj", r"ff\.net\.2", r"proj_in", r"proj_out", r"conv1", r"conv2", r"conv_shortcut",
        r"time_emb_proj",
    ),
}  # fmt: skip
_TEXT_LAYERS = (r"self_attn\.[qkv]_proj", r"self_attn\.out_proj")


@dataclass(frozen=True)
class TuneSettings:
    """What of the base trains."""

    weights: Literal["lora", "full"] = setting("lora", "LoRA beside the weights, or the whole UNet")
    rank: int = setting(16, "Of the LoRA", low=1)
    alpha: float | None = setting(None, "Of the LoRA, whose change counts alpha / rank; null: the rank", above=0)
    layers: Literal["cross", "attention", "all"] = setting(
        "attention", "With LoRA: cross-attention, all attention, or feed-forward layers and convolutions too"
    )
    text_encoder: bool = setting(False, "The text encoders train, too (in the same way)")


class Tuned:
    """Weights of a base that train. Also a context manager that takes a LoRA off again.

    Args:
        base: frozen; what trains wants gradients from here on.
        settings: what trains.
        seed: of a LoRA's first weights.

    Attributes:
        module: all that trains, for `contract.Task.module`. Its layers are the base's own; with LoRA its state dict has
            the keys of diffusers' LoRA files, else `unet.` and `text_encoder.` lead those of the models.

    Raises:
        InputError: full weights in another dtype than float32 (train with autocast instead), or a base with a LoRA on
            it.
        MissingDependencyError: LoRA without peft.
    """

    def __init__(self, base: LatentBase, settings: TuneSettings, seed: int = 0) -> None:
        self.base, self.settings = base, settings
        names = ["unet", *(["text_encoder", "text_encoder_2"] if settings.text_encoder else [])]
        found = {n: getattr(base.pipe, n, None) for n in names}
        self.models: dict[str, nn.Module] = {n: m for n, m in found.items() if m is not None}
        if settings.weights == "lora":
            self.module: nn.Module = self._add_lora(seed)
        else:
            self.module = self._all_of_it()

    def __enter__(self) -> Tuned:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.remove()

    @property
    def alpha(self) -> float:
        return float(self.settings.rank if self.settings.alpha is None else self.settings.alpha)

    def text(self, prompts: Sequence[str], height: int, width: int, sizes: Tensor | None = None) -> Text:
        """As `LatentBase.text`: encoded once where the text encoders are frozen, anew where they train."""
        encode = self.base.text_live if self.settings.text_encoder else self.base.text
        return encode(prompts, height, width, sizes)

    def remove(self) -> None:
        """Take a LoRA off: the base is as it was. Whole weights stay as they were trained, only frozen."""
        for model in self.models.values():
            for path, layer in list(model.named_modules()):
                if ADAPTER in getattr(layer, "lora_A", {}):
                    parent, _, name = path.rpartition(".")
                    setattr(model.get_submodule(parent), name, layer.base_layer)
            if ADAPTER in getattr(model, "peft_config", {}):
                del model.peft_config
                model._hf_peft_config_loaded = False
            model.requires_grad_(False).eval()

    # -- LoRA ---------------------------------------------------------------------------------------------

    def _add_lora(self, seed: int) -> nn.Module:
        try:
            from peft import LoraConfig
        except ImportError as e:
            raise MissingDependencyError("LoRA needs peft: pip install 'idcore[train]' or pip install peft") from e
        root = nn.Module()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name, model in self.models.items():
                if other := list(getattr(model, "peft_config", {})):
                    raise InputError(f"tuning: the {name} has the LoRA {other[0]!r} on it; take that off first")
                _without_husks(model)
                chosen = list(self._chosen(name, model))
                config = LoraConfig(r=self.settings.rank, lora_alpha=self.alpha, target_modules=chosen)
                model.add_adapter(config, ADAPTER)
                model.requires_grad_(False)
                for path in chosen:
                    layer = model.get_submodule(path)
                    for half in ("lora_A", "lora_B"):
                        part = getattr(layer, half)[ADAPTER].float().requires_grad_(True)
                        _put(root, f"{name}.{_published(model, path)}.{half}", part)
        return root

    def _chosen(self, name: str, model: nn.Module) -> Iterator[str]:
        ends = _LAYERS[self.settings.layers] if name == "unet" else _TEXT_LAYERS
        pattern = re.compile(rf"(^|.*\.)({'|'.join(ends)})$")
        for path, module in model.named_modules():
            plain = getattr(module, "base_layer", module)  # of what a LoRA left that was taken off
            if isinstance(plain, (nn.Linear, nn.Conv2d)) and pattern.match(path):
                yield path

    def lora(self) -> Lora:
        """The LoRA as it is now, on the CPU in float32; InputError where whole weights train."""
        if self.settings.weights != "lora":
            raise InputError("tuning: whole weights train here, there is no LoRA to save")
        layers: dict[tuple[str, str], dict[str, Tensor]] = {}
        for key, value in self.module.state_dict().items():
            path, half = key.removesuffix(".weight").rsplit(".", 1)
            component, _, rest = path.partition(".")
            layers.setdefault((component, rest), {})[half] = value.detach().float().cpu().clone()
        return Lora({k: Layer(p["lora_A"], p["lora_B"], self.alpha) for k, p in layers.items()}, "diffusers")

    # -- whole weights ------------------------------------------------------------------------------------

    def _all_of_it(self) -> nn.Module:
        for name, model in self.models.items():
            if (dtype := next(model.parameters()).dtype) != torch.float32:
                raise InputError(
                    f"tuning: the whole {name} trains in float32, it is {dtype}; set model.dtype=float32 and, for "
                    "speed, loop.precision=bf16"
                )
            model.requires_grad_(True)
        return nn.ModuleDict(self.models)

    def save_pipeline(self, folder: Path) -> Path:
        """The whole pipeline with the weights as they are now, in diffusers' layout."""
        self.base.pipe.save_pretrained(folder, safe_serialization=True)
        return folder


def _without_husks(model: nn.Module) -> None:
    """Give layers back their place where peft left wrappers behind after their last LoRA was deleted."""
    for path, layer in list(model.named_modules()):
        if hasattr(layer, "base_layer") and not len(getattr(layer, "lora_A", ())):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, layer.base_layer)


def _published(model: nn.Module, path: str) -> str:
    """The module's path as LoRA files have it; newer text encoders lack the outermost `text_model`."""
    flat = not hasattr(model, "text_model") and path.startswith("encoder.")
    return f"text_model.{path}" if flat else path


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    """Register a module under a path with dots; the modules on the way are made."""
    *way, last = path.split(".")
    for name in way:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root._modules[name]
    root.add_module(last, module)
