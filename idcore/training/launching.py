"""Launchers: how torchrun's and accelerate's processes come together for a run, and what they may not ask for."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ..errors import InputError
from .config import LoopConfig
from .processes import check_here, device_of, grouped, rank_and_world

_PATIENCE = timedelta(hours=2)  # the others wait while process 0 validates and saves
_LAUNCH = "start it by torchrun --nproc-per-node N -m idcore.cli train ... (docs/training.md)"


def join(c: LoopConfig) -> None:
    """Bring the processes of a launch together; they wait for each other. A process that is alone goes on at once.

    Raises:
        InputError: the launcher asks for what this training does otherwise, or has not started all processes.
    """
    from accelerate.state import PartialState

    _check_launcher(c)
    world = PartialState(cpu=device_of(c).type == "cpu", timeout=_PATIENCE).num_processes
    if world != rank_and_world()[1]:
        raise InputError(
            f"the environment speaks of {rank_and_world()[1]} processes, yet {world} came together; {_LAUNCH}"
        )


def leave() -> None:
    """Part the processes, once all have ended well: PyTorch warns of those that do not."""
    if grouped():
        from accelerate.state import AcceleratorState

        dist.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)


def make_accelerator(c: LoopConfig, out: Any) -> Any:
    """accelerate's view of the processes, with the settings' precision and trackers."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import GradientAccumulationPlugin

    check_here(c)
    join(c)
    AcceleratorState._reset_state()  # another run in this process may have had another precision
    return Accelerator(
        mixed_precision=c.precision, cpu=device_of(c).type == "cpu", log_with=list(c.trackers) or None,
        project_dir=str(out),
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # the loop divides by itself
    )  # fmt: skip


def _check_launcher(c: LoopConfig) -> None:
    """Raise InputError for what `accelerate launch` and its configuration file ask for and would not get."""
    asked = {k: v for k, v in os.environ.items() if k.startswith("ACCELERATE_")}
    if "ACCELERATE_USE_CPU" in asked and "MASTER_ADDR" in os.environ and rank_and_world()[1] == 1:
        raise InputError(
            "accelerate launch was told of several processes and started one, as it does with --cpu and without an "
            f"MPI; {_LAUNCH}"
        )
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if asked.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
            way = "set loop.parallel=fsdp and launch" if name == "FSDP" else "launch"
            raise InputError(
                f"accelerate launch asks for {name.lower()} (by an option, or by accelerate's configuration file); "
                f"this training divides its work by itself: {way} with --multi_gpu alone, or {_LAUNCH}"
            )
    precision = asked.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("no", c.precision):
        raise InputError(
            f"accelerate launch asks for mixed precision {precision}, the settings for {c.precision}: set "
            "loop.precision, or launch with --mixed_precision no"
        )
    if asked.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise InputError("accelerate launch asks for torch.compile: launch with --dynamo_backend no")
