"""SeFi-IDE's losses (arXiv 2402.00631): the diffusion's, and the attention loss beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...attention.stack import stack_of
from ...attention.staged import AttentionLoss, joined_text
from ...identity import Identity
from ...systems.sefi_ide import SeFiTokens, check_aligned, class_word_embeddings, staged_unet, watching
from ...systems.words import words_in
from ...text.placeholders import replaced
from ..bases.latent import LatentBase
from ..contract import Batch, Step, Text
from ..personal.task import PersonTask
from .config import SeFiTrainConfig
from .counted import counted_tokens


class SeFiTask(PersonTask):
    """Trained are the expanders alone, one per text encoder; UNet, text encoders and autoencoder are frozen.

    Args:
        config: all settings.
        base: frozen model; its UNet reads staged text until `close`.

    Raises:
        InputError: a class word of several tokens together with the attention loss; words that the base cannot read.
    """

    name = "sefi-ide"

    def __init__(self, config: SeFiTrainConfig, base: LatentBase) -> None:
        person, words = config.person, config.words
        if config.loss.attention:
            check_aligned(base.pipe, person.placeholder, person.class_word)
        start = class_word_embeddings(base.pipe, person.class_word)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.loop.seed)
            module = SeFiTokens(
                start, words.stages, heads=words.heads, head_dim=words.head_dim, dropout=words.dropout,
                residual=words.residual,
            ).to(base.device)  # fmt: skip
        super().__init__(config, base, module)

    def losses(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Terms "diffusion" and, with a weight above 0, "attention"."""
        base, c = self.base, self.config.loss
        at = self.noised(batch, step)
        with self._dropping(step):
            text = self.text(batch, at.t)
        loss = None
        if c.attention:
            loss = AttentionLoss(
                base.unet, self.staged, text.embeds, layers=c.attention_layers or None, form=c.attention_form,
                tokens=counted_tokens(base.pipe, batch.prompts, self.config.person, c.attention_tokens),
                weight=c.attention,
            )  # fmt: skip
        with watching(base.unet, loss) if loss is not None else contextlib.nullcontext():
            prediction = base.predict(at.x, at.t, text)
        diffusion = self.distance(prediction, at)
        self._logs = {"diffusion": float(diffusion.detach())}
        if loss is None:
            return {"diffusion": diffusion}
        attention = loss.total()
        self._logs["attention"] = float(attention.detach()) / c.attention
        return {"diffusion": diffusion, "attention": attention}

    @contextlib.contextmanager
    def _dropping(self, step: Step) -> Iterator[None]:
        """What dropout leaves out hangs on the step alone: the same in all processes and micro batches, which share
        the words."""
        device = self.base.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(step.choice("dropout", 2**62))
            yield

    def text(self, batch: Batch, t: Tensor) -> Text:
        """Wide text [B, L, 3 E] of the samples at their timesteps' stages, with gradients into the words.

        The reference, which stands first, and SDXL's pooled text are those of the prompts with the class word.
        """
        base, person = self.base, self.config.person
        height, width = batch.pixels.shape[-2:]
        self.staged.begin(t, base.device)
        stage = self.staged.stage.long().expand(len(batch))
        plain = [replaced(p, {person.placeholder: person.class_word}) for p in batch.prompts]
        reference = base.text(plain, height, width, batch.sizes)
        words = [w.to(base.dtype) for w in self.module()]  # [S, 2, E] of each text encoder
        sides = []
        for side in (0, 1):
            rows = tuple(w[stage, side][:, None] for w in words)
            with words_in(base.pipe, {person.placeholder: rows}, person.class_word):
                sides.append(base.text_live(batch.prompts, height, width, batch.sizes).embeds)
        return Text(joined_text(reference.embeds, sides[:1], sides[1:]), reference.pooled, reference.extra)

    def export(self, folder: Path, facts: Mapping[str, Any]) -> list[Path]:
        """The words, the result's settings, and the model card; see `result.export`."""
        from .result import export

        return export(self, folder, facts)

    def person(self) -> Identity:
        """For `idcore.attach`, and for files."""
        person = self.config.person
        return self.module.identity(person.class_word, person.placeholder, self.base.name)

    @contextlib.contextmanager
    def drawing(self) -> Iterator[Any]:
        """The base's pipeline with the person as it is now, as users have it; None trains meanwhile."""
        from ...attach import attach

        self._on.close()
        try:
            with attach(self.base.pipe, None, self.person()) as handle:
                yield handle
        finally:
            self._put_on()

    def _put_on(self) -> None:
        """Staged text on the UNet, and what of the loop's settings is about it."""
        self.staged = self._on.enter_context(staged_unet(self.base.unet, self.config.words.stages))
        super()._put_on()

    def _checkpoint(self, block: Callable[..., Any], *args: Any) -> Any:
        """What backward computes again sees the attention loss of its own forward."""
        stack = stack_of(self.base.unet)
        tap = stack.tap

        def run(*given: Any) -> Any:
            before, stack.tap = stack.tap, tap
            try:
                return block(*given)
            finally:
                stack.tap = before

        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)
