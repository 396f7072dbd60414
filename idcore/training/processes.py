"""Processes of one run: which device, what all of them agree on, and signals that ask to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..errors import IdcoreError, InputError
from .config import LoopConfig


class TrainingStopped(IdcoreError):
    """A signal asked to stop: a checkpoint was written. `exit_code` is 128 + the signal's number."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def device_of(c: LoopConfig) -> torch.device:
    """The device that `train` will use in this process: where a task puts its models."""
    if c.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are, as the launcher says: torchrun, or an MPI in the names that
    accelerate knows too."""
    return _said("RANK", 0), _said("WORLD_SIZE", 1)


def _said(name: str, otherwise: int) -> int:
    of_mpi = name.removeprefix("WORLD_")
    names = (name, f"PMI_{of_mpi}", f"OMPI_COMM_WORLD_{of_mpi}", f"MV2_COMM_WORLD_{of_mpi}")
    return next((int(os.environ[n]) for n in names if n in os.environ), otherwise)


def check_here(c: LoopConfig) -> None:
    """Raise InputError or MissingDependencyError for settings that this machine cannot serve: cheap, so that it can
    come before data is prepared and models are loaded."""
    from .optimise import optimiser_class
    from .records import check_trackers

    if c.precision == "fp16" and device_of(c).type == "cpu":
        raise InputError("settings: precision fp16 needs a GPU; on the CPU choose bf16 or no")
    check_trackers(c.trackers)
    optimiser_class(c)


def spawn(work: Callable[..., Any], world: int, *args: Any) -> None:
    """Run `work(*args)` in `world` new processes of this machine that belong together; all must end well.

    Raises:
        TrainingStopped: a signal stopped them.
        IdcoreError: one of them failed; it has said why.
    """
    try:
        torch.multiprocessing.spawn(_member, (work, world, free_port(), args), nprocs=world)
    except torch.multiprocessing.ProcessExitedException as e:
        if e.exit_code > 128:
            name = signal.Signals(e.exit_code - 128).name
            raise TrainingStopped(f"stopped by {name}; go on with --resume", e.exit_code) from e
        raise IdcoreError(f"process {e.error_index} of {world} failed; the reason stands above") from e


def _member(rank: int, work: Callable[..., Any], world: int, port: int, args: tuple) -> None:
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({k: str(v) for k, v in here.items()})
    try:
        work(*args)
    except IdcoreError as e:
        if not e.said_elsewhere:
            print(e, file=sys.stderr, flush=True)
        sys.exit(getattr(e, "exit_code", 1))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def lock(folder: Path) -> Any:
    """An open file that keeps other runs out of a folder for as long as it is open and this process lives.

    Raises:
        InputError: another run has it.
    """
    file = open(folder / ".lock", "a", encoding="utf-8")  # noqa: SIM115
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        file.close()
        raise InputError(f"another training is running in {folder}; wait for its end, or choose another --out") from e
    except (ImportError, OSError):  # a system or a network folder without locks: nothing is lost but this check
        pass
    return file


def everyone(value: Any) -> list[Any]:
    """A plain value of every process, at every process."""
    if not grouped():
        return [value]
    out: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(out, value)
    return out


def from_first(value: Any) -> Any:
    """Process 0's plain value, at every process."""
    if not grouped():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What is inside must end well in every process: an error in one of them is raised in all, and printed by the one.
    Nothing inside may wait for the others."""
    if not grouped():
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as e:
        error = e
    mine = None if error is None else str(error) if isinstance(error, IdcoreError) else repr(error)
    said = everyone(mine)
    if isinstance(error, IdcoreError):
        error.said_elsewhere = mine in said[: dist.get_rank()]
    if error is not None:
        raise error
    for rank, text in enumerate(said):
        if text is not None:
            other = IdcoreError(f"process {rank}: {text}")
            other.said_elsewhere = True
            raise other


def of_all(error: IdcoreError) -> IdcoreError:
    """An error that every process raises: process 0 prints it."""
    error.said_elsewhere = grouped() and dist.get_rank() > 0
    return error


def grouped() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class StopSignals:
    """While open, SIGTERM and the first SIGINT only set `asked`; a second SIGINT interrupts at once.

    A launcher hands on the SIGINT that its terminal has sent to all: within `ECHO` seconds a second one is the same.
    """

    ECHO = 2.0

    def __init__(self) -> None:
        self.asked, self._since = 0, 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exc: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self.asked == signal.SIGINT:
            if "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() < self._since + self.ECHO:
                return
            raise KeyboardInterrupt
        self.asked, self._since = number, time.monotonic()


@contextlib.contextmanager
def determinism(c: LoopConfig) -> Iterator[None]:
    """What `deterministic` asks for, while open."""
    was = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    if c.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0])
        torch.backends.cudnn.benchmark = was[1]
