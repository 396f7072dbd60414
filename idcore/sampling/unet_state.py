"""What a recorded loop takes for granted about its models: modules, weights, adapters, processors and hooks."""

from __future__ import annotations

import operator
from itertools import chain
from typing import Any

from torch import Tensor, nn

_DICTS = ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")
_ADAPTERS = ("scaling", "_active_adapter", "_disable_adapters", "merged_adapters")  # of peft's layers


class ModelState:
    """The state of some models when this was made. Looking whether it still holds takes about a millisecond for SDXL.

    Its objects are kept, so that none of them can be mistaken for a new one at its address. Weights that are changed
    through `.data` and stay where they are, are not seen.
    """

    def __init__(self, *models: nn.Module) -> None:
        self._modules = [m for model in models for m in model.modules()]
        self._dicts = [m.__dict__[name] for m in self._modules for name in _DICTS]
        self._objects = self._flat()
        self._tensors = [t for t in self._objects if isinstance(t, Tensor)]
        plain = (Tensor, nn.Parameter)  # others (8 bit) may have no memory of their own
        self._placed = [t for t in self._tensors if type(t) in plain]
        self._versioned = [t for t in self._tensors if not t.is_inference()]
        self._attention = [m for m in self._modules if "processor" in m.__dict__]
        self._adapted = [m for m in self._modules if "scaling" in m.__dict__]
        self._processors, self._numbers = self._now()

    def holds(self) -> bool:
        """Whether the same calls would run on the same memory, to which nobody wrote in between."""
        objects = self._flat()
        if len(objects) != len(self._objects) or not all(map(operator.is_, objects, self._objects)):
            return False
        processors, numbers = self._now()
        return numbers == self._numbers and all(map(operator.is_, processors, self._processors))

    def _flat(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self._dicts)))

    def _now(self) -> tuple[list[Any], list[Any]]:
        numbers = [
            [m.training for m in self._modules],
            [t.data_ptr() for t in self._placed],
            [t._version for t in self._versioned],
            [repr([m.__dict__.get(name) for name in _ADAPTERS]) for m in self._adapted],
        ]
        return [m.processor for m in self._attention], numbers
