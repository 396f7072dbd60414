"""What SeFi-IDE's training leaves: the person's words in a few KB, how they are to be used, and a model card.

RESULT/person.safetensors   words of all stages (`systems.sefi_files`), which diffusers reads as a textual inversion
RESULT/result.json          system, base
RESULT/README.md            model card
RESULT/curves.png           losses and measures over the steps, where matplotlib is installed
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...results import Result
from ...systems.sefi_files import save_tokens
from ..card import Card, write_card

if TYPE_CHECKING:
    from .task import SeFiTask

WEIGHTS = "person.safetensors"


def export(task: SeFiTask, folder: Path, facts: Mapping[str, Any]) -> list[Path]:
    """Write a result folder; result.json, which makes it one, last."""
    folder.mkdir(parents=True, exist_ok=True)
    c = task.config
    weights = save_tokens(folder / WEIGHTS, task.person(), getattr(torch, c.result.dtype))
    written = [weights, *write_card(card_of(task, weights), c, folder, facts)]
    more = {"placeholder": c.person.placeholder, "class_word": c.person.class_word, "stages": c.words.stages}
    return [*written, Result("sefi-ide", WEIGHTS, c.model.base).write(folder, more)]


def card_of(task: SeFiTask, weights: Path) -> Card:
    """What SeFi-IDE says of a result."""
    c = task.config
    judge = getattr(task.validator, "judge", None)
    seen = "no recogniser" if judge is None else judge.measure.recogniser
    return Card(
        title=f"{c.person.placeholder}, a {c.person.class_word} in {c.words.stages} stages",
        summary="Words for one person, trained by `idcore train sefi-ide` after SeFi-IDE (Beyond Inserting, arXiv "
        "2402.00631): a pair for keys and values in each stage of the denoising.",
        base=c.model.base,
        tags=("sefi-ide", "textual-inversion", "identity"),
        rows={
            "base": task.base.name,
            "words": f"{2 * c.words.stages} of width {' + '.join(map(str, task.module.widths))}",
            "size": f"{weights.stat().st_size / 1024:.0f} KB, {c.result.dtype}",
            "attention loss": f"lambda {c.loss.attention:g}",
        },
        use=(
            f"idcore generate --base {c.model.base} --id RESULT/{WEIGHTS} --prompt \"a photo of {c.person.placeholder} "
            'in the snow" --out pictures',
        ),
        notes=f"In Python: `idcore.attach(pipe, None, load_tokens(\"{WEIGHTS}\"))`, and prompts that say "
        f"{c.person.placeholder}. diffusers' `load_textual_inversion` loads the file as plain words.",
        limits=f"Likeness is measured by {seen} against the very photos that were learned.",
        run="SeFi-IDE",
    )  # fmt: skip
