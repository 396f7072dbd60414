"""LoRA files and LoRA parts of adapters on a pipeline, through peft, beside whatever LoRA is there already."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from idcore.adapter_files import LORA
from idcore.attention.sites import unwrap
from idcore.errors import InputError, MissingDependencyError, WeightsError
from idcore.files import first_few
from idcore.lora_files import COMPONENTS, Lora, read_lora, to_state

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


def kohya_state(tensors: Mapping[str, Tensor], paths: Sequence[str], widths: Sequence[int]) -> dict[str, Tensor]:
    """The same tensors under kohya's names, for hosts with UNets in the original layout.

    Args:
        tensors: with the keys of `idcore.adapter_files`.
        paths: module paths of the UNet's attention layers (`attention.original_unet.attention_paths`).
        widths: channels of each of them.

    Raises:
        InputError: the UNet has fewer layers, or other widths, than the tensors.
    """
    state = {}
    for key, t in tensors.items():
        index, part, side = LORA.match(key).groups()
        n = int(index)
        if n >= len(paths) or (side == "up" and t.shape[0] != widths[n]):
            there = f"{paths[n]} has {widths[n]} channels" if n < len(paths) else f"the UNet has {len(paths)} layers"
            raise InputError(
                f"LoRA part: {key} {list(t.shape)} does not fit this UNet ({there}); use the base model that the "
                "adapter was made for"
            )
        name = f"{paths[n]}.{_PARTS[part]}".replace(".", "_")
        state[f"lora_unet_{name}.lora_{side}.weight"] = t
    return state


def _weight(module: nn.Module) -> Tensor:
    return getattr(module, "base_layer", module).weight


def add_lora(pipe_or_unet: Any, tensors: Mapping[str, Tensor], scale: float, name: str) -> LoraHandle:
    """Put LoRA tensors with the keys of `idcore.adapter_files` on a UNet; see `FaceID.lora`."""
    _require_peft()
    target = unwrap(pipe_or_unet)
    unet = target if isinstance(target, nn.Module) else unwrap(getattr(target, "unet", None))
    if not isinstance(unet, nn.Module) or not hasattr(unet, "attn_processors"):
        raise InputError(f"LoRA part: wanted a pipeline with a unet, or the UNet, got {type(target).__name__}")
    _require_free(name, [unet])
    state = peft_state(tensors, unet)
    with _others_kept([unet], name):
        unet.load_lora_adapter(state, prefix=None, adapter_name=name)
    handle = LoraHandle([unet], name, lambda: unet.delete_adapters(name))
    handle.scale(scale)
    return handle


def load_lora(
    pipe: Any, source: str | os.PathLike | Mapping[str, Tensor] | Lora, *, scale: float = 1.0, name: str = "lora"
) -> LoraHandle:
    """Put a LoRA file on a pipeline's UNet and text encoders; other LoRA that is there stays active.

    Args:
        pipe: diffusers' pipeline of Stable Diffusion 1.5, 2.1 or SDXL, or an `IDPipeline`.
        source: a file or folder in any layout of `idcore.lora_files`, or what `read_lora` gave.
        scale: strength, beside the file's own alpha / rank.
        name: of the adapter in peft.

    Raises:
        InputError: no such pipeline, the name is taken, or a strength that is no finite number.
        WeightsError: see `read_lora`; or the LoRA is of another model.
        MissingDependencyError: peft is not installed.
    """
    _require_peft()
    _finite(scale)
    pipe = getattr(pipe, "pipe", pipe)
    if not hasattr(pipe, "load_lora_weights"):
        raise InputError(f"LoRA: wanted a pipeline of diffusers or an IDPipeline, got {type(pipe).__name__}")
    lora = source if isinstance(source, Lora) else read_lora(source)
    models = {c: getattr(pipe, c, None) for c in COMPONENTS}
    _require_fit(lora, models)
    touched = [m for c, m in models.items() if any(k[0] == c for k in lora.layers)]
    _require_free(name, touched)
    with _others_kept(touched, name), _hushed():
        pipe.load_lora_weights(to_state(lora, "diffusers"), adapter_name=name)
    handle = LoraHandle(touched, name, lambda: pipe.delete_adapters(name))
    handle.scale(scale)
    return handle


def _require_fit(lora: Lora, models: Mapping[str, nn.Module | None]) -> None:
    """Every layer has a module here, of its size; else one error with the first few."""
    wrong = []
    for (component, path), layer in lora.layers.items():
        model = models[component]
        try:
            module = model.get_submodule(path if hasattr(model, "text_model") else path.removeprefix("text_model."))
            weight = tuple(_weight(module).shape)
        except AttributeError:
            wrong.append(f"there is no {component}" if model is None else f"{component} has no layer {path}")
            continue
        made = (layer.up.shape[0], *layer.down.shape[1:])
        if made[:2] != weight[:2]:
            wrong.append(f"{component}.{path} is {list(weight)}, the LoRA's change {list(made)}")
    if wrong:
        raise WeightsError(
            f"LoRA: {len(wrong)} of {len(lora.layers)} layers do not fit this pipeline: {first_few(wrong, 2)}; use the "
            "base model that it was made for (SD 1.5, 2.1 and SDXL differ)"
        )


def _require_peft() -> None:
    try:
        from peft import PeftModel  # noqa: F401
    except ImportError as e:
        raise MissingDependencyError("LoRA needs peft: pip install 'idcore[train]' or pip install peft") from e


def _require_free(name: str, models: Sequence[nn.Module]) -> None:
    if any(name in getattr(m, "peft_config", {}) for m in models):
        raise InputError(f"LoRA: the model has an adapter {name!r} already; remove it, or give another name")


@contextlib.contextmanager
def _others_kept(models: Sequence[nn.Module], name: str) -> Iterator[None]:
    """Loading switches other adapters off and makes all trainable: put both back as they were."""
    before = []
    for m in models:
        active = {path: list(t.active_adapters) for path, t in m.named_modules() if _is_tuner(t)}
        before.append((active, {id(p) for p in m.parameters() if p.requires_grad}))
    yield
    for model, (active, learned) in zip(models, before):
        for path, module in model.named_modules():
            if _is_tuner(module):
                mine = [name] if name in module.lora_A else []
                module.set_adapter([*active.get(path, []), *mine])
        for p in model.parameters():
            p.requires_grad_(id(p) in learned)


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """diffusers says of every text encoder that a file leaves alone that it does."""

    def wanted(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("No LoRA keys associated to")

    logger = logging.getLogger("diffusers.loaders.lora_base")
    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)


def _is_tuner(module: nn.Module) -> bool:
    return hasattr(module, "lora_A") and hasattr(module, "active_adapters")


def _finite(scale: float) -> float:
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise InputError(f"LoRA: scale must be a finite number, got {scale!r}")
    return float(scale)


class LoraHandle:
    """A LoRA on models: change its strength, take it off. Also a context manager that takes it off."""

    def __init__(self, models: Sequence[nn.Module], name: str, delete: Callable[[], None]) -> None:
        self._models, self.name, self._delete = list(models), name, delete

    def __enter__(self) -> LoraHandle:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.remove()

    def scale(self, scale: float) -> None:
        """Set the strength; raises InputError unless it is a finite number."""
        scale = _finite(scale)
        for module in (t for m in self._models for t in m.modules()):
            if _is_tuner(module) and self.name in module.lora_A:
                module.set_scale(self.name, scale)

    def remove(self) -> None:
        """Take it off; the models compute to the bit what they did before. May be called again."""
        if any(self.name in getattr(m, "peft_config", {}) for m in self._models):
            self._delete()
