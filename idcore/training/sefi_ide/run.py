"""`idcore train sefi-ide`, callable from Python: photos of one person to words in a few KB."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from ...encoders.images import ImageLike
from ...errors import InputError
from ...results import is_result
from ...workflows import writable_folder
from ..bases.latent import LatentBase
from ..bases.opening import open_text_base
from ..commands import silent
from ..data.few import FewPictures, Group
from ..loop import train
from ..processes import device_of, rank_and_world
from .config import SeFiTrainConfig
from .task import SeFiTask
from .validation import Validator

RESULT = "model"


def train_sefi_ide(
    config: SeFiTrainConfig,
    out: str | Path,
    *,
    images: Sequence[ImageLike] | None = None,
    base: LatentBase | None = None,
    resume: bool = False,
    allow_change: Sequence[str] = (),
    say: Any = silent,
) -> Path:
    """Learn one person.

    Args:
        config: all settings; `config.load_config` has the defaults of the base.
        out: folder of the run.
        images: photos (paths or PIL pictures) in the place of `config.person.images`.
        base: loaded already; must be on `processes.device_of(config.loop)`.
        resume, allow_change: see `loop.train`.
        say: gets lines of progress.

    Returns:
        OUT/model, with person.safetensors (read by `systems.sefi_files.load_tokens`); the newest checkpoint's folder
        where `loop.stop_at` ended the run early.

    Raises:
        InputError: no photos, or settings that do not fit the base; and see `loop.train`.
        WeightsError: no such base.
    """
    out = writable_folder(Path(out))
    if is_result(out / RESULT):
        if not resume:
            raise InputError(f"{out} holds a finished training already; add --resume, or choose another --out")
        return out / RESULT
    base = base or open_text_base(config.model.base, dtype=config.dtype, device=device_of(config.loop))
    edge = config.model.resolution or native_edge(base)
    base.latent_shape(edge, edge)
    source = photos(config, edge, images).keep_latents(base)
    say(f"{len(source)} photo{'s' * (len(source) > 1)} at {edge} pixels, {config.words.stages} stages, {base.name}")
    task = SeFiTask(config, base)
    if config.loop.validate_every and rank_and_world()[0] == 0:
        task.validator = Validator(shown(config, edge, images), config, (edge, edge), judge(config))
    try:
        return train(task, source, config.loop, out, resume=resume, settings=config, allow_change=allow_change)
    finally:
        task.close()


def native_edge(base: LatentBase) -> int:
    """Edge of the pictures that a UNet was made for, in pixels."""
    size = base.unet.config.sample_size
    return base.cell * (size if isinstance(size, int) else size[0])


def photos(config: SeFiTrainConfig, edge: int, images: Sequence[ImageLike] | None = None) -> FewPictures:
    """The photos with the training's prompts.

    Raises:
        InputError: none, or some that cannot be read.
    """
    person = config.person
    given = person.images if images is None else images
    if not given:
        raise InputError("train sefi-ide: no photo; give --images PHOTO, several of them, or a folder")
    pictures = given[0] if len(given) == 1 and isinstance(given[0], (str, Path)) else given
    group = Group(pictures, prompts=config.texts(person.prompts), name="photos")
    return FewPictures([group], edge, flip=person.flip)


def shown(config: SeFiTrainConfig, edge: int, images: Sequence[ImageLike] | None = None) -> list[Image.Image]:
    """The photos as the training sees them, none mirrored."""
    from ..losses.faces import as_bytes

    source = photos(replace(config, person=replace(config.person, flip=0.0)), edge, images)
    batch = next(iter(source.micro_batches(0, 0, 0, 1, len(source), 1)))
    return [Image.fromarray(a) for a in as_bytes(batch.pixels)]


def judge(config: SeFiTrainConfig) -> Any:
    """What compares faces; None where `validation.faces` is null."""
    from ...encoders.analyzer import EmbeddedAnalyzer, analyzer_from
    from ..pulid.validation import Judge

    v = config.validation
    if v.faces is None:
        return None
    return Judge("face", EmbeddedAnalyzer(min_score=v.min_score) if v.faces == "embedded" else analyzer_from(v.faces))
