"""Optimisers, the course of the learning rate, and the averaged weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..errors import MissingDependencyError
from .config import LoopConfig


def learning_rate(step: int, c: LoopConfig) -> float:
    """Linear warm-up, `lr`, then the fall of the schedule over the last `decay` of the steps, not below `lr_end` lr."""
    start = c.steps * (1 - c.decay)
    left = min(1.0, (c.steps - step) / max(1.0, c.steps - start))
    fall = {
        "constant": 1.0,
        "linear": max(c.lr_end, left),
        "cosine": c.lr_end + (1 - c.lr_end) * 0.5 * (1 - math.cos(math.pi * left)),
    }[c.schedule]
    return c.lr * min(1.0, (step + 1) / max(1, c.warmup)) * fall


def make_optimiser(parameters: list[nn.Parameter], c: LoopConfig) -> torch.optim.Optimizer:
    """The optimiser that the settings name, over parameters of one device."""
    kind = optimiser_class(c)
    if c.optimiser == "sgd":
        return kind(parameters, c.lr, momentum=c.betas[0], weight_decay=c.weight_decay)
    more = {"fused": True} if c.optimiser == "adamw" else {}
    return kind(parameters, lr=c.lr, betas=c.betas, eps=c.eps, weight_decay=c.weight_decay, **more)


def optimiser_class(c: LoopConfig) -> type[torch.optim.Optimizer]:
    """Raises MissingDependencyError where the settings name one that is not installed."""
    return {"sgd": lambda: torch.optim.SGD, "adamw": lambda: torch.optim.AdamW, "adamw8bit": _adamw8bit}[c.optimiser]()


def _adamw8bit() -> type[torch.optim.Optimizer]:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        try:
            from torchao.optim import AdamW8bit
        except ImportError as e:
            raise MissingDependencyError(
                "optimiser adamw8bit needs bitsandbytes or torchao, and neither is installed: "
                "pip install bitsandbytes (CUDA) or pip install torchao; or set optimiser=adamw"
            ) from e
    return AdamW8bit


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    for group in optimiser.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao keeps it so
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


class Average:
    """An exponential moving average of a module's parameters, in shards where the parameters are.

    The decay grows as (1 + step) / (10 + step) up to `decay`, so that early weights do not linger (our choice).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = list(module.parameters())
        self.values = [local(p).clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimiser step `step`, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [local(p) for p in self.parameters], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the module's weights and the average; again to go back."""
        for mine, parameter in zip(self.values, self.parameters):
            weights = local(parameter)
            kept = weights.clone()
            weights.copy_(mine)
            mine.copy_(kept)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, without its history."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
