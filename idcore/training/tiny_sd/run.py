"""Training of tiny-sd on the loop of all systems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...sampling.tiny_sd import TinySDConfig
from ...workflows import writable_folder
from ..commands import TrainArguments, run_training
from ..config import LoopConfig
from ..loop import train
from ..settings import load, setting
from ..tiny.running import run_on_people, start_from, use_threads
from .data import PeopleData, PeopleSource
from .task import RecogniserPhase, TinySDTask


def _loop() -> LoopConfig:
    return LoopConfig(
        steps=6000, batch=32, lr=1.2e-3, schedule="linear", warmup=100, decay=0.4, lr_end=0.02, betas=(0.9, 0.98),
        ema=0.998, precision="bf16", device="cpu", validate_every=500, save_every=250, keep=2, log_every=20,
        trackers=(),
    )  # fmt: skip


@dataclass(frozen=True)
class TinySDTrainConfig:
    """What `train_tiny_sd` does. All values are our choice."""

    loop: LoopConfig = setting(factory=_loop, doc="Training loop")
    pool: str | None = setting(None, "Folder of rendered people; null: pool/ in the output's folder", free=True)
    shards: int = setting(28, "Fill the pool up to as many shards of 500 people; 0: take it as it is", low=0, free=True)
    workers: int = setting(1, "Processes on this machine", low=1, free=True)
    threads: int = setting(1, "CPU threads of each", low=1, free=True)
    init: str | None = setting(None, "Folder of another training whose averaged weights to start from", free=True)
    drop_text: float = setting(0.05, "Share of samples without prompt", low=0, high=1)
    without_styles: tuple[str, ...] = setting((), "Styles that it never sees, in pictures and words")
    late: RecogniserPhase = setting(factory=RecogniserPhase, doc="The face recogniser's losses, late")
    model: TinySDConfig | None = setting(None, "Widths of the model; null: the shipped one's")


def train_tiny_sd(
    config: TinySDTrainConfig, out: str | Path, resume: bool = False, allow_change: Sequence[str] = ()
) -> Path:
    """Train, or go on from the newest checkpoint in `out`; see `loop.train` for what is returned and raised."""
    return run_on_people(_work, config, out, resume, allow_change)


def _work(config: TinySDTrainConfig, out: Path, pool: Path, resume: bool, allow_change: Sequence[str]) -> Path:
    use_threads(config.threads)
    model = config.model or TinySDConfig()
    data = PeopleData(pool, config.loop.seed, model.width, without=config.without_styles)
    task = TinySDTask(model, config.loop.seed, config.drop_text, config.late)
    if config.init and not resume:
        start_from(task.module, config.init)
    source = PeopleSource(data, config.loop.batch)
    return train(task, source, config.loop, out, resume=resume, settings=config, allow_change=allow_change)


def run_command(arguments: TrainArguments) -> list[str]:
    """`idcore train tiny-sd`; returns the lines for standard output."""
    a = arguments
    settings = load(TinySDTrainConfig, a.config, a.changes)

    def go(chosen: TinySDTrainConfig, folder: Path) -> Path:
        return train_tiny_sd(chosen, writable_folder(folder), a.resume, a.allow_change)

    return run_training("tiny-sd", a, settings, go, use="idcore train ... --base {made}")
