"""Several single-threaded workers on one machine, gradients averaged at every step (gloo).

On a shared CPU this beats one process with as many threads: there is one meeting point per step in place of
one per operator.
"""

from __future__ import annotations

import os
import socket

import torch
import torch.distributed as dist
from torch import Tensor


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def join(rank: int, workers: int, port: int) -> None:
    """Enter the group; every worker calls this once."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=workers)


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def average_gradients(parameters: list[Tensor], workers: int) -> None:
    """Replace every gradient by its mean over the workers. A missing gradient counts as zero."""
    if workers == 1:
        return
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([g.reshape(-1) for g in grads])
    dist.all_reduce(flat)
    flat /= workers
    start = 0
    for p, g in zip(parameters, grads):
        n = g.numel()
        # Copied, so that the gradient keeps its parameter's memory order: fused optimisers rely on that.
        g.copy_(flat[start : start + n].view(g.shape))
        p.grad = g
        start += n
