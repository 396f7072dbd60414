"""`idcore train dreamidentity`, callable from Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ... import prompts
from ...encoders.face_vit import FaceViT
from ...errors import InputError, WeightsError
from ...systems.dreamidentity import DreamIdentity
from ...text.names import name_statistics
from ...text.reader import text_parts
from ...weights import read_safetensors
from ...workflows import writable_folder
from ..bases.latent import LatentBase
from ..bases.opening import analyzer_for, open_text_base
from ..commands import Say, TrainArguments, run_training, silent
from ..face_vit.run import load_vit
from ..loop import train
from ..processes import device_of, rank_and_world
from ..pulid.validation import Judge
from ..resuming import finished
from .config import EMBEDDED, TINY_SD, DreamIdentityTrainConfig, load_config
from .data import guests_of, open_data
from .task import DreamIdentityTask
from .validation import Validator

PACKAGED_VIT = Path(__file__).resolve().parents[2] / "assets" / "face_vit" / "face_vit.safetensors"


def train_dreamidentity(
    config: DreamIdentityTrainConfig,
    data: str | Path | None,
    pairs: str | Path | None,
    out: str | Path,
    *,
    base: LatentBase | None = None,
    resume: bool = False,
    allow_change: Sequence[str] = (),
    say: Say = silent,
) -> Path:
    """Train an encoder of faces to words.

    Args:
        config: all settings.
        data: faces for reconstruction: pictures, a folder of `idcore prepare`, or "drawn"; None where the pairs' share
            (`people.editability`) is 1.
        pairs: folder of `idcore augment`; None where their share is 0.
        out: folder of the run.
        base: the frozen model; None: `model.base` is opened.
        resume, allow_change: see `loop.train`.
        say: gets lines about data and models.

    Returns:
        OUT/model; or the newest checkpoint's folder where `loop.stop_at` ended the run early.

    Raises:
        InputError, WeightsError, TrainingStopped: see `loop.train`.
    """
    out = writable_folder(Path(out))
    done = finished(out, resume)
    if done is not None:
        return done
    if config.loop.compile:
        raise InputError(
            "settings: loop.compile: DreamIdentity's training puts words into the text encoders; set false"
        )
    base = base or open_text_base(
        config.model.base, dtype=getattr(torch, config.model.dtype), device=device_of(config.loop)
    )
    edge = config.model.resolution
    base.latent_shape(edge, edge)
    system = new_system(config, base).to(base.device)
    source, people = open_data(None if data is None else str(data), pairs, out, config, system.config, say)
    source.check_base(base)
    say(f"{len(source)} samples, {edge} pixels, {base.name}; encoder: {system.extra_repr()}")
    task = DreamIdentityTask(system, config, base)
    try:
        if config.loop.validate_every and rank_and_world()[0] == 0:
            analyzer = analyzer_of(config)
            task.validator = Validator(
                guests_of(people, config, system.config, analyzer), config, Judge("face", analyzer)
            )
        return train(task, source, config.loop, out, resume=resume, settings=config, allow_change=allow_change)
    finally:
        task.close()


def new_system(config: DreamIdentityTrainConfig, base: LatentBase) -> DreamIdentity:
    """The encoder for this base: of `init`, or the face ViT's weights and new MLPs, the same for the same `loop.seed`.

    Raises:
        WeightsError: weights that are missing or are for another base.
    """
    widths = tuple(p.width for p in text_parts(base.pipe))
    if config.init is not None:
        system = DreamIdentity.from_weights(config.init)
        if system.config.widths != widths:
            raise WeightsError(f"{config.init} makes words of widths {system.config.widths}, this base has {widths}")
        return system
    vit, template = vit_of(config)
    e = config.encoder
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.loop.seed)
        system = DreamIdentity.from_vit(
            vit, widths, taps=e.taps, words=e.words, hidden=e.hidden, adain=e.adain, template=template
        )
    system.set_names(*name_statistics(base.pipe, names_of(e.names)))
    return system


def vit_of(config: DreamIdentityTrainConfig) -> tuple[FaceViT, str]:
    """The face ViT to begin with, and how it wants faces cut out."""
    e = config.encoder
    path = PACKAGED_VIT if e.vit == EMBEDDED else Path(e.vit)
    vit = load_vit(path, e.image_size, head=e.head)
    if e.template != "auto":
        return vit, e.template
    return vit, read_safetensors(path, what="face ViT weights")[1].get("template", "arcface")


def names_of(given: str) -> tuple[str, ...]:
    """Names whose word embeddings say where people lie."""
    if given == TINY_SD:
        from ...sampling.tiny_sd import names

        return names()
    return tuple(prompts.load(given))


def analyzer_of(config: DreamIdentityTrainConfig) -> Any:
    """Who looks at photos and at what is drawn."""
    return analyzer_for(config.people.analyzer, config.model.base)


def run_command(
    data: str | None, pairs: Path | None, vit: str | None, editability: float | None, arguments: TrainArguments
) -> list[str]:
    """What `idcore train dreamidentity` does; see its --help.

    Raises:
        InputError: --out is missing, or a source.
    """
    a = arguments
    settings = load_config(a.config, a.changes, a.base, vit=vit)
    if editability is not None:
        settings = replace(settings, people=replace(settings.people, editability=editability))

    def go(config: DreamIdentityTrainConfig, out: Path) -> Path:
        return train_dreamidentity(config, data, pairs, out, resume=a.resume, allow_change=a.allow_change, say=a.say)

    used = (
        f"idcore generate --system {{made}} --base {settings.model.base} --id photo.jpg "
        f'--prompt "a photo of {settings.people.placeholder} as a nurse" --out pictures'
    )
    return run_training("dreamidentity", a, settings, go, use=used)


__all__ = ["analyzer_of", "new_system", "run_command", "train_dreamidentity", "vit_of"]
