"""What the trainings of one person do alike: noise and prediction, the UNet's modes, drawing in between."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..bases.latent import LatentBase
from ..contract import Batch, Step, Text, Validation
from ..losses.diffusion import diffusion_loss


class Noised(NamedTuple):
    """Samples at their timesteps: clean [B, 4, h, w], the noise, both mixed, and the timesteps [B]."""

    latents: Tensor
    noise: Tensor
    x: Tensor
    t: Tensor


class PersonTask:
    """A training of one person, as `loop.train` wants it; subclasses say what is trained and what the losses are.

    Args:
        config: all settings.
        base: its modules are frozen, but for what the subclass trains.
        module: what is trained.
    """

    name = ""
    _checkpoint: Callable[..., Any] | None = None  # how blocks are computed again; None: as diffusers does

    def __init__(self, config: Any, base: LatentBase, module: nn.Module) -> None:
        self.config, self.base, self.module = config, base, module
        self.validator: Any = None
        self._logs: dict[str, float] = {}
        self._on = contextlib.ExitStack()
        self._put_on()

    def text(self, batch: Batch, t: Tensor) -> Text:
        """The samples' encoded prompts, at their timesteps [B]."""
        raise NotImplementedError

    def losses(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Terms by name."""
        at = self.noised(batch, step)
        prediction = self.base.predict(at.x, at.t, self.text(batch, at.t))
        terms = self.terms(batch, lambda rows: self.distance(prediction, at, rows))
        self._logs = {k: float(v.detach()) for k, v in terms.items()}
        return terms

    def noised(self, batch: Batch, step: Step) -> Noised:
        """The samples with the step's noise, at the step's timesteps."""
        base = self.base
        latents = base.encode_pictures(batch.pixels) if batch.latents is None else batch.latents.to(base.device)
        noise = step.normal("noise", batch.places, latents.shape[1:]).to(base.device)
        return Noised(latents, noise, *base.noised(latents, noise, step.uniform("time", batch.places).to(base.device)))

    def terms(self, batch: Batch, distance: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """The weighted terms; `distance` gives the mean loss of some of the samples, by their numbers."""
        return {"diffusion": distance(torch.arange(len(batch)))}

    def distance(self, prediction: Tensor, at: Noised, rows: Tensor | slice = slice(None)) -> Tensor:
        """The diffusion's mean loss of some of the samples, by their numbers."""
        base, c, t = self.base, self.config.loss, at.t[rows]
        return diffusion_loss(
            prediction[rows], base.target(at.latents, at.noise, at.t)[rows], norm=c.diffusion_norm, min_snr=c.min_snr,
            snr=None if c.min_snr is None else base.snr(t), parametrisation=base.prediction,
        )  # fmt: skip

    def logs(self) -> Mapping[str, float]:
        return self._logs

    def validate(self, step: Step) -> Validation:
        return Validation() if self.validator is None else self.validator(self)

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """The base's pipeline draws the person as learned so far, inside."""
        yield

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """There is none."""

    def export(self, folder: Path, facts: Mapping[str, Any]) -> list[Path]:
        """Write a result folder; result.json, which makes it one, last."""
        raise NotImplementedError

    def _put_on(self) -> None:
        """What of the loop's settings is about the UNet; `close` takes it off."""
        unet, loop = self.base.unet, self.config.loop
        if loop.gradient_checkpointing and not unet.is_gradient_checkpointing:
            unet.enable_gradient_checkpointing(self._checkpoint)
            self._on.callback(unet.disable_gradient_checkpointing)
        if loop.compile and unet._compiled_call_impl is None:
            unet.compile()
            self._on.callback(setattr, unet, "_compiled_call_impl", None)

    def close(self) -> None:
        """The base is as it was."""
        self._on.close()
