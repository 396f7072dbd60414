"""Settings of StyleForge's training. S is the paper, arXiv 2404.05256; what it does not give is our choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...errors import InputError
from ...systems.styleforge import StyleWords
from ..commands import load_settings, over
from ..config import LoopConfig
from ..settings import setting
from ..tuning import TuneSettings

LAYOUTS = ("diffusers", "kohya", "peft")


@dataclass(frozen=True)
class ModelSettings:
    """The base model."""

    base: str = setting("tiny-sd", '"tiny-sd" (embedded), or a folder with an SD 1.x, SD 2.x or SDXL pipeline')
    dtype: Literal["float32", "bfloat16", "float16"] = setting("float32", "Of what is frozen; whole weights: float32")
    resolution: int = setting(512, "Edge of the pictures, pixels", low=16)


@dataclass(frozen=True)
class WordSettings:
    """Prompts of the sets of pictures; one is drawn for each sample."""

    style: tuple[str, ...] = setting(
        ("[V] style",), "Of StyleRef images, with Multi-StyleForge of those with people; [V] may be any rare word",
        source="S 3",
    )  # fmt: skip
    background: tuple[str, ...] = setting(("[W] style",), "Multi-StyleForge: of images without people", source="S 3")
    aux: tuple[str, ...] = setting(("style",), "Of Aux images", source="S 3")
    template: str = setting("a photo of {style}, {content}", "Of prompts at inference", source="S 4")


@dataclass(frozen=True)
class LossSettings:
    """Dual binding: the StyleRef term + aux times the Aux term."""

    aux: float = setting(1.0, "Weight lambda of the Aux term; 0: none, plain DreamBooth without a prior", low=0)
    style: float = setting(1.0, "Weight of the StyleRef term; Multi-StyleForge halves it between its two", above=0)
    form: Literal["prediction", "clean"] = setting(
        "prediction", "Squared error of what the model predicts (epsilon, velocity or the clean picture), or, as the "
        "paper writes it, of the clean picture that its prediction means",
    )  # fmt: skip
    weight: Literal["one", "snr", "min_snr"] = setting(
        "min_snr", "w_t of the form clean: 1; the signal-to-noise ratio (for epsilon the same as the form prediction); "
        "or that ratio up to min_snr",
    )  # fmt: skip
    min_snr: float = setting(5.0, "Largest w_t with weight min_snr", above=0, source="arXiv 2303.09556")


@dataclass(frozen=True)
class PictureSettings:
    """How StyleRef and Aux images are read."""

    aux_share: float = setting(0.5, "Share of Aux images in a batch", above=0, below=1, source="DreamBooth's pairs")
    flip: float = setting(0.0, "Share of mirrored pictures", low=0, high=1)
    crop: Literal["centre", "random"] = setting("centre", "Where pictures are cut")
    keep_latents: bool = setting(True, "Encode each picture once (crop centre)", free=True)
    mix: bool = setting(True, "Look for faces and warn about a wrong mix of people and backgrounds", free=True)
    faces: str = setting("embedded", 'Who looks: "embedded", or a folder in the layout of antelopev2', free=True)


@dataclass(frozen=True)
class SearchSettings:
    """How many steps a style needs: every `loop.validate_every` steps held-out prompts are drawn and scored; the best
    weights are kept, and training ends when `patience` scores in a row were no better."""

    prompts: tuple[str, ...] = setting(
        ("a woman reading a book", "an old man with a hat", "a dog on a street", "a house by a lake"),
        "Contents, put into words.template; none of the training's pictures shows them",
    )
    seeds: tuple[int, ...] = setting((0,), "Of each prompt's pictures", low=0)
    patience: int = setting(
        5, "Scores without a better one before the end; 0: all steps. With Aux a style may come late, and then at once",
        low=0,
    )  # fmt: skip
    content: float = setting(
        1.0, "Weight of what the picture shows against its style: score = style * content^this", low=0
    )
    features: str = setting(
        "embedded", 'What sees the style: "embedded" (colours and textures), clip:FOLDER, torch-fidelity:FILE or a '
        "TorchScript file; CLIP judges the content by the prompt, too", free=True,
    )  # fmt: skip
    steps: int = setting(25, "Of the sampler", low=1)
    guidance: float = setting(7.5, "Of the sampler; up to 1 none", low=0)


@dataclass(frozen=True)
class ResultSettings:
    """What is saved of a LoRA; whole weights are saved as a pipeline."""

    layouts: tuple[str, ...] = setting(("diffusers", "kohya"), f"Any of {', '.join(LAYOUTS)}; the first is used here")


@dataclass(frozen=True)
class StyleForgeConfig:
    """All settings of a run."""

    model: ModelSettings = setting(factory=ModelSettings, doc="Base model")
    words: WordSettings = setting(factory=WordSettings, doc="Prompts")
    tune: TuneSettings = setting(factory=TuneSettings, doc="What trains")
    loss: LossSettings = setting(factory=LossSettings, doc="Objective")
    pictures: PictureSettings = setting(factory=PictureSettings, doc="Pictures")
    search: SearchSettings = setting(factory=SearchSettings, doc="Search of the number of steps")
    result: ResultSettings = setting(factory=ResultSettings, doc="Export")
    loop: LoopConfig = setting(
        factory=lambda: LoopConfig(steps=1000, batch=2, lr=1e-4, ema=0.0, validate_every=100, save_every=100),
        doc="Training loop",
    )

    def check(self) -> None:
        """Raise InputError for values that do not go together."""
        w = self.words
        for name in ("style", "background", "aux"):
            if not getattr(w, name):
                raise InputError(f"settings: words.{name} needs at least one prompt")
        self.style_words(multi=True)
        unknown = set(self.result.layouts) - set(LAYOUTS)
        if unknown or not self.result.layouts:
            raise InputError(f"settings: result.layouts holds {', '.join(LAYOUTS)}; got {list(self.result.layouts)}")
        if self.loop.validate_every and not (self.search.prompts and self.search.seeds):
            raise InputError(
                "settings: search.prompts and search.seeds need at least one each; loop.validate_every=0 switches the "
                "search off"
            )
        if self.tune.weights == "full" and self.model.dtype != "float32":
            raise InputError(
                f"settings: whole weights train in float32, model.dtype is {self.model.dtype}; set model.dtype=float32 "
                "and, for speed, loop.precision=bf16"
            )
        if self.loop.compile:
            raise InputError("settings: loop.compile: what trains here is part of the UNet; set false")
        self.loop.check()

    def style_words(self, multi: bool) -> StyleWords:
        """What the result says of its words: the first prompts of the sets."""
        w = self.words
        return StyleWords(w.style[0], w.background[0] if multi else "", w.template)


# What differs by base and by what trains; our choice throughout.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny-sd": {
        "model": {"resolution": 64},
        "search": {
            "prompts": ["a person, blue background", "a man smiling, red background", "a woman, green background",
                        "a person looking left, yellow background"],
            "seeds": [0, 1], "steps": 4, "guidance": 1.0,
        },
        "tune": {"layers": "all"},
        "loop": {"steps": 200, "batch": 8, "lr": 2e-3, "validate_every": 40, "save_every": 40},
    },
}  # fmt: skip
FULL_RATE = {"tiny-sd": 3e-4}
_FULL_RATE = 2e-6  # of Stable Diffusion's whole UNet


def load_config(
    path: str | Path | None = None, changes: Sequence[str] = (), base: str | None = None
) -> StyleForgeConfig:
    """Settings from a file, `a.b=value` texts (which win) and the base; presets for "tiny-sd", and a lower learning
    rate where whole weights train.

    Raises:
        InputError: as `settings.load`.
    """
    presets = PRESETS
    found = load_settings(StyleForgeConfig, path, changes, base, presets=presets, default_base="tiny-sd")
    if found.tune.weights == "full":
        name = found.model.base
        slower = {"loop": {"lr": FULL_RATE.get(name, _FULL_RATE)}}
        presets = {name: over(PRESETS.get(name, {}), slower)}
        found = load_settings(StyleForgeConfig, path, changes, base, presets=presets, default_base="tiny-sd")
    return found
