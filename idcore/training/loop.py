"""The training loop of all systems: optimises any `contract.Task` on any `contract.Source`, on accelerate.

Knows no system and no diffusion. A run can be killed at any moment and goes on from its newest whole checkpoint with
the very losses that it would have had; on the CPU bit for bit.
"""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import IdcoreError, InputError
from . import resuming, sharing, state
from .config import LoopConfig
from .contract import Batch, Source, Step, Task
from .launching import make_accelerator
from .optimise import Average, learning_rate, make_optimiser, set_rate
from .prefetch import Batches
from .processes import (
    StopSignals,
    TrainingStopped,
    determinism,
    everyone,
    from_first,
    of_all,
    together,
)
from .records import Means, Records
from .resuming import CHECKPOINTS, RESULT
from .settings_out import as_dict


def train(
    task: Task,
    source: Source,
    config: LoopConfig,
    out: Path,
    *,
    resume: bool = False,
    facts: Mapping[str, Any] | None = None,
    settings: Any = None,
    allow_change: Sequence[str] = (),
) -> Path:
    """Train `task.module` and export it; every process of a launch calls this.

    Args:
        task: what is trained. Its module is already on `processes.device_of(config)`.
        source: prepared data.
        out: folder of checkpoints/, losses.jsonl, measures.jsonl, validation/, trackers' files and model/.
        resume: go on from the newest whole checkpoint in `out`.
        facts: for the model card, handed to `task.export` with what the loop knows.
        settings: the dataclass of all settings of the run, kept in checkpoints; when a run is resumed its fields
            must be as they were, except those marked `free`.
        allow_change: keys that may differ nevertheless ("lr", "data", "data.count").

    Returns:
        `out/model`, as exported; or the last checkpoint's folder where `stop_at` ended the run before its last step.

    Raises:
        InputError: `out` holds a run already and `resume` is not set; other settings or data than the checkpoint's.
        WeightsError: nothing to resume, or no whole checkpoint.
        TrainingStopped: SIGTERM or SIGINT; the checkpoint is written. `exit_code` is 143 or 130.
        IdcoreError: a loss that is not finite, a full disk: the last good checkpoint is intact.
    """
    out = Path(out)
    config.check()
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(StopSignals())
        accelerator = make_accelerator(config, out)
        stack.callback(state.keep_random_state(accelerator.device))
        stack.enter_context(determinism(config))
        run = Run(task, source, config, out, accelerator, signals, settings, facts or {})
        stack.callback(run.close)
        run.open(resume, allow_change)
        run.go()
        return run.finish()


