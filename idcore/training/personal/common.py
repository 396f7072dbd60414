"""What textual inversion and DreamBooth do alike: noise and prediction, drawing in between, the frame of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...encoders.images import ImageLike
from ...errors import InputError
from ...results import is_result
from ...workflows import writable_folder
from ..bases.latent import LatentBase
from ..bases.opening import open_text_base
from ..commands import silent
from ..contract import Batch, Step, Text, Validation
from ..data.few import FewPictures, Group
from ..loop import RESULT, train
from ..losses.diffusion import diffusion_loss
from ..processes import device_of, rank_and_world
from ..sefi_ide.run import judge, native_edge
from ..sefi_ide.validation import Validator

Say = Callable[[str], None]


class PersonTask:
    """A training of one person, as `loop.train` wants it; subclasses say what is trained and what the losses are.

    Args:
        config: all settings.
        base: its modules are frozen, but for what the subclass trains.
        module: what is trained.
    """

    name = ""

    def __init__(self, config: Any, base: LatentBase, module: nn.Module) -> None:
        self.config, self.base, self.module = config, base, module
        self.validator: Validator | None = None
        self._logs: dict[str, float] = {}
        self._on = contextlib.ExitStack()
        unet, loop = base.unet, config.loop
        if loop.gradient_checkpointing and not unet.is_gradient_checkpointing:
            unet.enable_gradient_checkpointing()
            self._on.callback(unet.disable_gradient_checkpointing)
        if loop.compile and unet._compiled_call_impl is None:
            unet.compile()
            self._on.callback(setattr, unet, "_compiled_call_impl", None)

    def text(self, batch: Batch) -> Text:
        """The samples' encoded prompts."""
        raise NotImplementedError

    def losses(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Terms by name."""
        base = self.base
        latents = base.encode_pictures(batch.pixels) if batch.latents is None else batch.latents.to(base.device)
        noise = step.normal("noise", batch.places, latents.shape[1:]).to(base.device)
        x, t = base.noised(latents, noise, step.uniform("time", batch.places).to(base.device))
        prediction, target = base.predict(x, t, self.text(batch)), base.target(latents, noise, t)
        terms = self.terms(batch, lambda rows: self._distance(prediction[rows], target[rows], t[rows]))
        self._logs = {k: float(v.detach()) for k, v in terms.items()}
        return terms

    def terms(self, batch: Batch, distance: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """The weighted terms; `distance` gives the mean loss of some of the samples, by their numbers."""
        return {"diffusion": distance(torch.arange(len(batch)))}

    def _distance(self, prediction: Tensor, target: Tensor, t: Tensor) -> Tensor:
        c = self.config.loss
        return diffusion_loss(
            prediction, target, norm=c.diffusion_norm, min_snr=c.min_snr,
            snr=None if c.min_snr is None else self.base.snr(t), parametrisation=self.base.prediction,
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

    def close(self) -> None:
        """The base is as it was."""
        self._on.close()


def photos(config: Any, images: Sequence[ImageLike] | None, command: str) -> Group:
    """The photos with the training's prompts. Raises InputError where there are none."""
    given = config.person.images if images is None else images
    if not given:
        raise InputError(f"train {command}: no photo; give --images PHOTO, several of them, or a folder")
    pictures = given[0] if len(given) == 1 and isinstance(given[0], (str, Path)) else given
    return Group(pictures, prompts=config.texts(config.person.prompts), name="photos")


def run(
    config: Any,
    out: str | Path,
    make_task: Callable[[LatentBase], PersonTask],
    more_groups: Callable[[LatentBase, int, Path], Sequence[Group]] = lambda base, edge, out: (),
    *,
    command: str,
    images: Sequence[ImageLike] | None = None,
    base: LatentBase | None = None,
    resume: bool = False,
    allow_change: Sequence[str] = (),
    say: Say = silent,
) -> Path:
    """Photos, base, task, loop. Arguments and errors as `textual_inversion.train_textual_inversion`.

    Args:
        make_task: from the base.
        more_groups: further pictures, from the base, the edge of the pictures and the run's folder.
        command: for messages.
    """
    out = writable_folder(Path(out))
    if is_result(out / RESULT):
        if not resume:
            raise InputError(f"{out} holds a finished training already; add --resume, or choose another --out")
        return out / RESULT
    own = photos(config, images, command)
    base = base or open_text_base(config.model.base, dtype=config.dtype, device=device_of(config.loop))
    edge = config.model.resolution or native_edge(base)
    base.latent_shape(edge, edge)
    groups = [own, *more_groups(base, edge, out)]
    source = FewPictures(groups, edge, flip=config.person.flip).keep_latents(base)
    say(f"{', '.join(f'{n} {k}' for k, n in source.state()['counts'].items())} at {edge} pixels, {base.name}")
    task = make_task(base)
    try:
        if config.loop.validate_every and rank_and_world()[0] == 0:
            task.validator = Validator(_shown(own, edge), config, (edge, edge), judge(config))
        return train(task, source, config.loop, out, resume=resume, settings=config, allow_change=allow_change)
    finally:
        task.close()


def _shown(group: Group, edge: int) -> list[Any]:
    """The photos as the training sees them."""
    from PIL import Image

    from ..losses.faces import as_bytes

    source = FewPictures([group], edge)
    batch = next(iter(source.micro_batches(0, 0, 0, 1, len(source), 1)))
    return [Image.fromarray(a) for a in as_bytes(batch.pixels)]
