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
from ..card import Card, write_card

if TYPE_CHECKING:
    from .task import PuLIDTask

_WHAT = {1: "L_diff", 2: "L_diff + L_id", 3: "L_diff + L_id + L_align"}
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
    written += write_card(card_of(task), config, folder, facts)
    result = Result("pulid", written[0].name, config.model.base, config.result.mode, config.face.features)
    more = {
        "version": task.module.version, "fast": config.model.fast, "stage": task.stage,
        "resolution": config.model.resolution, "steps": config.loss.steps,
    }  # fmt: skip
    return [*written, result.write(folder, more)]


def card_of(task: PuLIDTask) -> Card:
    """What PuLID says of a stage's result."""
    c = task.config
    on = "" if c.model.base == "tiny" else f" --base {c.model.base}"
    judges = [j.measure.recogniser for j in getattr(task.validator, "judges", [])]
    return Card(
        title=f"PuLID ({task.module.version}), stage {task.stage}",
        summary="An identity adapter trained by `idcore train pulid` after PuLID (arXiv 2404.16022): stage "
        f"{task.stage}, {_WHAT[task.stage]}.",
        base=c.model.base,
        tags=("pulid", "identity"),
        rows={
            "base": task.base.name + ("" if task.fast is task.base else f", 4-step passes on {task.fast.name}"),
            "encoder reads": c.face.features, "layers": str(len(task.module.config.layers)),
            "precision": c.result.dtype, "inference mode": c.result.mode,
        },
        use=(
            'idcore generate --system RESULT --id photo.jpg --prompt "portrait, color, cinematic" --out pictures' + on,
        ),
        notes="`pulid.safetensors` has the keys of the published file; PuLID's own code and the community's loaders "
        "read it where the base and the sizes are the published ones.",
        limits=f"Similarity is measured by {', '.join(judges) or 'no recogniser'}; where that is the network of the "
        "identity loss or the one that the encoder reads, the figure favours what that network sees and is no "
        "independent proof of likeness.",
        run=f"stage {task.stage}",
    )  # fmt: skip
