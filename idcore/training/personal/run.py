"""The run of a training of one person: photos, base, task, loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ...encoders.images import ImageLike
from ...errors import InputError
from ...workflows import writable_folder
from ..bases.latent import LatentBase
from ..bases.opening import open_text_base
from ..commands import Say, silent
from ..data.few import FewPictures, Group
from ..loop import train
from ..processes import device_of, rank_and_world
from ..resuming import finished
from .task import PersonTask
from .validation import Validator


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
    """Learn one person.

    Args:
        config: all settings, of a subclass of `OfOnePerson`.
        out: folder of the run.
        make_task: from the base.
        more_groups: further pictures, from the base, the edge of the pictures and the run's folder.
        command: for messages.
        images: photos (paths or PIL pictures) in the place of `config.person.images`.
        base: loaded already; must be on `processes.device_of(config.loop)`.
        resume, allow_change: see `loop.train`.
        say: gets lines of progress.

    Returns:
        OUT/model; the newest checkpoint's folder where `loop.stop_at` ended the run early.

    Raises:
        InputError: no photos, or settings that do not fit the base; and see `loop.train`.
        WeightsError: no such base.
    """
    out = writable_folder(Path(out))
    done = finished(out, resume)
    if done is not None:
        return done
    own = photos(config, images, command)
    base = base or open_text_base(config.model.base, dtype=config.dtype, device=device_of(config.loop))
    edge = config.model.resolution or native_edge(base)
    base.latent_shape(edge, edge)
    groups = [own, *more_groups(base, edge, out)]
    source = FewPictures(groups, edge, flip=config.person.flip).keep_latents(base)
    counts = source.state()["counts"]
    say(f"{', '.join(f'{name}: {n}' for name, n in counts.items())}; {edge} pixels, {base.name}")
    task = make_task(base)
    try:
        if config.loop.validate_every and rank_and_world()[0] == 0:
            task.validator = Validator(shown(own, edge), config, (edge, edge), judge(config))
        return train(task, source, config.loop, out, resume=resume, settings=config, allow_change=allow_change)
    finally:
        task.close()


def native_edge(base: LatentBase) -> int:
    """Edge of the pictures that a UNet was made for, in pixels."""
    size = base.unet.config.sample_size
    return base.cell * (size if isinstance(size, int) else size[0])


def shown(group: Group, edge: int) -> list[Image.Image]:
    """The photos as the training sees them, none mirrored."""
    from ..losses.faces import as_bytes

    source = FewPictures([group], edge)
    batch = next(iter(source.micro_batches(0, 0, 0, 1, len(source), 1)))
    return [Image.fromarray(a) for a in as_bytes(batch.pixels)]


def judge(config: Any) -> Any:
    """What compares faces; None where `validation.faces` is null."""
    from ...encoders.analyzer import EmbeddedAnalyzer, analyzer_from
    from ..pulid.validation import Judge

    v = config.validation
    if v.faces is None:
        return None
    return Judge("face", EmbeddedAnalyzer(min_score=v.min_score) if v.faces == "embedded" else analyzer_from(v.faces))
