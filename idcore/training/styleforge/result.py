"""What a style's training leaves.

RESULT/styleforge.safetensors        the LoRA in the first layout of result.layouts, its words in the metadata
RESULT/styleforge_kohya.safetensors  and in the others (peft: a folder)
RESULT/pipeline/                     with whole weights: the pipeline in diffusers' layout
RESULT/result.json, README.md, curves.png
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...lora_files import write_lora
from ...results import Result
from ..bases.sdxl import SDXLBase
from ..card import Card, write_card
from ..state import load_module

if TYPE_CHECKING:
    from .task import StyleForgeTask

WEIGHTS = "styleforge.safetensors"


def export(task: StyleForgeTask, folder: Path, facts: Mapping[str, Any]) -> list[Path]:
    """Write a result folder from the best weights; the module holds them afterwards. result.json comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    best = None if task.search is None else task.search.best()
    if best is not None:
        load_module(task.module, task.search.best_weights(), "best weights")  # FSDP refuses load_state_dict here
    written = _weights(task, folder)
    step = facts.get("steps") if best is None else best
    written += write_card(_card(task, step), task.config, folder, facts)
    more = {"words": vars(task.words), "step": step, "sets": [name for name, _ in task.sets]}
    return [*written, Result("styleforge", written[0].name, task.config.model.base).write(folder, more)]


def _weights(task: StyleForgeTask, folder: Path) -> list[Path]:
    if task.config.tune.weights == "full":
        return [task.tuned.save_pipeline(folder / "pipeline")]
    lora, family = task.tuned.lora(), _family(task)
    first, *others = task.config.result.layouts
    names = {first: "styleforge" if first == "peft" else WEIGHTS}
    names |= {o: "styleforge_peft" if o == "peft" else f"styleforge_{o}.safetensors" for o in others}
    return [
        write_lora(lora, folder / name, layout, family=family, metadata=task.words.metadata())
        for layout, name in names.items()
    ]


def _family(task: StyleForgeTask) -> str:
    """Of kohya's names, where the width of the text does not tell it (small models)."""
    return task.tuned.lora().family() or ("sdxl" if isinstance(task.base, SDXLBase) else "sd15")


def _card(task: StyleForgeTask, step: Any) -> Card:
    c, words = task.config, task.words
    full = c.tune.weights == "full"
    prompt = words.person("a man in a garden")
    use = f"--base RESULT/pipeline --prompt {prompt!r}" if full else f"--style RESULT --prompt {prompt!r}"
    on = "" if full else f" --base {c.model.base}"
    multi = (
        f" Backgrounds: {words.place('a mountain lake')!r}; both: "
        f"{words.both('a man', 'a mountain lake')!r}, or two prompts, inside and outside of the person's mask."
        if words.background
        else ""
    )
    return Card(
        title=("Multi-" if words.background else "") + "StyleForge",
        summary="A style trained by `idcore train styleforge` after StyleForge (arXiv 2404.05256): "
        + ", ".join(f"{name} * {weight:g}" for name, weight in task.sets) + ".",
        base=c.model.base,
        tags=("styleforge", "style", *([] if full else ["lora"])),
        rows={
            "base": task.base.name, "trained": "whole UNet" if full else f"LoRA of rank {c.tune.rank}, {c.tune.layers}",
            "text encoder": "trained" if c.tune.text_encoder else "frozen", "step": str(step),
        },
        use=(f"idcore generate {use}{on} --out pictures",),
        notes=f"Prompts say {words.style!r}.{multi}",
        limits="Style scores of the step search compare runs of this project with each other alone. Training on the "
        "works of living artists wants their consent.",
    )  # fmt: skip
