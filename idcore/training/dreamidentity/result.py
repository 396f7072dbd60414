"""What a training of DreamIdentity leaves: the encoder's weights, how they are used, a model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...results import Result
from ..card import Card, write_card

if TYPE_CHECKING:
    from .task import DreamIdentityTask

WEIGHTS = "dreamidentity.safetensors"


def export(task: DreamIdentityTask, folder: Path, facts: Mapping[str, Any]) -> list[Path]:
    """Write a result folder; result.json, which makes it one, last."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = task.module.save(folder / WEIGHTS)
    cards = write_card(_card(task), task.config, folder, facts)
    result = Result(task.name, WEIGHTS, task.config.model.base)
    return [weights, *cards, result.write(folder, {"placeholder": task.config.people.placeholder})]


def _card(task: DreamIdentityTask) -> Card:
    c, system = task.config, task.module
    share = c.people.editability
    judge = getattr(task.validator, "judge", None)
    return Card(
        title="DreamIdentity",
        summary="An encoder of faces to words of the prompt, trained by `idcore train dreamidentity` after "
        "DreamIdentity (arXiv 2307.00300); the model that draws is as it was.",
        base=c.model.base,
        tags=("dreamidentity", "identity"),
        rows={
            "base": task.base.name, "face ViT": f"{c.encoder.vit}: {system.config.vit}",
            "words": system.extra_repr(), "faces cut out as": system.config.template,
            "sources": f"{1 - share:.0%} reconstruction, {share:.0%} self-augmented pairs",
        },
        use=(
            f'idcore generate --system RESULT --id photo.jpg --prompt "a photo of {c.people.placeholder} as a nurse" '
            f"--base {c.model.base} --out pictures",
            "idcore encode photo.jpg --system RESULT --out me.safetensors",
        ),
        limits=f"Likeness is measured by {judge.measure.recogniser if judge else 'no recogniser'}.",
    )  # fmt: skip
