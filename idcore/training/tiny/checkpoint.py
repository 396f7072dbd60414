"""Checkpoints of the training: written beside, then renamed, so that a kill never leaves half of one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import WeightsError

if TYPE_CHECKING:
    from .loop import Trainer

LAST, OLD, STAGING = "checkpoint", "checkpoint.old", "checkpoint.part"


def _optimiser_tensors(trainer: Trainer) -> dict[str, Tensor]:
    state = trainer.optimiser.state_dict()["state"]
    return {f"{i}.{k}": v for i, values in state.items() for k, v in values.items()}


def save_checkpoint(folder: Path, trainer: Trainer) -> Path:
    """Write `folder/checkpoint` (weights, average, optimiser, step); the previous one goes only after."""
    from safetensors.torch import save_file

    from .loop import config_dict

    part, last, old = folder / STAGING, folder / LAST, folder / OLD
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    packed = lambda d: {k: v.detach().contiguous().clone() for k, v in d.items()}  # noqa: E731
    save_file(packed(trainer.model.state_dict()), part / "model.safetensors")
    save_file(packed(trainer.ema), part / "ema.safetensors")
    save_file(packed(_optimiser_tensors(trainer)), part / "optimiser.safetensors")
    state = {"step": trainer.step, "samples": trainer.samples, "history": trainer.history}
    state |= {"config": config_dict(trainer.config), "model": trainer.model.config.as_dict()}
    (part / "state.json").write_text(json.dumps(state, indent=1))
    shutil.rmtree(old, ignore_errors=True)
    if last.exists():
        last.replace(old)
    part.replace(last)
    shutil.rmtree(old, ignore_errors=True)
    return last


def find_checkpoint(folder: Path) -> Path:
    """The newest whole checkpoint in a folder of `train_tiny`; raises WeightsError if there is none."""
    for name in (LAST, OLD):
        if (folder / name / "state.json").exists():
            return folder / name
    raise WeightsError(f"no checkpoint in {folder}: it needs {LAST}/state.json; train without resuming first")


def load_checkpoint(folder: Path, trainer: Trainer, weights_only: bool = False) -> None:
    """Bring a trainer to the state of `folder`'s checkpoint; weights_only: start anew from its average."""
    from safetensors.torch import load_file

    path = find_checkpoint(Path(folder))
    ema = load_file(path / "ema.safetensors")
    try:
        trainer.model.load_state_dict(ema if weights_only else load_file(path / "model.safetensors"))
    except RuntimeError as error:
        raise WeightsError(f"{path} does not fit this model: {error}") from error
    trainer.ema = {k: ema[k].clone() for k in trainer.model.state_dict()}
    if weights_only:
        return
    state = json.loads((path / "state.json").read_text())
    trainer.step, trainer.samples, trainer.history = state["step"], state["samples"], state["history"]
    whole = trainer.optimiser.state_dict()
    values: dict[int, dict] = {}
    for key, v in load_file(path / "optimiser.safetensors").items():
        index, name = key.split(".", 1)
        values.setdefault(int(index), {})[name] = v
    with torch.no_grad():
        trainer.optimiser.load_state_dict({"state": values, "param_groups": whole["param_groups"]})
