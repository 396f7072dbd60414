"""Settings of SeFi-IDE's training. Defaults are the paper's where it gives them; all others are our choice.

P is the paper, arXiv 2402.00631; PS is ProSpect (arXiv 2305.16225) and its published code, whose five pairs of the ten
words the paper's figures show: what the paper does not print is taken from there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...attention.staged import MAX_STAGES
from ..commands import load_settings
from ..config import LoopConfig
from ..personal.config import DEFAULT_BASE, OfOnePerson, ValidationSettings
from ..personal.config import ModelSettings as PlainModelSettings
from ..settings import setting


@dataclass(frozen=True)
class ModelSettings(PlainModelSettings):
    """The frozen model."""

    base: str = setting(
        DEFAULT_BASE, '"tiny-sd" (embedded, 64 pixels), or a folder with an SD 1.x, SD 2.x or SDXL pipeline',
        source="P: SD 1.4's class, and SDXL",
    )  # fmt: skip


@dataclass(frozen=True)
class PersonSettings:
    """Who is learned, and how prompts speak of them."""

    images: tuple[str, ...] = setting((), "Photos, or one folder of them", source="P: one photo", free=True)
    class_word: str = setting("person", "What a plain prompt says; training begins there", source="P: person")
    placeholder: str = setting("V*", "What prompts say instead", source="P")
    prompts: tuple[str, ...] = setting(
        ("sefi-ide-training",), "Of the photos, with the placeholder: a name of a prompt set, or texts", source="P"
    )
    flip: float = setting(0.0, "Share of mirrored photos", low=0, high=1)


@dataclass(frozen=True)
class WordSettings:
    """The stages, and the network that expands one word to all of them."""

    stages: int = setting(5, "Equal parts of the timesteps; a pair of words each", low=1, high=MAX_STAGES, source="P")
    heads: int = setting(8, "Of the expander's self-attentions", low=1, source="PS")
    head_dim: int = setting(64, "Of a head", low=1, source="PS")
    dropout: float = setting(0.1, "In the expander", low=0, below=1, source="PS")
    residual: bool = setting(True, "The words are the class word plus what the expander gives, and begin there")


@dataclass(frozen=True)
class LossSettings:
    """L = L_LDM + lambda L_attn."""

    attention: float = setting(0.003, "lambda; 0: none", low=0, source="P: best of 0.0001 to 0.05")
    attention_form: Literal["sum", "mean"] = setting(
        "sum", "L_attn of a layer: the squared distance of a sample's two maps, which P writes, or per element of the "
        "maps; the mean over layers and heads in both"
    )  # fmt: skip
    attention_layers: tuple[str, ...] = setting((), "Parts of layers' names, such as down_blocks; none: all layers")
    attention_tokens: Literal["all", "prompt", "person"] = setting(
        "all", "Whose maps count: of all tokens, without the padding, or of the person's word", source="P: each token"
    )
    diffusion_norm: Literal["mse", "norm"] = setting("mse", "Of L_LDM: mean square, or the Euclidean norm")
    min_snr: float | None = setting(None, "Gamma of min-SNR weighting of L_LDM; null: none", above=0)


@dataclass(frozen=True)
class ResultSettings:
    """What is exported."""

    dtype: Literal["float32", "float16"] = setting("float32", "Of the words", free=True)


@dataclass(frozen=True)
class SeFiTrainConfig(OfOnePerson):
    """All settings of `idcore train sefi-ide`."""

    model: ModelSettings = setting(factory=ModelSettings, doc="Frozen model")
    person: PersonSettings = setting(factory=PersonSettings, doc="Who is learned")
    words: WordSettings = setting(factory=WordSettings, doc="Stages and expander")
    loss: LossSettings = setting(factory=LossSettings, doc="Objective")
    validation: ValidationSettings = setting(factory=ValidationSettings, doc="In between")
    result: ResultSettings = setting(factory=ResultSettings, doc="Export")
    loop: LoopConfig = setting(
        factory=lambda: LoopConfig(steps=600, batch=1, lr=1e-4, ema=0.0, save_every=100, keep=1, validate_every=0),
        doc="Training loop; steps, batch and lr are PS's",
    )


# What differs for the embedded 64 px model (our choice throughout).
TINY: dict[str, Any] = {
    "model": {"dtype": "float32"},
    "person": {"prompts": ["a photo of {person}"]},
    "validation": {
        "prompts": [
            "a photo of {person}", "a pencil drawing of {person}, blue background", "a photo of {person}, smiling",
        ],
        "steps": 4, "guidance": 1.0, "min_score": 0.8,
    },
    "loop": {"steps": 400, "batch": 8, "lr": 1e-3},
}  # fmt: skip


def load_config(
    path: str | Path | None = None,
    changes: Sequence[str] = (),
    base: str | None = None,
    given: Mapping[str, Any] | None = None,
) -> SeFiTrainConfig:
    """Settings from a file, options and `a.b=value` texts, as `commands.load_settings`; for "tiny-sd" the defaults are
    `TINY`.

    Raises:
        InputError: as `load_settings`.
    """
    return load_settings(
        SeFiTrainConfig, path, changes, base, presets={DEFAULT_BASE: TINY}, default_base=DEFAULT_BASE, given=given
    )
