"""One module trained by several processes: whole copies (DDP), or weights, gradients and optimiser in shards (FSDP).

Only what is trained is wrapped; frozen models stay whole in every process, and may differ between them.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import InputError
from .config import LoopConfig
from .processes import everyone, grouped, of_all


class Computation(nn.Module):
    """What is wrapped: its forward runs any function that uses `trained`'s weights.

    DDP and FSDP act when the wrapped module is called; a task calls parts of its module in its own order.
    """

    def __init__(self, trained: nn.Module) -> None:
        super().__init__()
        self.trained = trained

    def forward(self, compute: Any) -> Any:
        return compute()


def wrap(module: nn.Module, accelerator: Any, c: LoopConfig, uses_all: bool = False) -> nn.Module:
    """A `Computation` of the module on the accelerator's device, with process 0's weights everywhere.

    Args:
        uses_all: each loss depends on every parameter, so that DDP need not look for those that are left out.
    """
    computation = Computation(module).to(accelerator.device)
    if not grouped():
        return accelerator.prepare_model(computation)
    _require_same(module)
    with torch.no_grad():
        for tensor in computation.state_dict().values():
            dist.broadcast(tensor, src=0)
    if c.parallel == "ddp":
        return _copy(computation, accelerator.device, uses_all)
    return _shard(computation, accelerator.device)


def _copy(computation: Computation, device: torch.device, uses_all: bool) -> nn.Module:
    """No buffers are exchanged; accelerate does not know the name that newer versions of PyTorch have for it."""
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(
        computation, device_ids=[device] if device.type == "cuda" else None, find_unused_parameters=not uses_all,
        **{buffers: False},
    )  # fmt: skip


def _require_same(module: nn.Module) -> None:
    """Raise InputError where processes would train modules of different names or sizes: their bases may differ, but not
    in what the adapter follows from."""
    sizes = everyone({k: list(v.shape) for k, v in module.state_dict().items()})
    for rank, theirs in enumerate(sizes):
        differ = sorted(k for k in {*theirs, *sizes[0]} if theirs.get(k) != sizes[0].get(k))
        if differ:
            k = differ[0]
            raise of_all(InputError(
                f"process {rank} would train another module than process 0: {k} is {theirs.get(k, 'not there')} and "
                f"{sizes[0].get(k, 'not there')}, {len(differ)} such; bases of different processes must have the same "
                "attention layers"
            ))  # fmt: skip


def _shard(computation: Computation, device: torch.device) -> nn.Module:
    """One unit: gathered when the losses begin, sharded again after the backward pass; between steps only shards."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for name, parameter in computation.trained.named_parameters():
        if parameter.ndim == 0:
            raise InputError(f"parallel fsdp cannot shard {name}: it is a single number; use parallel ddp")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    return fully_shard(computation, mesh=mesh, reshard_after_forward=False)


def sharded(computation: nn.Module) -> bool:
    return hasattr(computation, "unshard")


@contextlib.contextmanager
def exchanging(computation: nn.Module, now: bool) -> Iterator[None]:
    """Around a forward and its backward pass: whether gradients are exchanged, or only added up (`now` False)."""
    if sharded(computation):
        computation.set_requires_gradient_sync(now)
        yield
    elif isinstance(computation, DistributedDataParallel) and not now:
        with computation.no_sync():
            yield
    else:
        yield


@contextlib.contextmanager
def gathered(computation: nn.Module) -> Iterator[None]:
    """While open, the module holds whole weights of its own in every process, state dict included (FSDP's own form of
    whole weights shows shards there); all of them enter together. Nothing may be trained meanwhile."""
    if not sharded(computation):
        yield
        return
    computation.reshard()
    shards = [
        (part, name, parameter)
        for part in computation.trained.modules()
        for name, parameter in part.named_parameters(recurse=False)
    ]
    try:
        with torch.no_grad():
            for part, name, parameter in shards:
                whole = parameter.full_tensor().clone()
                setattr(part, name, nn.Parameter(whole, requires_grad=parameter.requires_grad))
        yield
    finally:
        for part, name, parameter in shards:
            setattr(part, name, parameter)


@torch.no_grad()
def unwrap(computation: nn.Module) -> None:
    """Leave the module with whole weights of its own, as it came."""
    if not sharded(computation):
        return
    for part in computation.trained.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            whole = parameter.full_tensor().clone()
            setattr(part, name, nn.Parameter(whole, requires_grad=parameter.requires_grad))
