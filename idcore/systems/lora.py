"""LoRA parts of adapter files on a UNet, through peft, beside whatever LoRA is there already."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from idcore.adapter_files import LORA
from idcore.attention.sites import unwrap
from idcore.errors import InputError, MissingDependencyError

_PARTS = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}


def peft_state(tensors: Mapping[str, Tensor], unet: nn.Module) -> dict[str, Tensor]:
    """`ip_adapter.{index}.to_q_lora.down.weight` and so on under the names that peft knows.

    Raises:
        InputError: the UNet has other attention layers, or other widths, than the tensors.
    """
    names = [name.removesuffix(".processor") for name in unet.attn_processors]
    state, wrong = {}, []
    for key, t in tensors.items():
        index, part, side = LORA.match(key).groups()
        if int(index) >= len(names):
            wrong.append(f"{key} (the UNet has {len(names)} attention layers)")
            continue
        layer = f"{names[int(index)]}.{_PARTS[part]}"
        weight = _weight(unet.get_submodule(layer))
        axis = 1 if side == "down" else 0
        if t.ndim != 2 or t.shape[axis] != weight.shape[axis]:
            wrong.append(f"{key} {list(t.shape)} for {layer} {list(weight.shape)}")
        state[f"{layer}.lora_{'A' if side == 'down' else 'B'}.weight"] = t.to(weight.dtype)
    if wrong:
        raise InputError(
            f"LoRA part: {len(wrong)} of {len(tensors)} tensors do not fit this UNet: {wrong[0]}; use the base model "
            "that the adapter was made for"
        )
    return state


def _weight(module: nn.Module) -> Tensor:
    return getattr(module, "base_layer", module).weight


def add_lora(pipe_or_unet: Any, tensors: Mapping[str, Tensor], scale: float, name: str) -> LoraHandle:
    """Put LoRA tensors with the keys of `idcore.adapter_files` on a UNet; see `FaceID.lora`."""
    try:
        from peft import PeftModel  # noqa: F401
    except ImportError as e:
        raise MissingDependencyError("the LoRA part needs peft: pip install 'idcore[train]' or pip install peft") from e
    target = unwrap(pipe_or_unet)
    unet = target if isinstance(target, nn.Module) else unwrap(getattr(target, "unet", None))
    if not isinstance(unet, nn.Module) or not hasattr(unet, "attn_processors"):
        raise InputError(f"LoRA part: wanted a pipeline with a unet, or the UNet, got {type(target).__name__}")
    if name in getattr(unet, "peft_config", {}):
        raise InputError(f"LoRA part: the UNet has an adapter {name!r} already; remove it, or give another name")
    state = peft_state(tensors, unet)
    active = {n: list(m.active_adapters) for n, m in unet.named_modules() if _is_tuner(m)}
    learned = {id(p) for p in unet.parameters() if p.requires_grad}
    unet.load_lora_adapter(state, prefix=None, adapter_name=name)
    for path, module in unet.named_modules():
        if _is_tuner(module):  # loading switches the other adapters off
            mine = [name] if name in module.lora_A else []
            module.set_adapter([*active.get(path, []), *mine])
    for p in unet.parameters():  # set_adapter makes adapters trainable
        p.requires_grad_(id(p) in learned)
    handle = LoraHandle(unet, name)
    handle.scale(scale)
    return handle


def _is_tuner(module: nn.Module) -> bool:
    return hasattr(module, "lora_A") and hasattr(module, "active_adapters")


class LoraHandle:
    """A LoRA on a UNet: change its strength, take it off. Also a context manager that takes it off."""

    def __init__(self, unet: nn.Module, name: str) -> None:
        self._unet, self.name = unet, name

    def __enter__(self) -> LoraHandle:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.remove()

    def scale(self, scale: float) -> None:
        """Set the strength; raises InputError unless it is a finite number."""
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise InputError(f"LoRA: scale must be a finite number, got {scale!r}")
        for module in self._unet.modules():
            if _is_tuner(module) and self.name in module.lora_A:
                module.set_scale(self.name, float(scale))

    def remove(self) -> None:
        """Take it off; the UNet computes to the bit what it did before. May be called again."""
        if self.name in getattr(self._unet, "peft_config", {}):
            self._unet.delete_adapters(self.name)
