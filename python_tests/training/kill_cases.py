"""A training in a process of its own that is killed, or kills itself at a chosen operation of a save."""

import contextlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import accelerate  # noqa: F401  the four of them are what a training imports late; here, once for all processes
import torch
import torch._dynamo
import torch.distributed.fsdp
import torch.distributed.tensor
from loop_cases import Denoise, Rows, config

from idcore import files
from idcore.training import checkpoint
from idcore.training.loop import train
from idcore.training.optimise import local

STEPS = 20
# keep=1: at no moment may there be fewer than one whole checkpoint
SETTINGS = config(steps=STEPS, save_every=4, keep=1, validate_every=10)


def run(out, die_at=0, slow=0.0):
    """Train in `out`, going on if there is a checkpoint. `die_at`: SIGKILL at this operation of the saves; `slow`:
    seconds that each of them takes. A run that ends leaves the number of operations in `out/operations`."""
    quiet(out)
    seen = watch(die_at, slow)
    out = Path(out)
    train(Denoise(0, 0.1), Rows(), SETTINGS, out, resume=checkpoint.newest(out / "checkpoints") is not None)
    (out / "operations").write_text(str(seen[0]))


def quiet(out):
    """Progress and tracebacks to OUT/../NAME.err."""
    torch.set_num_threads(1)
    os.dup2(os.open(Path(f"{out}.err"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)


def watch(die_at, slow):
    """Count what saves ask of the file system; die in the middle of one of them."""
    seen = [0]
    for module, names in ((files, ["write_safetensors"]), (os, ["fsync", "replace", "mkdir"]), (shutil, ["rmtree"])):
        for name in names:
            setattr(module, name, _counted(getattr(module, name), name, seen, die_at, slow))
    return seen


def _counted(real, name, seen, die_at, slow):
    def operation(*args, **kwargs):
        time.sleep(slow)
        seen[0] += 1
        if seen[0] == die_at:
            if name == "write_safetensors":  # half of the file is there
                real(*args, **kwargs)
                os.truncate(args[0], os.path.getsize(args[0]) // 2)
            if name == "rmtree":  # half of the folder is gone
                for path in sorted(Path(args[0]).iterdir())[:2]:
                    path.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    return operation


def ended(out, how):
    """Write how a training ended to OUT/../end.txt and leave with its exit code, as the command line does."""
    quiet(out)
    try:
        how(Path(out))
    except BaseException as e:
        with contextlib.suppress(OSError):
            Path(f"{out}.txt").write_text(f"{type(e).__name__}: {e}")
        sys.exit(getattr(e, "exit_code", 1))


def signalled(out, number, after, times=1):
    """A training that gets a signal in the middle of step `after`; the second one in the middle of the save."""

    def how(folder):
        task = Denoise(0, 0.1)
        losses, state = task.losses, task.state

        def losses_and_signal(batch, step):
            if step.index == after:
                os.kill(os.getpid(), number)
            return losses(batch, step)

        def state_and_signal():
            if times > 1 and task.seen == after + 1:
                os.kill(os.getpid(), number)
            return state()

        task.losses, task.state = losses_and_signal, state_and_signal
        train(task, Rows(), SETTINGS, folder)

    ended(out, how)


def as_nobody(out, resume):
    """A training by a user who may not write into `out`."""

    def how(folder):
        os.seteuid(65534)
        try:
            train(Denoise(0, 0.1), Rows(), SETTINGS, folder, resume=resume)
        finally:
            os.seteuid(0)

    ended(out, how)


def member(rank, world, port, out, changes, bases=(1.0, 1.0), resume=False, stop_in=None):
    """One of several processes of a training; `bases`: what the frozen model multiplies with, by process; `stop_in`:
    the process that alone gets a SIGTERM, in step 3."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    mine = f"{out}.{rank}"
    task = Denoise(seed=rank)  # process 0's weights count
    losses = task.losses

    def times_base(batch, step):
        if step.index == 3 and stop_in == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return {k: v * bases[step.rank] for k, v in losses(batch, step).items()}

    def state():
        return {"seen": task.seen, "held": sum(local(p).numel() for p in task.module.parameters())}

    def how(folder):
        train(task, Rows(), config(**changes), Path(out), resume=resume)
        whole = {k: v.tolist() for k, v in task.module.state_dict().items()}
        Path(f"{mine}.json").write_text(json.dumps(whole))

    task.losses, task.state = times_base, state
    ended(mine, how)
