"""DreamBooth (arXiv 2208.12242): a rare word and the class word bound to a person by training weights of the base.

LoRA by default, the whole UNet by `tune.weights=full`. Prior preservation (its section 3.2) by pictures of the class
that the frozen base draws first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...encoders.images import ImageLike
from ...errors import InputError
from ...lora_files import write_lora
from ...results import Result
from ..bases.latent import LatentBase
from ..card import Card, write_card
from ..commands import Say, silent
from ..contract import Batch, Text
from ..data.few import Group
from ..processes import rank_and_world
from ..tuning import Tuned
from .config import BoothConfig
from .run import run
from .task import PersonTask

WEIGHTS = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for
PIPELINE = "pipeline"
CLASS = "class"
CHUNK = 8  # class pictures that are drawn at once


class BoothTask(PersonTask):
    """Trained is what `config.tune` says; samples of group 0 are the person's, those of group 1 the class's.

    Args:
        config: all settings.
        base: what trains of it is put on here and, with LoRA, taken off by `close`.
    """

    name = "dreambooth"

    def __init__(self, config: BoothConfig, base: LatentBase) -> None:
        self.tuned = Tuned(base, config.tune, config.loop.seed)
        super().__init__(config, base, self.tuned.module)
        self._on.callback(self.tuned.remove)

    def text(self, batch: Batch, t: Tensor) -> Text:
        return self.tuned.text(batch.prompts, *batch.pixels.shape[-2:], batch.sizes)

    def terms(self, batch: Batch, distance: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """L = mean over the person's samples + weight x mean over the class's.

        Both groups have half of the samples; a micro batch with another mixture counts each of its samples as much.
        """
        weight = self.config.prior.weight
        if not weight:
            return {"person": distance(torch.arange(len(batch)))}
        group, terms = batch.extra["group"], {}
        for number, (name, factor) in enumerate((("person", 1.0), ("class", weight))):
            rows = torch.nonzero(group == number).flatten()
            if len(rows):
                terms[name] = factor * distance(rows) * (2 * len(rows) / len(batch))
        return terms

    def export(self, folder: Path, facts: Mapping[str, Any]) -> list[Path]:
        """The LoRA as diffusers writes it, or the whole pipeline; model card, result.json."""
        folder.mkdir(parents=True, exist_ok=True)
        c, who = self.config, self.config.person.placeholder
        if c.tune.weights == "lora":
            weights = write_lora(self.tuned.lora(), folder / WEIGHTS, "diffusers")
            base, notes = c.model.base, f"diffusers reads the file: `pipe.load_lora_weights({WEIGHTS!r})`."
            what = f"LoRA of rank {c.tune.rank}, {c.tune.layers} layers"
        else:
            weights = self.tuned.save_pipeline(folder / PIPELINE)
            base, notes, what = str(weights), "The folder is a whole pipeline in diffusers' layout.", "the whole UNet"
        card = Card(
            title=f"{who}",
            summary="One person, trained by `idcore train dreambooth` after DreamBooth (arXiv 2208.12242).",
            base=c.model.base,
            tags=("dreambooth", "lora" if c.tune.weights == "lora" else "full", "identity"),
            rows={
                "base": self.base.name, "trained": what + (", text encoders" if c.tune.text_encoder else ""),
                "prior preservation": f"weight {c.prior.weight:g}",
            },
            use=(drawing(c, "RESULT"),),
            notes=f"{notes} Prompts say `{who}`.",
            limits="Likeness is measured against the very photos that were learned.",
            run="DreamBooth",
        )  # fmt: skip
        written = [weights, *write_card(card, c, folder, facts)]
        more = {"placeholder": who, "class_word": c.person.class_word, "weights_of": base}
        return [*written, Result("dreambooth", weights.name, c.model.base).write(folder, more)]


def drawing(config: BoothConfig, result: str) -> str:
    """The command that draws the person of a result folder."""
    lora = f"--base {config.model.base} --style {result}/{WEIGHTS}"
    which = lora if config.tune.weights == "lora" else f"--base {result}/{PIPELINE}"
    return f'idcore generate {which} --prompt "a photo of {config.person.placeholder} in the snow" --out pictures'


def class_pictures(config: BoothConfig, base: LatentBase, edge: int, out: Path, say: Say = silent) -> Group:
    """Pictures of the class, drawn by the base as it is where they are missing; what stands there already is kept.

    Picture i comes from seed i of the run's seed, alone: several processes and stopped runs come to the same.

    Raises:
        InputError: `prior.pictures` is no folder.
    """
    prior = config.prior
    said = prior.prompt.replace("{class}", config.person.class_word)
    if prior.pictures is not None:
        if not Path(prior.pictures).is_dir():
            raise InputError(f"settings: prior.pictures is no folder: {prior.pictures}; null lets the base draw them")
        return Group(prior.pictures, prompts=(said,), name="class")
    folder = out / CLASS
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{i:04d}.png" for i in range(prior.count)]
    rank, world = rank_and_world()
    missing = [i for part in (range(rank, prior.count, world), range(prior.count)) for i in part]
    missing = [i for i in dict.fromkeys(missing) if not files[i].exists()]
    if missing:
        say(f"drawing {len(missing)} pictures of the class: {said}")
    for start in range(0, len(missing), CHUNK):
        part = [i for i in missing[start : start + CHUNK] if not files[i].exists()]
        for i, picture in zip(part, _drawn(config, base, said, edge, part)):
            staged = files[i].with_name(f".{files[i].name}.{os.getpid()}.part")
            picture.save(staged, "PNG")
            staged.replace(files[i])
    return Group(files, prompts=(said,), name="class")


@torch.no_grad()
def _drawn(config: BoothConfig, base: LatentBase, said: str, edge: int, numbers: Sequence[int]) -> list[Any]:
    if not numbers:
        return []
    pipe, prior = base.pipe, config.prior
    quiet = dict(getattr(pipe, "_progress_bar_config", None) or {})
    pipe.set_progress_bar_config(disable=True)
    try:
        return pipe(
            [said] * len(numbers), num_inference_steps=prior.steps, guidance_scale=prior.guidance, height=edge,
            width=edge, generator=[torch.Generator().manual_seed(config.loop.seed + i) for i in numbers],
        ).images  # fmt: skip
    finally:
        pipe.set_progress_bar_config(**quiet)


def train_dreambooth(
    config: BoothConfig,
    out: str | Path,
    *,
    images: Sequence[ImageLike] | None = None,
    base: LatentBase | None = None,
    resume: bool = False,
    allow_change: Sequence[str] = (),
    say: Say = silent,
) -> Path:
    """Bind a person to the identifier and the class word.

    Arguments and errors as `run.run`. Whole weights change a `base` given.

    Returns:
        OUT/model, with pytorch_lora_weights.safetensors, or pipeline/ where whole weights train.
    """

    def classes(found: LatentBase, edge: int, folder: Path) -> Sequence[Group]:
        return [class_pictures(config, found, edge, folder, say)] if config.prior.weight else []

    return run(
        config, out, lambda found: BoothTask(config, found), classes, command="dreambooth", images=images, base=base,
        resume=resume, allow_change=allow_change, say=say,
    )  # fmt: skip
