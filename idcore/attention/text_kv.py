"""Keys and values of the text, projected once per prompt and kept as long as they are true."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .kv_bank import normal_mode

Pair = tuple[Tensor, Tensor]
_KEPT = 2  # prompts per layer: enough for conditional and unconditional passes that run one after the other


class _Entry(NamedTuple):
    text: weakref.ref
    facts: tuple  # equal as long as the same result would come out
    pair: Pair


class TextKeys:
    """What one layer keeps of its last prompts: a denoising loop asks with the very same tensor at every step.

    Nothing is kept where it might be wrong later: while gradients flow into it, while torch.compile traces, for
    modules whose result is not known to follow from their weights alone (hooks, quantised weights, dropout, adapters
    other than peft's LoRA), and for tensors made in inference mode, whose changes cannot be noticed. While a CUDA graph
    is recorded only what was projected during recording is used, so that a replay reads the prompt anew.
    """

    def __init__(self) -> None:
        self._entries: list[_Entry] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __reduce__(self) -> tuple:
        """Copies of a UNet begin with nothing kept."""
        return TextKeys, ()

    def forget(self) -> None:
        """Drop all keys and values."""
        self._entries = []

    def get(self, text: Tensor, modules: tuple[nn.Module, ...], project: Callable[[Tensor], Pair]) -> Pair:
        """`project(text)`, or what it gave before.

        Args:
            text: [B, Lt, E].
            modules: All that `project` asks besides `text`.
            project: Gives keys and values [B, Lt, C].
        """
        if torch.compiler.is_compiling() or type(text) is not Tensor or text.is_inference() or _records(text):
            return project(text)
        weights = tuple(_module_facts(m) for m in modules)
        if None in weights:
            # They may come back as what they were, but for the last bits (LoRA merged and taken out again).
            self.forget()
            return project(text)
        facts = (text._version, *_surroundings(text.device.type), *weights)
        for entry in self._entries:
            if entry.text() is text and entry.facts == facts:
                return entry.pair
        with normal_mode():
            pair = project(text)
        me = weakref.ref(self)
        ref = weakref.ref(text, lambda gone: _drop(me(), gone))
        # Other facts about a tensor never come back: its old keys and values only cost memory.
        others = [e for e in self._entries if e.text() is not None and e.text() is not text]
        self._entries = [*others[-(_KEPT - 1) :], _Entry(ref, facts, pair)]
        return pair


def _drop(keys: TextKeys | None, gone: weakref.ref) -> None:
    """The prompt is gone, so its keys and values go."""
    if keys is not None:
        keys._entries = [e for e in keys._entries if e.text is not gone]


def _surroundings(device: str) -> tuple:
    """What else decides the result: autocast, and whether a CUDA graph is being recorded."""
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return autocast, device == "cuda" and torch.cuda.is_current_stream_capturing()


def _records(t: Tensor) -> bool:
    return t.requires_grad and torch.is_grad_enabled()


def _module_facts(module: nn.Module) -> tuple | None:
    if type(module) is nn.Linear:
        return _linear_facts(module)
    if type(module).__module__ == "peft.tuners.lora.layer" and type(module).__name__ == "Linear":
        return _lora_facts(module)
    return None


def _own(module: nn.Module) -> bool:
    """True where nothing stands between a call and the class's `forward`."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooks and "forward" not in module.__dict__


def _linear_facts(module: nn.Module) -> tuple | None:
    if type(module) is not nn.Linear or not _own(module):
        return None
    facts = []
    for t in (module.weight, module.bias):
        if t is None:
            continue
        if type(t) not in (nn.Parameter, Tensor) or t.is_inference() or _records(t):
            return None
        facts.append((id(t), t._version, t.data_ptr(), t.dtype))
    return tuple(facts)


def _lora_facts(module: Any) -> tuple | None:
    """Of peft's LoRA around a linear layer: its weights, which of them act, and how strongly."""
    active = tuple(module.active_adapters)
    dropped = module.training and any(type(d) is not nn.Identity for d in module.lora_dropout.values())
    # merging changes the base weight behind autograd's back
    if not _own(module) or dropped or module.merged_adapters or getattr(module, "lora_variant", None):
        return None
    parts = [_linear_facts(module.base_layer)]
    for name in active:
        if name in module.lora_A:
            parts += [_linear_facts(module.lora_A[name]), _linear_facts(module.lora_B[name])]
    if None in parts or any(getattr(module, "use_dora", {}).values()):
        return None
    return active, module.disable_adapters, tuple(sorted(module.scaling.items())), tuple(parts)
