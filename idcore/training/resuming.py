"""A run's checkpoint, from it and into it; what may not have changed in between.

`run` is a `loop.Run`. Every process calls these; process 0 reads and writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import IdcoreError, InputError, WeightsError
from ..results import is_result
from . import checkpoint, state
from .processes import everyone, from_first, lock, of_all
from .settings_out import as_dict, differences

if TYPE_CHECKING:
    from .loop import Run

CHECKPOINTS, RESULT = "checkpoints", "model"  # in a run's folder


def begun(out: Path) -> bool:
    """Whether a run's folder holds a checkpoint to go on from."""
    return any((out / CHECKPOINTS).glob("step-*"))


def finished(out: Path, resume: bool) -> Path | None:
    """The result of a run that is at its end already; None where there is something to do.

    Raises:
        InputError: there is a result, and `resume` is not set.
    """
    if not is_result(out / RESULT):
        return None
    if not resume:
        raise InputError(f"{out} holds a finished training already; add --resume, or choose another --out")
    return out / RESULT


def find(run: Run, resume: bool) -> checkpoint.Checkpoint | None:
    """The checkpoint to go on from; None to begin anew.

    Raises:
        InputError: the folder holds a run already, and `resume` is not set; or another run is at work in it.
        WeightsError: nothing to resume, or no whole checkpoint.
        IdcoreError: the folder cannot be written.
    """
    found: Any = None
    if run.first:
        try:
            found = _find(run, resume)
        except IdcoreError as e:
            found = e
        except OSError as e:
            found = IdcoreError(
                f"cannot write into {run.out}: {e.strerror or e}; make it writable, or choose another --out"
            )
    found = from_first(found)
    if isinstance(found, IdcoreError):
        raise of_all(found)
    return found


def _find(run: Run, resume: bool) -> checkpoint.Checkpoint | None:
    folder = run.checkpoints
    folder.mkdir(parents=True, exist_ok=True)
    run.lock = lock(run.out)
    checkpoint.clean(folder)
    if resume:
        found = checkpoint.newest(folder, run.say)
        if found is None:
            raise WeightsError(f"no checkpoint in {folder}; train without resuming first")
        checkpoint.prune(folder, found.step, run.config.keep)  # where a kill came between
        return found
    checkpoint.require_none(folder)
    return None


def where_else(run: Run) -> str:
    """What to do where the newest checkpoint is of the very step that failed, so that its weights may be the cause."""
    if run.saved != run.step or not run.step:
        return ""
    older = [f.name for f in checkpoint.folders(run.checkpoints) if int(f.name[5:]) < run.step]
    way = f"to go on from {older[0]}, remove step-{run.step:08d}" if older else "begin anew in another --out"
    return f". Should it fail there again, that checkpoint's weights have diverged already: {way}"


def save(run: Run) -> None:
    """Write a checkpoint of the step that `run` has reached; all processes learn whether it stands.

    Raises:
        IdcoreError: it does not (disk full, read-only); the last good one is intact.
    """
    tensors, numbers = state.optimiser_state(run.module, run.optimiser)
    groups = {"module": state.module_tensors(run.module), "optimiser": tensors}
    if run.average:
        groups["average"] = state.average_tensors(run.average, run.module)
    randoms = everyone(state.random_state(run.device))
    groups["random"] = {f"{r}.{k}": t for r, (own, _) in enumerate(randoms) for k, t in own.items()}
    error = None
    if run.first:
        kept = _kept(run) | {"optimiser": numbers, "random": [plain for _, plain in randoms]}
        try:
            run.records.sync()
            checkpoint.save(run.checkpoints, run.step, groups, kept, run.config.keep)
        except IdcoreError as e:
            error = e
    error = from_first(error)
    if error is not None:
        raise of_all(error)


def _kept(run: Run) -> dict[str, Any]:
    return {
        "task": run.task.name,
        "samples": run.samples,
        "world": run.world,
        "global_batch": run.global_batch,
        "config": as_dict(run.config),
        "settings": None if run.settings is None else as_dict(run.settings),
        "data": run.source.state(),
        "task_state": run.task.state(),
        "scaler": None if run.scaler is None else run.scaler.state_dict(),
    }


def load(run: Run, found: checkpoint.Checkpoint, allow_change: Sequence[str]) -> None:
    """Bring a run to a checkpoint's state.

    Raises:
        InputError: settings or data differ in what changes the result.
        WeightsError: the tensors are another module's or another optimiser's.
    """
    kept, what = found.state, f"checkpoint {found.folder}"
    _refuse_changes(run, kept, allow_change)
    module = found.tensors("module")
    state.load_module(run.module, module, what)
    state.load_optimiser(run.module, run.optimiser, found.tensors("optimiser"), kept["optimiser"], what)
    if run.average:
        state.load_average(run.average, run.module, found.tensors("average") or module, what)
    if run.scaler is not None and kept["scaler"]:
        run.scaler.load_state_dict(kept["scaler"])
    if run.rank < len(kept["random"]):
        mine = f"{run.rank}."
        own = {k.removeprefix(mine): t for k, t in found.tensors("random").items() if k.startswith(mine)}
        state.load_random_state(own, kept["random"][run.rank], run.device)
    run.task.load_state(kept["task_state"])
    run.step = run.saved = found.step
    run.samples = kept["samples"]


def _refuse_changes(run: Run, kept: Mapping[str, Any], allow_change: Sequence[str]) -> None:
    changed = _changes(run, kept)
    refused = {k: v for k, v in changed.items() if not any(_covers(a, k) for a in allow_change)}
    if refused:
        lines = "".join(f"\n  {k}: was {old!r}, is {new!r}" for k, (old, new) in refused.items())
        allow = " ".join(f"--allow-change {k}" for k in refused)
        raise of_all(InputError(
            f"the checkpoint in {run.out} is of a run that differs in what changes its result:{lines}\n"
            f"Resume with what it was, or allow it: {allow}"
        ))  # fmt: skip


def _covers(allowed: str, key: str) -> bool:
    """ "lr" allows "lr" and "loop.lr"; "data" allows "data.count"."""
    return key == allowed or key.startswith(f"{allowed}.") or key.endswith(f".{allowed}")


def _changes(run: Run, kept: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs between a checkpoint's run and this one, by key: (was, is)."""
    changed: dict[str, tuple[Any, Any]] = {}
    if run.settings is not None and kept["settings"] is not None:
        changed = {k: (old, new) for k, old, new in differences(kept["settings"], run.settings)}
    for k, old, new in differences(kept["config"], run.config):
        if not any(known.endswith(f".{k}") for known in changed):  # most settings nest the loop's
            changed[k] = (old, new)
    was, now = kept["data"], run.source.state()
    changed |= {f"data.{k}": (was.get(k), now.get(k)) for k in sorted({*was, *now}) if was.get(k) != now.get(k)}
    for key, old, new in (
        ("task", kept["task"], run.task.name),
        ("batch", kept["global_batch"], run.global_batch),
    ):
        if old != new:
            changed[key] = (old, new)
    return changed
