"""The same work on a Ray cluster: Ray Data maps names over workers, this process writes what comes back.

Workers hold the models and touch no folder of the run, so machines need to share no disk; a worker that dies is started
anew and its name is done again, and what came back twice is written once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from ... import errors
from ...errors import IdcoreError, InputError, MissingDependencyError
from .options import Made, Pair
from .setup import Job

LOCAL = "local"


@dataclass(frozen=True)
class Cluster:
    """Where the workers run.

    Attributes:
        address: "local" starts Ray on this machine and ends it afterwards; "auto" or HOST:PORT joins a running cluster.
            A cluster that this process has joined before is taken as it is.
        workers: processes, each with the models in it.
        cpus, gpus: that each of them needs; Ray places no more than there are.
        retries: how often one worker may die before the run is given up.
        memory: of Ray's object store when it is started here, MiB; pictures on their way back lie in it.
    """

    address: str = LOCAL
    workers: int = 1
    cpus: float = 1
    gpus: float = 0
    retries: int = 3
    memory: int = 512

    def __post_init__(self) -> None:
        if self.workers < 1 or self.retries < 0 or self.cpus < 0 or self.gpus < 0 or self.memory < 80:
            raise InputError(
                "augment: wanted at least 1 worker, 0 or more retries, CPUs and GPUs, and 80 MiB of object store, got "
                f"workers {self.workers}, retries {self.retries}, cpus {self.cpus:g}, gpus {self.gpus:g}, memory "
                f"{self.memory}"
            )

    def run(self, names: Sequence[str], job: Job) -> Iterator[Made]:
        """What came of each name, in the order in which they are done.

        Raises:
            IdcoreError: a worker raised, or died more than `retries` times. MissingDependencyError: no Ray.
        """
        with self._joined() as ray:
            # A block is what is done again when a worker dies, and what a worker gets at once: one name.
            data = ray.data.from_items([{"name": n} for n in names], override_num_blocks=len(names))
            done = data.map(
                _Worker,
                fn_constructor_args=(job,),
                compute=ray.data.ActorPoolStrategy(size=min(self.workers, len(names))),
                num_cpus=self.cpus,
                num_gpus=self.gpus,
                ray_remote_args_fn=lambda: {"max_restarts": self.retries, "max_task_retries": self.retries},
            )
            try:
                for row in done.iter_rows():
                    yield _read(row)
            except IdcoreError:
                raise
            except (ray.exceptions.RayError, RuntimeError) as e:
                raise _told(e, ray, self.retries) from e

    @contextmanager
    def _joined(self) -> Iterator[Any]:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
        try:
            import ray
            import ray.data
        except ImportError as e:
            raise MissingDependencyError(f"augment on a cluster needs Ray: pip install 'idcore[ray]' ({e})") from e
        ours = not ray.is_initialized()
        if ours:
            self._start(ray)
        context = ray.data.DataContext.get_current()
        was = context.enable_progress_bars, getattr(context, "print_on_execution_start", True)
        # There is a bar of names already.
        context.enable_progress_bars = context.print_on_execution_start = False
        try:
            yield ray
        finally:
            context.enable_progress_bars, context.print_on_execution_start = was
            if ours:
                ray.shutdown()

    def _start(self, ray: Any) -> None:
        try:
            if self.address == LOCAL:
                cpus = max(os.cpu_count() or 1, int(self.workers * self.cpus))
                ray.init(
                    num_cpus=cpus, object_store_memory=self.memory << 20, include_dashboard=False, log_to_driver=False
                )
            else:
                ray.init(address=self.address, log_to_driver=False)
        except Exception as e:  # Ray raises plain ones where its processes do not start
            first = str(e).strip().splitlines()[0]
            raise IdcoreError(
                f"augment: no Ray cluster at {self.address!r} ({first}); start one with `ray start --head`, or use "
                "--ray local"
            ) from e


class _Worker:
    """The models in a process of the cluster, made with the first name: what they raise is then told as it is."""

    def __init__(self, job: Job) -> None:
        self.job, self.unit = job, None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            if self.unit is None:
                self.unit = self.job.build()
            made = self.unit(row["name"])
        except IdcoreError as e:  # as data: Ray would wrap it in texts of its own
            return {"name": row["name"], "error": type(e).__name__, "said": str(e), "files": "[]", "content": [b""]}
        said = {"pairs": [asdict(p) for p in made.pairs], "drops": made.drops, "drawn": made.drawn}
        return {
            "name": made.name, "error": "", "said": json.dumps(said), "files": json.dumps(list(made.pictures)),
            "content": list(made.pictures.values()) or [b""],
        }  # fmt: skip


def _read(row: dict[str, Any]) -> Made:
    if row["error"]:
        raise getattr(errors, row["error"], IdcoreError)(row["said"])
    said = json.loads(row["said"])
    pictures = dict(zip(json.loads(row["files"]), map(bytes, row["content"])))
    return Made(
        row["name"], [Pair(**p) for p in said["pairs"]], [tuple(d) for d in said["drops"]], pictures, said["drawn"]
    )


def _told(e: Exception, ray: Any, retries: int) -> IdcoreError:
    """What became of a worker."""
    cause: Any = e
    while cause is not None:
        if isinstance(cause, ray.exceptions.ActorDiedError) and "creation task" not in str(cause):
            return IdcoreError(
                f"augment: a worker died more than {retries} times, most often for want of memory; what stands is "
                "kept. Run it again with fewer --workers or a smaller batch"
            )
        cause = getattr(cause, "cause", None) or cause.__cause__
    last = str(e).strip().splitlines()[-1] if str(e).strip() else type(e).__name__
    return IdcoreError(
        f"augment: a worker failed: {last}; what stands is kept. Is idcore installed on all machines, in one version?"
    )
