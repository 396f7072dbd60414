"""Training of the embedded model on the loop of all systems: settings, pool, processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...sampling.tiny_model import TinyConfig
from ..config import LoopConfig
from ..loop import train
from ..settings import setting
from .data import TinyData
from .running import run_on_people, start_from, use_threads
from .task import TinySource, TinyTask


def _loop() -> LoopConfig:
    return LoopConfig(
        batch=24, lr=8e-4, schedule="linear", warmup=200, decay=0.25, lr_end=0.02, betas=(0.9, 0.98), ema=0.996,
        precision="bf16", device="cpu", validate_every=0, log_every=20, trackers=(),
    )  # fmt: skip


@dataclass(frozen=True)
class TrainConfig:
    """What `train_tiny` does. All values are our choice."""

    loop: LoopConfig = setting(factory=_loop, doc="Training loop")
    pool: str | None = setting(None, "Folder of rendered people; null: pool/ in the output's folder", free=True)
    shards: int = setting(60, "Fill the pool up to as many shards of 500 people; 0: take it as it is", low=0, free=True)
    scale_batches: int = setting(6, "Batches of 32 that the features' mean and deviation are taken from", low=1)
    textures: int = setting(1024, "Textures to draw from", low=1)
    recogniser_from: int = setting(6_000, "Step from which the recogniser's losses count", low=0)
    recogniser_share: float = setting(0.34, "Share of each batch that they see", above=0, high=1)
    perceptual_weight: float = setting(0.15, "Weight of the recogniser's features", low=0)
    identity_weight: float = setting(1.0, "Weight of the identity loss", low=0)
    drop_identity: float = setting(0.08, "Share of samples without identity", low=0, high=1)
    drop_text: float = setting(0.08, "Share of samples without prompt", low=0, high=1)
    workers: int = setting(1, "Processes on this machine", low=1, free=True)
    threads: int = setting(1, "CPU threads of each", low=1, free=True)
    init: str | None = setting(None, "Folder of another training whose averaged weights to start from", free=True)
    model: TinyConfig | None = setting(None, "Widths of the model; null: the shipped one's")


def train_tiny(config: TrainConfig, out: str | Path, resume: bool = False, allow_change: Sequence[str] = ()) -> Path:
    """Train, or go on from the newest checkpoint in `out`; see `loop.train` for what is returned and raised.

    On a shared CPU several single-threaded processes beat one with as many threads: there is one meeting point per
    step in place of one per operator.
    """
    return run_on_people(_work, config, out, resume, allow_change)


def _work(config: TrainConfig, out: Path, pool: Path, resume: bool, allow_change: Sequence[str]) -> Path:
    use_threads(config.threads)
    data = TinyData(pool, config.loop.seed, config.textures)
    task = TinyTask(config)
    if config.init and not resume:
        start_from(task.module, config.init)
    elif not resume:
        task.fit_feature_scale(data)
    source = TinySource(data, config.loop.batch)
    return train(task, source, config.loop, out, resume=resume, settings=config, allow_change=allow_change)
