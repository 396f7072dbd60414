"""`idcore train pulid` as a launcher's processes run it, in processes forked from one that has imported everything."""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.utils.checkpoint  # as what follows: what a training imports late; here, once for all processes
from diffusers import UNet2DConditionModel  # noqa: F401

import idcore.cli
import idcore.training.pulid.run
from idcore.errors import told
from idcore.training.pulid.task import PuLIDTask

SETTINGS = {
    "stage1.steps": 3, "stage2.steps": 1, "stage3.steps": 1, "stage2.batch": 1, "stage3.batch": 1, "loop.batch": 1,
    "loop.warmup": 0, "loop.validate_every": 0, "loop.save_every": 2, "loop.trackers": "", "loop.device": "cpu",
    "loop.ema": 0.5, "loss.steps": 2, "loss.gradient_steps": 2, "encoder.width": 16, "encoder.output_dim": 24,
}  # fmt: skip


def arguments(data, out, base="tiny", stage="all", resume=False, **changes):
    """What stands behind `idcore`; a change's name has __ for its point."""
    settings = SETTINGS | {k.replace("__", "."): v for k, v in changes.items()}
    sets = [t for k, v in settings.items() for t in ("--set", f"{k}={v}")]
    line = ["train", "pulid", "--base", base, "--data", str(data), "--out", str(out), "--stage", stage, *sets]
    return [*line, "--resume"] if resume else line


def member(rank, world, port, name, line, happens=()):
    """Process `rank` of `world` (1: alone); its output goes to NAME.RANK.txt, and it exits as the command does.

    `happens`: (what, at step): "kill", "term" or "nan" in that step of this process.
    """
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    file = os.open(f"{name}.{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if happens:
        _let_happen(*happens)
    code = told(lambda: idcore.cli.app(line, standalone_mode=False))
    sys.stdout.flush()
    os._exit(code)  # as a launched process ends, without what the test's process left to do at exit


def _let_happen(what, at):
    losses = PuLIDTask.losses

    def with_it(self, batch, step):
        found = losses(self, batch, step)
        if step.index == at:
            if what == "nan":
                return {k: v * float("nan") for k, v in found.items()}
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "term": signal.SIGTERM}[what])
        return found

    PuLIDTask.losses = with_it


def said(name, world):
    """What each process printed."""
    return [Path(f"{name}.{r}.txt").read_text() for r in range(world)]