class Run:
    """One call of `train`: the module, its average, the optimiser, and the number of steps done."""

    def __init__(
        self, task: Task, source: Source, config: LoopConfig, out: Path, accelerator: Any, signals: StopSignals,
        settings: Any, facts: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self.task, self.source, self.config, self.out = task, source, config, out
        self.accelerator, self.signals, self.settings, self.facts = accelerator, signals, settings, facts
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.step, self.samples, self.saved, self.over = 0, 0, -1, False
        self.last_losses: dict[str, float] = {}
        self.module = task.module
        state.seed_all(config.seed)
        self.computation = sharing.wrap(self.module, accelerator, config, getattr(task, "uses_all", False))
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        if not self.parameters:
            raise InputError(f"{task.name}: its module has no parameter that wants a gradient; nothing to train")
        self.optimiser = make_optimiser(self.parameters, config)
        self.average = Average(self.module, config.ema) if config.ema else None
        self.records: Records | None = None
        self.lock: Any = None
        self.batches = Batches(source, config, self.rank, self.world)

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def checkpoints(self) -> Path:
        return self.out / CHECKPOINTS

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def scaler(self) -> Any:
        """Of the loss in fp16; None otherwise."""
        return self.accelerator.scaler

    @property
    def global_batch(self) -> int:
        return self.world * self.config.batch * self.config.accumulate

    # -- beginning and end ------------------------------------------------------------------------------------------

    def open(self, resume: bool, allow_change: Sequence[str]) -> None:
        """Find what to go on from, or begin anew and save at once: a full or read-only disk shows now."""
        found = resuming.find(self, resume)
        if found is not None:
            resuming.load(self, found, allow_change)
        with together():
            if self.first:
                self.records = Records(self.accelerator, self.out, self.config, self.step, self._plain_settings())
        if found is None:
            self.save()
        else:
            self.say(f"going on from step {self.step} ({found.folder})")

    def close(self) -> None:
        self.batches.close()
        if self.records:
            self.records.close()
        if self.lock:
            self.lock.close()

    def go(self) -> None:
        """Steps until the end, `stop_at` or a signal; saves and validates in between."""
        c = self.config
        end = min(c.steps, c.stop_at or c.steps)
        self._validate_if_due()
        while self.step < end and not self.over:
            self._one_step()
            asked = max(everyone(self.signals.asked))
            if asked or self.step % c.save_every == 0 or self.step == end:
                self.save()
            if asked:
                raise of_all(TrainingStopped(
                    f"stopped by {signal.Signals(asked).name} after step {self.step} of {c.steps}; saved in "
                    f"{self.checkpoints}, go on with --resume", 128 + asked,
                ))  # fmt: skip
            self._validate_if_due()
        self.save()

    def finish(self) -> Path:
        """Export the average (or the weights, without one); the module is whole again afterwards."""
        if self.step < self.config.steps and not self.over:
            made = self.checkpoints / f"step-{self.step:08d}"
        else:
            made = self.out / RESULT
            with self._shown(), together():  # nobody goes on to what comes after before the result stands
                if self.first:
                    self.task.export(made, self._all_facts())
        sharing.unwrap(self.computation)
        return made

    # -- one step ---------------------------------------------------------------------------------------------------

    def _one_step(self) -> None:
        c, start = self.config, time.perf_counter()
        rate = learning_rate(self.step, c)
        set_rate(self.optimiser, rate)
        step = Step(c.seed, self.step, c.steps, self.rank, self.world)
        with together():
            batches = self.batches.of(self.step)
        self.optimiser.zero_grad(set_to_none=True)
        terms, logs = Means(), Means()
        for i, batch in enumerate(batches):
            with sharing.exchanging(self.computation, i == len(batches) - 1):
                total, values = self._forward(batch, step)
                terms.add(values)
                logs.add(self.task.logs())
                self.accelerator.backward(total / len(batches))  # even of NaN: all processes take part
        line = self._agreed(terms, logs, [i for b in batches for i in b.ids])
        norm = self._update()
        if self.average:
            self.average.update(self.step)
        self.step += 1
        self.samples += self.global_batch
        self.last_losses = line["terms"]
        line |= {"lr": rate, "grad_norm": norm, "seconds": round(time.perf_counter() - start, 4)}
        with together():
            if self.records:
                self.records.step(self.step, line)

    def _forward(self, batch: Batch, step: Step) -> tuple[Tensor, dict[str, float]]:
        with self.accelerator.autocast():
            terms = self.computation(lambda: dict(self.task.losses(batch, step)))
        if not terms:
            raise InputError(f"{self.task.name}: no losses at step {step.index}; wanted at least one term")
        total = sum(t.float() for t in terms.values())
        if not total.requires_grad:
            raise InputError(f"{self.task.name}: the losses do not depend on its module ({', '.join(terms)})")
        return total, {k: float(v.detach()) for k, v in terms.items()}

    def _agreed(self, terms: Means, logs: Means, ids: list[str]) -> dict[str, Any]:
        """Means over all processes; raises everywhere if a loss is not finite anywhere."""
        parts = everyone((terms.means(self.config.accumulate), logs.means(), ids))
        mean = {k: sum(p[0].get(k, 0.0) for p in parts) / len(parts) for p in parts for k in p[0]}
        total = sum(mean.values())
        if not math.isfinite(total):
            bad = [p for p in parts if not math.isfinite(sum(p[0].values()))]
            shown = ", ".join(f"{k} {v:.4g}" for k, v in bad[0][0].items())
            self._stop_at_bad(f"the loss is {total} ({shown})", bad[0][2])
        figures = Means()
        for p in parts:
            figures.add(p[1])
        return {"loss": total, "terms": mean, "logs": figures.means()}

    def _update(self) -> float:
        """Clip and step; returns the gradient's norm before clipping."""
        scaler = self.scaler
        if scaler is not None:
            scaler.unscale_(self.optimiser)
        limit = self.config.clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if scaler is not None:
            scaler.step(self.optimiser)  # skipped by itself where the scaled gradient overflows
            scaler.update()
        elif math.isfinite(norm):
            self.optimiser.step()
        else:
            self._stop_at_bad(f"the gradient's norm is {norm}", [])
        return norm

    def _stop_at_bad(self, what: str, ids: list[str]) -> None:
        samples = f" on samples {', '.join(ids[:8])}" if ids else ""
        last = f"the checkpoint of step {self.saved} in {self.checkpoints} is intact"
        raise of_all(IdcoreError(
            f"training stopped at step {self.step}: {what}{samples}. Nothing was updated; {last}: resume with a "
            f"lower rate (--resume --set ...lr=... --allow-change lr; now {learning_rate(self.step, self.config):.3g}) "
            f"or without these samples{resuming.where_else(self)}"
        ))  # fmt: skip

    # -- between steps ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _shown(self):
        """The averaged weights in the module, and the random generators left as they were."""
        restore = state.keep_random_state(self.device)
        if self.average:
            self.average.swap()
        try:
            with sharing.gathered(self.computation):
                yield
        finally:
            if self.average:
                self.average.swap()
            restore()

    def _validate_if_due(self) -> None:
        c = self.config
        due = bool(c.validate_every and (self.step % c.validate_every == 0 or self.step == c.steps))
        if not due:
            return
        if from_first(bool(self.records and self.step not in self.records.measures.steps)):
            with self._shown(), together():
                if self.first:
                    found = self.task.validate(Step(c.seed, self.step, c.steps, self.rank, self.world))
                    self.records.validation(self.step, found)
        enough = getattr(self.task, "enough", None)
        self.over = from_first(bool(self.first and enough and enough(self.step)))
        if self.over and self.step < c.steps:
            self.say(f"{self.task.name}: stopped early, after step {self.step} of {c.steps}")

    def save(self) -> None:
        """Write a checkpoint unless this step has one."""
        if self.saved != self.step:
            resuming.save(self)
            self.saved = self.step

    def _plain_settings(self) -> dict[str, Any]:
        return as_dict(self.config if self.settings is None else self.settings)

    def _all_facts(self) -> dict[str, Any]:
        return {
            "task": self.task.name, "steps": self.step, "samples": self.samples, "global_batch": self.global_batch,
            "processes": self.world, "averaged": bool(self.average), "settings": self._plain_settings(),
            "loop": as_dict(self.config), "data": self.source.state(), "last_losses": self.last_losses, **self.facts,
        }  # fmt: skip

    def say(self, text: str) -> None:
        if self.records:
            self.records.say(text)
        elif self.first:
            print(text, file=sys.stderr, flush=True)
