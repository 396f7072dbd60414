"""`idcore train styleforge`, callable from Python: pictures, base, training, resumable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import InputError
from ...workflows import writable_folder
from ..bases.latent import LatentBase
from ..bases.opening import analyzer_for, open_text_base
from ..commands import silent
from ..data.few import FewPictures, Group, Pictures
from ..data.style_ref import check_style_ref
from ..loop import train
from ..processes import device_of
from ..resuming import finished
from ..tuning import Tuned
from .config import StyleForgeConfig
from .search import StepSearch
from .task import StyleForgeTask


@dataclass(frozen=True, eq=False)
class StyleData:
    """Pictures of a style: StyleRef mixed (Single-StyleForge), or people and backgrounds apart (Multi-StyleForge); and
    Aux images, portraits in digital painting. Folders, files, or sequences of paths and PIL pictures."""

    style_ref: Pictures | None = None
    aux: Pictures | None = None
    people: Pictures | None = None
    backgrounds: Pictures | None = None

    @property
    def multi(self) -> bool:
        return self.people is not None or self.backgrounds is not None

    def check(self, config: StyleForgeConfig) -> None:
        """Raise InputError for sets that do not go together."""
        if self.multi and self.style_ref is not None:
            raise InputError(
                "train styleforge: give --style-ref (one word for all), or --people and --backgrounds (a word each), "
                "not both; --multi splits --style-ref by itself"
            )
        if self.multi and (self.people is None or self.backgrounds is None):
            missing = "--people" if self.people is None else "--backgrounds"
            raise InputError(
                f"train styleforge: Multi-StyleForge needs --people and --backgrounds; {missing} is missing"
            )
        if not self.multi and self.style_ref is None:
            raise InputError("train styleforge: --style-ref FOLDER is missing; see idcore train styleforge --help")
        if config.loss.aux and self.aux is None:
            raise InputError(
                "train styleforge: --aux FOLDER is missing: 15 to 20 portraits in digital painting, not drawn by the "
                "model (arXiv 2404.05256); without it the style binds worse: --set loss.aux=0 trains so"
            )


def train_styleforge(
    config: StyleForgeConfig,
    data: StyleData,
    out: str | Path,
    *,
    base: LatentBase | None = None,
    resume: bool = False,
    allow_change: Sequence[str] = (),
    say: Callable[[str], None] = silent,
) -> Path:
    """Train one style.

    Args:
        config: all settings.
        data: the pictures.
        out: folder of the run.
        base: the base model where it is loaded already (then `model.base` is its name alone). A LoRA is taken off
            again; whole weights stay as they were trained.
        resume, allow_change: see `loop.train`.

    Returns:
        The result, OUT/model; or the newest checkpoint's folder where `loop.stop_at` ended the run early.

    Raises:
        InputError, WeightsError, TrainingStopped: see `loop.train`; pictures that are missing or cannot be read.
    """
    data.check(config)
    out = writable_folder(Path(out))
    done = finished(out, resume)
    if done is not None:
        say(f"done already: {done}")
        return done
    if config.pictures.mix:
        check_mix(config, data, say)
    if base is None:
        dtype, device = getattr(torch, config.model.dtype), device_of(config.loop)
        base = open_text_base(config.model.base, dtype=dtype, device=device)
    sets, source = open_pictures(config, data, base)
    words = config.style_words(data.multi)
    search = None
    if config.loop.validate_every:
        shown = [p for i, (name, _) in enumerate(sets) if name != "aux" for p in source.pictures(i)]
        search = StepSearch(base, config.search, words, shown, config.model.resolution, out / "search")
    with Tuned(base, config.tune, config.loop.seed) as tuned:
        if config.loop.gradient_checkpointing:
            base.unet.enable_gradient_checkpointing()
        task = StyleForgeTask(tuned, config, sets, source.shares, words, search)
        try:
            return train(
                task, source, config.loop, out, resume=resume, settings=config, allow_change=allow_change,
                facts={"sets": dict(zip([n for n, _ in sets], map(len, source.groups)))},
            )  # fmt: skip
        finally:
            base.unet.disable_gradient_checkpointing()


def open_pictures(
    config: StyleForgeConfig, data: StyleData, base: LatentBase
) -> tuple[list[tuple[str, float]], FewPictures]:
    """(name and weight of each set, the source). Without weight on Aux images there is no such set."""
    w, c = config.words, config.loss
    style = 1 - config.pictures.aux_share if c.aux else 1.0
    if data.multi:
        parts = [("people", data.people, w.style, 0.5), ("backgrounds", data.backgrounds, w.background, 0.5)]
    else:
        parts = [("style", data.style_ref, w.style, 1.0)]
    sets = [(name, c.style * part) for name, _, _, part in parts]
    groups = [Group(pictures, prompts, share=style * part, name=name) for name, pictures, prompts, part in parts]
    if c.aux:
        sets.append(("aux", c.aux))
        groups.append(Group(data.aux, w.aux, share=config.pictures.aux_share, name="aux"))
    size = config.model.resolution
    base.latent_shape(size, size)
    source = FewPictures(groups, size, flip=config.pictures.flip, crop=config.pictures.crop)
    if config.pictures.keep_latents and config.pictures.crop == "centre":
        source.keep_latents(base)
    return sets, source


def check_mix(config: StyleForgeConfig, data: StyleData, say: Callable[[str], None]) -> None:
    """Say what the face detector thinks of the mix of people and backgrounds; only pictures on disk are looked at."""
    analyzer = face_finder(config)
    if data.style_ref is not None and _on_disk(data.style_ref):
        say(str(check_style_ref(data.style_ref, analyzer)))
        return
    for name, pictures, wanted in (("people", data.people, True), ("backgrounds", data.backgrounds, False)):
        if pictures is None or not _on_disk(pictures):
            continue
        mix = check_style_ref(pictures, analyzer)
        odd = mix.backgrounds if wanted else mix.people
        if odd:
            what = "no face is found in" if wanted else "a face is found in"
            say(f"warning: --{name}: {what} {len(odd)}, such as {odd[0].name}")


def split_style_ref(config: StyleForgeConfig, data: StyleData, say: Callable[[str], None]) -> StyleData:
    """StyleRef images as two sets, by whether the detector finds a face. Raises InputError where one would be empty."""
    if data.style_ref is None or not _on_disk(data.style_ref):
        raise InputError("train styleforge: --multi splits the folder of --style-ref; it is missing")
    mix = check_style_ref(data.style_ref, face_finder(config))
    say(str(mix))
    if not mix.people or not mix.backgrounds:
        raise InputError(
            f"train styleforge: --multi found {len(mix.people)} pictures with people, {len(mix.backgrounds)} "
            f"without in {data.style_ref}; wanted both. Sort them yourself: --people FOLDER --backgrounds FOLDER"
        )
    return StyleData(None, data.aux, mix.people, mix.backgrounds)


def face_finder(config: StyleForgeConfig) -> Any:
    """Who looks for faces; drawn ones are found at a lower score."""
    return analyzer_for(config.pictures.faces, config.model.base)


def _on_disk(pictures: Pictures) -> bool:
    return isinstance(pictures, (str, Path)) or all(isinstance(p, (str, Path)) for p in pictures)
