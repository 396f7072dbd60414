"""Settings of the training loop, the same for every system. A system's own settings nest them (`settings.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import InputError
from .settings import setting


@dataclass(frozen=True)
class LoopConfig:
    """What `loop.train` reads. The global batch is processes x `batch` x `accumulate`."""

    steps: int = setting(10_000, "Steps of the optimiser", low=1)
    batch: int = setting(1, "Samples of one process in one forward pass", low=1, free=True)
    accumulate: int = setting(1, "Forward passes before each step of the optimiser", low=1, free=True)
    lr: float = setting(1e-5, "Learning rate", above=0)
    schedule: Literal["constant", "linear", "cosine"] = setting("constant", "Course of the learning rate")
    warmup: int = setting(0, "Steps of linear warm-up", low=0)
    decay: float = setting(1.0, "Share of the steps, at the end, over which linear and cosine fall", above=0, high=1)
    lr_end: float = setting(0.0, "Least share of lr that linear and cosine leave", low=0, high=1)
    optimiser: Literal["adamw", "adamw8bit", "sgd"] = setting(
        "adamw", "adamw8bit keeps its state in 8 bit (needs bitsandbytes or torchao)"
    )
    betas: tuple[float, float] = setting((0.9, 0.999), "Adam's decay rates", low=0, below=1, source="PyTorch's default")
    eps: float = setting(1e-8, "Adam's epsilon", above=0, source="PyTorch's default")
    weight_decay: float = setting(0.01, "Decoupled weight decay", low=0, source="PyTorch's default")
    clip: float = setting(1.0, "Largest norm of the whole gradient; 0: not clipped", low=0)
    ema: float = setting(0.9999, "Decay of the averaged weights that are shown and exported; 0: none", low=0, below=1)
    precision: Literal["no", "bf16", "fp16"] = setting("no", "Autocast of the forward pass; fp16 scales the loss")
    seed: int = setting(0, "Of noise, order of the data and all else that is drawn", low=0)
    parallel: Literal["ddp", "fsdp"] = setting(
        "ddp", "Several processes: whole copies, or weights, gradients and optimiser in shards", free=True
    )
    device: Literal["auto", "cpu"] = setting("auto", "Accelerator where there is one, or the CPU", free=True)
    gradient_checkpointing: bool = setting(False, "Compute activations twice and keep fewer (by the task)", free=True)
    compile: bool = setting(False, "torch.compile the frozen model (by the task)")
    deterministic: bool = setting(False, "Refuse operators whose result depends on the order of threads", free=True)
    prefetch: bool = setting(True, "Read the next step's data while this one computes", free=True)
    save_every: int = setting(500, "Steps between checkpoints", low=1, free=True)
    keep: int = setting(2, "Checkpoints to keep", low=1, free=True)
    validate_every: int = setting(500, "Steps between validations; 0: none", low=0, free=True)
    log_every: int = setting(10, "Steps between lines to the trackers and the progress bar", low=1, free=True)
    trackers: tuple[str, ...] = setting(
        ("tensorboard",), "Names that accelerate knows; losses.jsonl is written in any case", free=True
    )
    stop_at: int = setting(0, "Save and stop at this step, to go on later; 0: not before the end", low=0, free=True)

    def check(self) -> None:
        """Raise InputError for values that do not go together."""
        if self.warmup > self.steps:
            raise InputError(f"settings: warmup must be at most steps, got warmup {self.warmup} and steps {self.steps}")
        if self.parallel == "fsdp" and self.precision == "fp16":
            raise InputError("settings: precision fp16 does not go with parallel fsdp; choose bf16, or ddp")
        if self.parallel == "fsdp" and self.optimiser == "adamw8bit":
            raise InputError("settings: optimiser adamw8bit does not go with parallel fsdp; choose adamw, or ddp")
