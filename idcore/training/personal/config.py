"""Settings of textual inversion and DreamBooth. Defaults are the papers' where they give them; others are our choice.

TI is arXiv 2208.01618, DB is arXiv 2208.12242. DB trains Imagen's whole UNet; with LoRA (the default here) rate and
rank are our choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from ... import prompts
from ...errors import InputError
from ...text.placeholders import check_placeholder, mentions
from ..commands import load_settings
from ..config import LoopConfig
from ..settings import setting
from ..tuning import TuneSettings

DEFAULT_BASE = "tiny-sd"
T = TypeVar("T")


@dataclass(frozen=True)
class ModelSettings:
    """The base model."""

    base: str = setting(
        DEFAULT_BASE, '"tiny-sd" (embedded, 64 pixels), or a folder with an SD 1.x, SD 2.x or SDXL pipeline'
    )
    dtype: Literal["float32", "bfloat16", "float16"] = setting("bfloat16", "Of the frozen weights")
    resolution: int | None = setting(None, "Edge of the pictures, pixels; null: what the model was made for", low=16)


@dataclass(frozen=True)
class LossSettings:
    """The diffusion's loss."""

    diffusion_norm: Literal["mse", "norm"] = setting("mse", "Mean square, or the Euclidean norm")
    min_snr: float | None = setting(None, "Gamma of min-SNR weighting; null: none", above=0)


@dataclass(frozen=True)
class ValidationSettings:
    """Pictures of the same prompts and seeds, every `loop.validate_every` steps."""

    prompts: tuple[str, ...] = setting(
        ("a photo of {person}", "a photo of {person} in the snow", "a photo of {person} smiling"),
        "With {person} for the placeholder: a name of a prompt set, or texts", free=True,
    )  # fmt: skip
    seeds: tuple[int, ...] = setting((0,), "Pictures of each prompt", low=0, free=True)
    steps: int = setting(30, "Of the pipeline's own sampler", low=1, free=True)
    guidance: float = setting(7.5, "Classifier-free guidance; 1: none", low=1, free=True)
    faces: str | None = setting(
        "embedded", 'Recogniser that compares with the photos: "embedded", a folder in the layout of antelopev2, or '
        "null", free=True,
    )  # fmt: skip
    min_score: float = setting(0.9, "Of the embedded detector", low=0, high=1, free=True)


@dataclass(frozen=True)
class InversionPerson:
    """Who is learned, and how prompts speak of them."""

    images: tuple[str, ...] = setting((), "Photos, or one folder of them", source="TI: 3 to 5", free=True)
    class_word: str = setting("person", "Where the words begin", source="TI: a coarse descriptor")
    placeholder: str = setting("S*", "What prompts say", source="TI")
    words: int = setting(1, "Consecutive words that stand for the placeholder", low=1, high=32, source="TI")
    prompts: tuple[str, ...] = setting(
        ("a photo of {person}", "a close-up photo of {person}", "a good photo of {person}", "a rendition of {person}"),
        "Of the photos, with {person} for the placeholder", source="TI: some of its neutral templates",
    )  # fmt: skip
    flip: float = setting(0.0, "Share of mirrored photos", low=0, high=1)


@dataclass(frozen=True)
class BoothPerson:
    """Who is learned, and how prompts speak of them."""

    images: tuple[str, ...] = setting((), "Photos, or one folder of them", source="DB: 3 to 5", free=True)
    class_word: str = setting("person", "What kind of subject it is", source="DB: class noun")
    identifier: str = setting("sks", "A rare word; prompts say it before the class word", source="DB's successors")
    prompts: tuple[str, ...] = setting(
        ("a photo of {person}",),
        "Of the photos, with {person} for identifier and class word",
        source="DB: a [V] [class]",
    )
    flip: float = setting(0.0, "Share of mirrored photos", low=0, high=1)

    @property
    def placeholder(self) -> str:
        """What prompts say."""
        return f"{self.identifier} {self.class_word}"


@dataclass(frozen=True)
class PriorSettings:
    """Prior preservation: pictures of the class that the base drew itself keep the class as it was."""

    weight: float = setting(1.0, "lambda; 0: none", low=0, source="DB 3.2")
    pictures: str | None = setting(
        None, "Folder of class pictures; null: the base draws them into OUT/class", free=True
    )
    count: int = setting(200, "How many are drawn", low=1, source="DB's published successors")
    prompt: str = setting("a photo of a {class}", "Of the class pictures, with {class} for the class word", source="DB")
    steps: int = setting(30, "Of the pipeline's own sampler", low=1)
    guidance: float = setting(7.5, "Classifier-free guidance; 1: none", low=1)


