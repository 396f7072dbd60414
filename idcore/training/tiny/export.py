"""A training's averaged weights to the shipped form: float16 safetensors, config.json with the figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...errors import WeightsError
from ...sampling.tiny_model import TinyConfig, TinyModel
from ...sampling.tiny_pipeline import TinyPipeline
from .checkpoint import find_checkpoint

LIMIT = 16 * 2**20  # bytes of the shipped weights


def load_average(run: str | Path) -> tuple[TinyPipeline, dict[str, Any]]:
    """The averaged weights of a training's newest checkpoint as a pipeline, and the checkpoint's state."""
    from safetensors.torch import load_file

    path = find_checkpoint(Path(run))
    state = json.loads((path / "state.json").read_text())
    model = TinyModel(TinyConfig.from_dict(state["model"]))
    model.load_state_dict(load_file(path / "ema.safetensors"))
    return TinyPipeline(model), state


def export(run: str | Path, folder: str | Path, notes: dict[str, Any] | None = None) -> Path:
    """Write `folder/model.safetensors` and `config.json` from a training's newest checkpoint.

    Raises:
        WeightsError: no checkpoint in `run`, or more than 16 MiB of weights.
    """
    pipe, state = load_average(run)
    size = 2 * sum(v.numel() for v in pipe.model.state_dict().values())
    if size > LIMIT:
        raise WeightsError(
            f"the weights take {size / 2**20:.1f} MiB in float16, the package ships at most {LIMIT / 2**20:.0f}"
        )
    keep = ("batch", "workers", "lr", "decay", "ema", "recogniser_from", "perceptual_weight", "identity_weight", "seed")
    training = {"iterations": state["step"], "samples": state["samples"]}
    training |= {k: state["config"][k] for k in keep}
    training["last_losses"] = state["history"][-1] if state["history"] else {}
    return pipe.save(folder, {"training": training, **(notes or {})})
