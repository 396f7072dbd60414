"""Settings of DreamIdentity's training.

D is the paper, arXiv 2307.00300, which prints neither optimiser nor sizes nor the mixing ratio: what is marked with
another paper is that paper's value for the same need, and all else is our choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ... import prompts
from ...errors import InputError
from ...text.placeholders import check_placeholder, mentions
from ..commands import load_settings
from ..config import LoopConfig
from ..data.options import PrepareConfig
from ..data.source import SourceConfig
from ..settings import setting

TINY_SD, EMBEDDED, DRAWN = "tiny-sd", "embedded", "drawn"


@dataclass(frozen=True)
class ModelSettings:
    """The frozen model."""

    base: str = setting(TINY_SD, '"tiny-sd" (embedded), or a folder with an SD 1.x, SD 2.x or SDXL pipeline', free=True)
    dtype: Literal["float32", "bfloat16", "float16"] = setting("bfloat16", "Of its UNet and text encoders")
    resolution: int = setting(512, "Side of the pictures, pixels", low=8)


@dataclass(frozen=True)
class EncoderSettings:
    """The M2 encoder."""

    vit: str = setting(
        EMBEDDED, 'Face ViT to begin with: "embedded" (trained on drawn people), or weights in timm\'s key names',
        free=True,
    )  # fmt: skip
    image_size: int | None = setting(None, "Side of the faces it reads; null: its own", low=8)
    head: Literal["auto", "none"] = setting("auto", "none: leave the file's linear head out (a classifier's)")
    template: Literal["auto", "arcface", "ffhq", "dlib", "head"] = setting(
        "auto", "How faces are cut out; auto: as the ViT's file says, else arcface"
    )
    words: int = setting(2, "k", low=1, source="StableIdentity, of DreamIdentity")
    taps: tuple[int, ...] = setting((), "Blocks whose class tokens are read; empty: the ends of the network's quarters")
    hidden: int = setting(1024, "Inside of each word's MLP", low=1)
    adain: bool = setting(True, "Give words the mean and spread of names' embeddings", source="StableIdentity")
    names: str = setting("dreamidentity-names", 'Those names: a prompt set or a file; "tiny-sd": its 512 people')
    trains: Literal["all", "heads"] = setting("all", "What of it; heads: the MLPs alone", source="D, figure b")


@dataclass(frozen=True)
class LossSettings:
    """The objective."""

    penalty: float = setting(0.01, "Weight of the sum of squares of the words", low=0, source="E4T's pre-training")
    min_snr: float | None = setting(None, "Gamma of min-SNR weighting (arXiv 2303.09556); null: none", above=0)


@dataclass(frozen=True)
class PeopleSettings:
    """What is trained on."""

    editability: float = setting(0.5, "Share of the self-augmented pairs; the rest is reconstruction", low=0, high=1)
    prompts: str = setting(
        "dreamidentity-training", "Of the reconstruction: a prompt set or a file", source="D, fig. c"
    )
    placeholder: str = setting("S*", "Stands for the person in prompts")
    drawn: int = setting(4000, "Of --data drawn: how many people", low=8)
    drawn_folder: str | None = setting(None, "Where they are kept; null: people/ in the run's folder", free=True)
    analyzer: str = setting("embedded", 'Detector: "embedded", or a folder in the layout of antelopev2', free=True)


@dataclass(frozen=True)
class ValidationSettings:
    """Fixed people, prompts and seeds, every `loop.validate_every` steps."""

    people: str | None = setting(None, "Folder of photos of people who are not in the data; null: of the data itself "
                                 "(of drawn people: others)")  # fmt: skip
    count: int = setting(4, "How many people", low=1, free=True)
    prompts: tuple[str, ...] = setting(
        ("a photo of S*", "S* as nurse", "Watercolor style, S* face"), "What is drawn", source="D, fig. c", free=True
    )
    seeds: tuple[int, ...] = setting((0,), "Pictures of each prompt", low=0, free=True)
    steps: int = setting(25, "Of the base's own sampler", low=1, free=True)
    guidance: float = setting(7.5, "Classifier-free guidance; 1: none", low=1, free=True)


@dataclass(frozen=True)
class DreamIdentityTrainConfig:
    """All settings of `idcore train dreamidentity`."""

    model: ModelSettings = setting(factory=ModelSettings, doc="Frozen model")
    encoder: EncoderSettings = setting(factory=EncoderSettings, doc="Encoder")
    people: PeopleSettings = setting(factory=PeopleSettings, doc="Sources")
    loss: LossSettings = setting(factory=LossSettings, doc="Objective")
    init: str | None = setting(None, "DreamIdentity weights to go on from, in place of encoder.*", free=True)
    prepare: PrepareConfig = setting(
        factory=lambda: PrepareConfig(resolution=512, max_aspect=1.0, captions="empty", several="dominant"),
        doc="How a folder of pictures is prepared",
    )
    data: SourceConfig = setting(factory=lambda: SourceConfig(latents=False), doc="How prepared data is read")
    validation: ValidationSettings = setting(factory=ValidationSettings, doc="In between")
    loop: LoopConfig = setting(
        factory=lambda: LoopConfig(steps=60_000, batch=16, lr=5e-5, warmup=500, ema=0.999), doc="Training loop"
    )

    def check(self) -> None:
        """Raise InputError for values that do not go together."""
        self.loop.check()
        check_placeholder(self.people.placeholder)
        if self.data.latents:
            raise InputError(
                "settings: data.latents must be false: the encoder reads the pictures themselves, and latents are made "
                "of the same crops"
            )
        silent = [p for p in self.texts() if not mentions(p, [self.people.placeholder])]
        if silent:
            raise InputError(
                f"settings: prompts must hold the placeholder {self.people.placeholder}, {silent[0]!r} does not"
            )
        if not self.validation.prompts or not self.validation.seeds:
            raise InputError("settings: validation.prompts and validation.seeds need at least one each")

    def texts(self) -> tuple[str, ...]:
        """Prompts of the reconstruction and of the validation."""
        return (*self.reconstruction(), *self.validation.prompts)

    def reconstruction(self) -> tuple[str, ...]:
        given = self.people.prompts
        fill = {"person": self.people.placeholder} if given == "dreamidentity-training" else {}
        return tuple(prompts.load(given, **fill))


# What differs for the embedded model (our choice throughout).
SMALL: dict[str, Any] = {
    "model": {"dtype": "float32", "resolution": 64},
    "encoder": {"hidden": 256, "names": TINY_SD},
    "loss": {"penalty": 0.0},  # its words are 70 times as large as CLIP's; the penalty would outweigh the rest
    "prepare": {"resolution": 64, "min_face": 32},
    "validation": {
        "prompts": ["a photo of S*, blue background", "a pencil drawing of S*, yellow background",
                    "a photo of S* smiling, red background"],
        "steps": 4, "guidance": 1.0,
    },
    "loop": {
        "steps": 600, "batch": 16, "lr": 1e-3, "schedule": "cosine", "warmup": 30, "ema": 0.98, "save_every": 100,
        "validate_every": 200,
    },
}  # fmt: skip


def load_config(
    path: str | Path | None = None, changes: Sequence[str] = (), base: str | None = None, *, vit: str | None = None
) -> DreamIdentityTrainConfig:
    """Settings from a file, `a.b=value` texts (which win), the base model and the face ViT.

    Raises:
        InputError: as `settings.load`.
    """
    given = None if vit is None else {"encoder": {"vit": vit}}
    return load_settings(
        DreamIdentityTrainConfig, path, changes, base, presets={TINY_SD: SMALL}, default_base=TINY_SD, given=given
    )
