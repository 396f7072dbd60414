"""What a run leaves for people: losses.jsonl, measures.jsonl, pictures, trackers, the progress bar. Process 0 only."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import IdcoreError, InputError, MissingDependencyError
from ..workflows import save_picture
from .config import LoopConfig
from .contract import Validation


class Lines:
    """A file of one JSON object per line, each with its `step`."""

    def __init__(self, path: Path, step: int) -> None:
        """Open for steps after `step`: later lines, from a run that was stopped, are removed."""
        self.path = path
        try:
            old = _complete_lines(path)
            kept = [line for line in old if line.get("step", 0) <= step]
            if kept or path.exists():
                _replace(path, kept)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        except OSError as e:
            raise self._error(e) from e
        self.steps = {line["step"] for line in kept}

    def add(self, **values: Any) -> None:
        try:
            self._file.write(json.dumps(_finite(values)) + "\n")
            self._file.flush()
        except OSError as e:
            raise self._error(e) from e

    def sync(self) -> None:
        """To the disk, before a checkpoint says that these steps are done."""
        try:
            os.fsync(self._file.fileno())
        except OSError as e:
            raise self._error(e) from e

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as e:  # what was buffered when the disk was full
            raise self._error(e) from e

    def _error(self, e: OSError) -> IdcoreError:
        return IdcoreError(
            f"cannot write {self.path}: {e.strerror or e}; the last checkpoint is intact. "
            "Free some space or make the folder writable, then go on with --resume"
        )


def _complete_lines(path: Path) -> list[dict[str, Any]]:
    """The lines that can be read; a kill may have left half of the last one."""
    if not path.exists():
        return []
    out = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and "step" in value:
            out.append(value)
    return out


def _replace(path: Path, lines: list[dict[str, Any]]) -> None:
    staged = path.with_name(f".{path.name}.part")
    staged.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    os.replace(staged, path)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: None stands for them."""
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Records:
    """Opens all of it for a run that goes on after `step`."""

    def __init__(self, accelerator: Any, out: Path, c: LoopConfig, step: int, settings: Mapping[str, Any]) -> None:
        self.out, self.config, self.accelerator = out, c, accelerator
        self.losses = Lines(out / "losses.jsonl", step)
        self.measures = Lines(out / "measures.jsonl", step)
        self._sums: dict[str, list[float]] = {}
        _start_trackers(accelerator, out, step, settings)
        self.bar = _progress_bar(c, step)

    def step(self, step: int, line: Mapping[str, Any]) -> None:
        """After each step of the optimiser; `line` holds loss, terms, logs, lr, grad_norm, seconds."""
        self.losses.add(step=step, **line)
        flat = {"loss": line["loss"], "lr": line["lr"], "grad_norm": line["grad_norm"], "seconds": line["seconds"]}
        flat |= {f"losses/{k}": v for k, v in line["terms"].items()}
        flat |= {f"logs/{k}": v for k, v in line["logs"].items()}
        for k, v in flat.items():
            self._sums.setdefault(k, []).append(v)
        self.bar.update(1)
        if step % self.config.log_every == 0 or step == self.config.steps:
            means = {k: sum(v) / len(v) for k, v in self._sums.items()}
            self._sums = {}
            self.accelerator.log(means, step=step)
            shown = {
                k.split("/")[-1]: f"{v:.4g}" for k, v in means.items() if k.split("/")[0] in ("loss", "losses", "logs")
            }
            self.bar.set_postfix(shown, refresh=False)

    def validation(self, step: int, found: Validation) -> None:
        """Pictures to OUT/validation/step-…/NAME.png and the trackers, measures to measures.jsonl and the trackers."""
        folder = self.out / "validation" / f"step-{step:08d}"
        if found.pictures:
            folder.mkdir(parents=True, exist_ok=True)
        for name, picture in found.pictures.items():
            save_picture(picture, folder / f"{name}.png")
            for tracker in self.accelerator.trackers:
                if hasattr(tracker, "log_images"):
                    more = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                    pixels = np.asarray(picture.convert("RGB"))[None]
                    tracker.log_images({f"validation/{name}": pixels}, step=step, **more)
        if found.measures:
            self.accelerator.log({f"validation/{k}": v for k, v in found.measures.items()}, step=step)
        self.measures.add(step=step, measures={k: float(v) for k, v in found.measures.items()})

    def say(self, text: str) -> None:
        self.bar.write(text, file=sys.stderr)

    def sync(self) -> None:
        self.losses.sync()
        self.measures.sync()

    def close(self) -> None:
        self.bar.close()
        self.losses.close()
        self.measures.close()
        for tracker in self.accelerator.trackers:  # accelerate's own end would also part the processes
            tracker.finish()


def check_trackers(names: Sequence[str]) -> None:
    """Raise where accelerate does not know a tracker's name, or its package is not installed."""
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    known = [t.value for t in LoggerType if t.value != "all"]
    usable = {str(getattr(t, "value", t)) for t in get_available_trackers()}
    for name in names:
        if name not in known:
            raise InputError(f"trackers: {name!r} is none that accelerate knows: {', '.join(known)}; or [] for none")
        if name not in usable:
            raise MissingDependencyError(
                f"trackers: {name} is not installed: pip install {name.replace('_', '-')}, or set trackers=[] "
                "(losses.jsonl is written in any case)"
            )


def _start_trackers(accelerator: Any, out: Path, step: int, settings: Mapping[str, Any]) -> None:
    if not accelerator.log_with:
        return
    more = {"tensorboard": {"purge_step": step + 1}} if step else {}
    accelerator.init_trackers(out.resolve().name or "run", init_kwargs=more)
    text = json.dumps(settings, indent=1)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_text("settings", f"```\n{text}\n```", global_step=step)
        else:
            tracker.store_init_configuration(dict(_flat(settings)))


def _flat(values: Mapping[str, Any], place: str = "") -> list[tuple[str, Any]]:
    out = []
    for k, v in values.items():
        if isinstance(v, Mapping):
            out += _flat(v, f"{place}{k}.")
        else:
            out.append((place + k, v if isinstance(v, (int, float, str, bool)) else json.dumps(v)))
    return out


def _progress_bar(c: LoopConfig, step: int) -> Any:
    from tqdm import tqdm

    seldom = {} if sys.stderr.isatty() else {"mininterval": 30.0, "maxinterval": 30.0}
    return tqdm(total=c.steps, initial=step, desc="training", unit="step", **seldom)


class Means:
    """Means of figures by name; a name that is not always there counts where it is."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}

    def add(self, values: Mapping[str, float]) -> None:
        for k, v in values.items():
            self._values.setdefault(k, []).append(float(v))

    def means(self, count: int = 0) -> dict[str, float]:
        """Over `count` additions, or over as many as there were of each name."""
        return {k: sum(v) / (count or len(v)) for k, v in self._values.items()}
