"""What the trainings of the shipped small models do alike: people to draw, processes, weights to start from."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import WeightsError
from .. import checkpoint, state
from ..processes import spawn
from ..resuming import CHECKPOINTS, RESULT
from .pool import make_pool


def run_on_people(
    work: Callable[..., Path], config: Any, out: str | Path, resume: bool, allow_change: Sequence[str]
) -> Path:
    """Draw the people that are missing, then call `work(config, out, pool, resume, allow_change)` in each process.

    Args:
        work: a function of a module's top level: other processes import it.
        config: with `pool`, `shards`, `workers` and `loop`.
    """
    out = Path(out)
    if not resume:
        checkpoint.require_none(out / CHECKPOINTS)  # before people are drawn
    pool = Path(config.pool) if config.pool else out / "pool"
    if config.shards:
        make_pool(pool, config.shards, workers=config.workers)
    if config.workers == 1:
        return work(config, out, pool, resume, allow_change)
    spawn(work, config.workers, config, out, pool, resume, allow_change)
    done = checkpoint.newest(out / CHECKPOINTS)
    return out / RESULT if done.step == config.loop.steps else done.folder


def use_threads(count: int) -> None:
    """CPU threads of this process."""
    os.environ["OMP_NUM_THREADS"] = str(count)  # or accelerate sets another number of threads
    torch.set_num_threads(count)


def start_from(module: nn.Module, folder: str | Path) -> None:
    """The averaged weights of another training's newest checkpoint.

    Raises:
        WeightsError: there is none, or it does not fit.
    """
    found = checkpoint.newest(Path(folder) / CHECKPOINTS)
    if found is None:
        raise WeightsError(f"no checkpoint in {folder} to start from; wanted the folder of a training")
    state.load_module(module, found.tensors("average"), f"checkpoint {found.folder}")
