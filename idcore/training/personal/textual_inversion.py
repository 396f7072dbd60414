"""Textual inversion (arXiv 2208.01618): a few words' embeddings are all that is learned of a person."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...encoders.images import ImageLike
from ...identity import Identity
from ...results import Result
from ...systems.sefi_ide import class_word_embeddings
from ...systems.words import words_in
from ...text.inversion import write_words
from ..bases.latent import LatentBase
from ..card import Card, write_card
from ..commands import Say, silent
from ..contract import Batch, Text
from .config import InversionConfig
from .run import run
from .task import PersonTask

WEIGHTS = "learned_embeds.safetensors"
SPREAD = 0.1  # of the words beyond the first, in units of the class word's deviation: they must differ (our choice)


class LearnedWords(nn.Module):
    """k words [k, E] for each text encoder, float32; the first begins as the class word.

    Args:
        start: the class word's embedding [E] in each text encoder.
        count: k.
        seed: of what the others differ from it.
    """

    def __init__(self, start: Sequence[Tensor], count: int, seed: int = 0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        rows = []
        for e in start:
            noise = torch.randn(count, len(e), generator=g) * float(e.std()) * SPREAD
            noise[0] = 0
            rows.append(nn.Parameter(e.float()[None] + noise))
        self.vectors = nn.ParameterList(rows)

    @property
    def widths(self) -> list[int]:
        return [v.shape[-1] for v in self.vectors]


class InversionTask(PersonTask):
    """Trained are the words; UNet, text encoders and autoencoder are frozen.

    Args:
        config: all settings.
        base: frozen model.
    """

    name = "textual-inversion"

    def __init__(self, config: InversionConfig, base: LatentBase) -> None:
        start = class_word_embeddings(base.pipe, config.person.class_word)
        super().__init__(config, base, LearnedWords(start, config.person.words, config.loop.seed).to(base.device))

    def text(self, batch: Batch, t: Tensor) -> Text:
        person = self.config.person
        rows = [v.to(self.base.dtype)[None] for v in self.module.vectors]
        with words_in(self.base.pipe, {person.placeholder: rows}, person.class_word):
            return self.base.text_live(batch.prompts, *batch.pixels.shape[-2:], batch.sizes)

    def tokens(self) -> Tensor:
        """The words as they are now [k, sum of E], float32 on the CPU."""
        return torch.cat([v.detach().float().cpu() for v in self.module.vectors], -1)

    def person(self) -> Identity:
        """For `idcore.attach(pipe, None, person)`."""
        meta = {"placeholder": self.config.person.placeholder, "widths": self.module.widths}
        return Identity(self.tokens()[None], None, "words", meta)

    @contextlib.contextmanager
    def drawing(self) -> Iterator[Any]:
        from ...attach import attach

        with attach(self.base.pipe, None, self.person()) as handle:
            yield handle

    def export(self, folder: Path, facts: Mapping[str, Any]) -> list[Path]:
        """learned_embeds.safetensors in diffusers' form, the model card, result.json."""
        folder.mkdir(parents=True, exist_ok=True)
        c, person = self.config, self.config.person
        weights = write_words(folder / WEIGHTS, self.tokens(), self.module.widths, person.placeholder)
        card = Card(
            title=f"{person.placeholder}, a {person.class_word}",
            summary="Words for one person, trained by `idcore train textual-inversion` after textual inversion (arXiv "
            "2208.01618).",
            base=c.model.base,
            tags=("textual-inversion", "identity"),
            rows={
                "base": self.base.name,
                "words": f"{person.words} of width {' + '.join(map(str, self.module.widths))}",
            },
            use=(drawing(c, "RESULT"),),
            notes=f"diffusers reads the file: `pipe.load_textual_inversion({WEIGHTS!r})`.",
            limits="Likeness is measured against the very photos that were learned.",
            run="textual inversion",
        )
        written = [weights, *write_card(card, c, folder, facts)]
        more = {"placeholder": person.placeholder, "class_word": person.class_word}
        return [*written, Result("words", WEIGHTS, c.model.base).write(folder, more)]


def drawing(config: InversionConfig, result: str) -> str:
    """The command that draws the person of a result folder."""
    said = f'--prompt "a photo of {config.person.placeholder} in the snow" --out pictures'
    return f"idcore generate --base {config.model.base} --id {result}/{WEIGHTS} {said}"


def train_textual_inversion(
    config: InversionConfig,
    out: str | Path,
    *,
    images: Sequence[ImageLike] | None = None,
    base: LatentBase | None = None,
    resume: bool = False,
    allow_change: Sequence[str] = (),
    say: Say = silent,
) -> Path:
    """Learn one person's words. Arguments and errors as `run.run`.

    Returns:
        OUT/model, with learned_embeds.safetensors; the newest checkpoint's folder where `loop.stop_at` ended the run
        early.
    """
    return run(
        config, out, lambda found: InversionTask(config, found), command="textual-inversion", images=images, base=base,
        resume=resume, allow_change=allow_change, say=say,
    )  # fmt: skip
