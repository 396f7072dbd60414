"""What a training leaves: weights in the published layout, how they are to be used, and a model card.

RESULT/pulid.safetensors    keys of the published v1 or v1.1 file
RESULT/result.json          features that the encoder reads, the mode of inference, the base
RESULT/README.md            model card
RESULT/curves.png           losses and measures over the steps, where matplotlib is installed
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...results import Result
from ...weights import to_layout, write_safetensors
from .card import write_card

if TYPE_CHECKING:
    from .task import PuLIDTask

WEIGHTS = {"pulid": "pulid.safetensors", "community": "pulid_community.safetensors"}


def export(task: PuLIDTask, folder: Path, facts: Mapping[str, Any]) -> list[Path]:
    """Write a result folder; result.json, which makes it one, last."""
    folder.mkdir(parents=True, exist_ok=True)
    config = task.config
    dtype = getattr(torch, config.result.dtype)
    state = {k: v.detach().to("cpu", dtype).contiguous() for k, v in task.module.state_dict().items()}
    metadata = {"format": "pt", "idcore_config": task.module.config.to_json()}
    written = [
        write_safetensors(folder / WEIGHTS[layout], {to_layout(k, layout): t for k, t in state.items()}, metadata)
        for layout in config.result.layouts
    ]
    written += write_card(task, folder, facts)
    result = Result("pulid", written[0].name, config.result.mode, config.face.features, config.model.base)
    more = {
        "version": task.module.version, "fast": config.model.fast, "stage": task.stage,
        "resolution": config.model.resolution, "steps": config.loss.steps,
    }  # fmt: skip
    return [*written, result.write(folder, more)]
