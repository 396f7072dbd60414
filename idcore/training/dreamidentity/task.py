"""DreamIdentity's losses (arXiv 2307.00300): the diffusion loss of both sources, through the frozen text encoders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ...systems.dreamidentity import DreamIdentity, words_penalty
from ...systems.words import words_in
from ...text.placeholders import mentions
from ..bases.latent import LatentBase
from ..contract import Batch, Step, Text, Validation
from ..losses.diffusion import diffusion_loss
from .config import DreamIdentityTrainConfig

SOURCES = ("reconstruction", "editability")


class DreamIdentityTask:
    """See `contract.Task`. Trained is the encoder (or its MLPs alone); UNet and text encoders are frozen.

    A batch holds the faces that the encoder reads, `face["crop"]` [B, 3, S, S], prompts with the placeholder, and the
    pictures that the model shall draw: the same ones (reconstruction), or edited ones (editability).

    Args:
        system: the encoder, on the base's device.
        config: all settings.
        base: the frozen model.
        validator: draws and measures in between; None: nothing is.
    """

    name = "dreamidentity"

    def __init__(
        self, system: DreamIdentity, config: DreamIdentityTrainConfig, base: LatentBase, validator: Any = None
    ) -> None:
        self.module, self.config, self.base, self.validator = system, config, base, validator
        system.train().requires_grad_(True)
        if config.encoder.trains == "heads":
            system.vit.requires_grad_(False)
        unet, loop = base.unet, config.loop
        self._checkpointing = loop.gradient_checkpointing and not unet.is_gradient_checkpointing
        if self._checkpointing:
            unet.enable_gradient_checkpointing()
        self._logs: dict[str, float] = {}

    def losses(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Terms "diffusion" and "penalty"."""
        base, c = self.base, self.config.loss
        words = self.module(batch.face["crop"].to(base.device))
        latents = base.encode_pictures(batch.pixels) if batch.latents is None else batch.latents.to(base.device)
        noise = step.normal("noise", batch.places, latents.shape[1:]).to(base.device)
        x, t = base.noised(latents, noise, step.uniform("time", batch.places).to(base.device))
        prediction, target = base.predict(x, t, self.text(batch, words)), base.target(latents, noise, t)
        loss = diffusion_loss(
            prediction, target, min_snr=c.min_snr, snr=None if c.min_snr is None else base.snr(t),
            parametrisation=base.prediction,
        )  # fmt: skip
        self._log(batch, prediction, target, words)
        return {"diffusion": loss, "penalty": words_penalty(words, c.penalty)}

    def text(self, batch: Batch, words: Tensor) -> Text:
        """The samples' prompts with their words [B, k, E], with gradients into the words.

        Raises:
            InputError: a prompt without the placeholder.
        """
        name = self.config.people.placeholder
        silent = [f"{p!r} ({i})" for i, p in zip(batch.ids, batch.prompts) if not mentions(p, [name])]
        if silent:
            raise InputError(f"train dreamidentity: prompts must hold the placeholder {name}, {silent[0]} does not")
        parts = tuple(w.to(self.base.dtype) for w in words.split(list(self.module.config.widths), -1))
        with words_in(self.base.pipe, {name: parts}):
            return self.base.text_live(batch.prompts, *batch.pixels.shape[-2:], batch.sizes)

    def _log(self, batch: Batch, prediction: Tensor, target: Tensor, words: Tensor) -> None:
        each = (prediction.detach().float() - target.float()).square().flatten(1).mean(1).cpu()
        group = batch.extra.get("group", torch.zeros(len(batch), dtype=torch.int64))
        self._logs = {n: float(each[group == i].mean()) for i, n in enumerate(SOURCES) if bool((group == i).any())}
        self._logs["largest_word"] = float(words.detach().abs().max())

    def logs(self) -> Mapping[str, float]:
        return self._logs

    def validate(self, step: Step) -> Validation:
        if self.validator is None:
            return Validation()
        self.module.eval()
        try:
            return self.validator(self.module, self.base)
        finally:
            self.module.train()

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """There is none."""

    def export(self, folder: Path, facts: Mapping[str, Any]) -> list[Path]:
        """See `result.export`."""
        from .result import export

        return export(self, folder, facts)

    def close(self) -> None:
        """The base is as it was."""
        if self._checkpointing:
            self.base.unet.disable_gradient_checkpointing()