class OfOnePerson:
    """What the settings of all trainings of one person have in common: prompts that name the person.

    A subclass is a dataclass with `model`, `person` (with `class_word`, `placeholder`), `loss` and `validation`.
    """

    def check(self) -> None:
        """Raise InputError for values that do not go together."""
        who = self.person
        check_placeholder(getattr(who, "identifier", who.placeholder))
        if not who.class_word.strip():
            raise InputError("settings: person.class_word is empty; give a plain word such as person, dog or chair")
        if self.loss.min_snr is not None and self.loss.diffusion_norm != "mse":
            raise InputError("settings: loss.min_snr weighs mean squares; set loss.diffusion_norm=mse with it")
        for name in ("person", "validation"):
            said = self.texts(getattr(self, name).prompts)
            silent = next((t for t in said if not mentions(t, [who.placeholder])), None)
            if silent is not None or not said:
                raise InputError(
                    f"settings: {name}.prompts must name the person by {who.placeholder} or {{person}}, got "
                    f"{silent if said else 'no prompt'!r}"
                )

    def texts(self, given: Sequence[str]) -> tuple[str, ...]:
        """Prompts that name the person: texts with {person} filled in, or those of the one set that is named."""
        placeholder = self.person.placeholder
        if len(given) == 1 and (given[0] in prompts.names() or given[0].endswith((".json", ".txt"))):
            try:
                given = prompts.load(given[0], person=placeholder)
            except InputError:  # a set without that placeholder, or none at all
                given = prompts.load(given[0])
        return tuple(text.replace("{person}", placeholder) for text in given)

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.model.dtype)


@dataclass(frozen=True)
class InversionConfig(OfOnePerson):
    """All settings of `idcore train textual-inversion`."""

    model: ModelSettings = setting(factory=ModelSettings, doc="Base model, frozen")
    person: InversionPerson = setting(factory=InversionPerson, doc="Who is learned")
    loss: LossSettings = setting(factory=LossSettings, doc="Objective")
    validation: ValidationSettings = setting(factory=ValidationSettings, doc="In between")
    loop: LoopConfig = setting(
        factory=lambda: LoopConfig(
            steps=5000, batch=4, lr=5e-3, ema=0.0, weight_decay=0.0, clip=0.0, save_every=500, keep=1, validate_every=0
        ),
        doc="Training loop; steps, batch and lr are TI's",
    )


@dataclass(frozen=True)
class BoothConfig(OfOnePerson):
    """All settings of `idcore train dreambooth`."""

    model: ModelSettings = setting(factory=ModelSettings, doc="Base model")
    person: BoothPerson = setting(factory=BoothPerson, doc="Who is learned")
    tune: TuneSettings = setting(factory=TuneSettings, doc="What of the base trains")
    prior: PriorSettings = setting(factory=PriorSettings, doc="Prior preservation")
    loss: LossSettings = setting(factory=LossSettings, doc="Objective")
    validation: ValidationSettings = setting(factory=ValidationSettings, doc="In between")
    loop: LoopConfig = setting(
        factory=lambda: LoopConfig(steps=1000, batch=2, lr=1e-4, ema=0.0, save_every=250, keep=1, validate_every=0),
        doc="Training loop; steps are DB's, a sample of the person and one of the class in each",
    )


# What differs for the embedded 64 px model (our choice throughout).
_TINY: dict[str, Any] = {
    "model": {"dtype": "float32"},
    "validation": {
        "prompts": ["a photo of {person}", "a pencil drawing of {person}, blue background", "{person} smiling"],
        "steps": 4, "guidance": 1.0, "min_score": 0.8,
    },
}  # fmt: skip
TINY: dict[type, dict[str, Any]] = {
    InversionConfig: {
        **_TINY, "person": {"prompts": ["a photo of {person}"]}, "loop": {"steps": 400, "batch": 8, "lr": 1e-2}
    },
    BoothConfig: {
        **_TINY, "prior": {"count": 48, "steps": 4, "guidance": 1.0}, "loop": {"steps": 400, "batch": 8, "lr": 1e-3},
    },
}  # fmt: skip


def load_config(
    cls: type[T], path: str | Path | None = None, changes: Sequence[str] = (), base: str | None = None,
    given: Mapping[str, Any] | None = None,
) -> T:  # fmt: skip
    """Settings from a file, options and `a.b=value` texts, as `commands.load_settings`; for "tiny-sd" the defaults are
    `TINY`.

    Args:
        cls: `InversionConfig` or `BoothConfig`.

    Raises:
        InputError: as `load_settings`.
    """
    presets = {DEFAULT_BASE: TINY[cls]}
    return load_settings(cls, path, changes, base, presets=presets, default_base=DEFAULT_BASE, given=given)
