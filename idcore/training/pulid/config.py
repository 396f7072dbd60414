"""Settings of PuLID's training. Defaults are the paper's where it gives them; all others are our choice.

P is the paper, arXiv 2404.16022v2; A its first author in the issues of the published repository, by number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ... import prompts
from ...errors import InputError
from ...systems.pulid import PRESETS
from ...systems.pulid_encoders import EncoderConfig
from ..commands import load_settings
from ..config import LoopConfig
from ..data.options import PrepareConfig
from ..data.source import SourceConfig
from ..losses.alignment import AlignmentOptions
from ..settings import setting

STAGES = (1, 2, 3)


@dataclass(frozen=True)
class ModelSettings:
    """The frozen models."""

    base: str = setting(
        "tiny",
        'Model of L_diff: "tiny" (embedded, 64 pixels), "tiny-sd" (shipped, 64 pixels, in the layout of Stable '
        "Diffusion 1.5), or a folder with a pipeline (SDXL, Stable Diffusion 1.5)",
        free=True,
    )
    fast: str | None = setting(
        None, "Model of the 4-step passes, an SDXL-Lightning pipeline; null: the same as base, as the authors did",
        source="P 7.2; A #150", free=True,
    )  # fmt: skip
    others: tuple[str, ...] = setting(
        (), "Further bases: process r trains on number r of [base, *others], over and over", source="P 7.2", free=True
    )
    dtype: Literal["float32", "bfloat16", "float16"] = setting("bfloat16", "Of the frozen models")
    resolution: int = setting(768, "Edge of the 4-step passes' pictures, pixels", low=16, source="P 4.1")


@dataclass(frozen=True)
class FaceSettings:
    """What reads faces: for the encoder (`idcore prepare` caches it), for L_id, and for validation."""

    features: Literal["pulid", "tiny-pulid"] = setting(
        "pulid", 'What the encoder reads: ArcFace and EVA-CLIP as published, or the embedded recogniser alone',
        source="P 3.2",
    )  # fmt: skip
    analyzer: str = setting("embedded", 'Detector: "embedded", or a folder in the layout of antelopev2', free=True)
    vision: str | None = setting(None, "EVA02-CLIP-L-336 weights, for features pulid", free=True)
    parsing: str | None = setting(None, "BiSeNet face parsing weights, for features pulid", free=True)
    retinaface: str | None = setting(None, "RetinaFace weights, for features pulid", free=True)
    recogniser: str = setting(
        "embedded", 'Of L_id: "embedded" (dlib), or an IResNet (safetensors) other than the encoder\'s ("arcface-50")',
        source="P 4.1",
    )  # fmt: skip
    measure: Literal["auto", "cosine", "squared_l2"] = setting(
        "auto", "Of L_id: 1 - cos (equation 6), or what dlib's network was trained for; auto: cosine for an IResNet"
    )


@dataclass(frozen=True)
class LossSettings:
    """The objective (P equations 1 to 7)."""

    identity: float = setting(1.0, "lambda_id", low=0, source="P 4.1")
    semantic: float = setting(0.6, "Weight of L_align-sem", low=0, source="P 4.1")
    layout: float = setting(0.1, "Weight of L_align-layout", low=0, source="P 4.1")
    diffusion: float = setting(1.0, "Weight of L_diff", low=0, source="P equation 7")
    diffusion_norm: Literal["mse", "norm"] = setting("mse", "Mean square, or the Euclidean norm that P writes")
    min_snr: float | None = setting(None, "Gamma of min-SNR weighting (5 in arXiv 2303.09556); null: none", above=0)
    face_weight: float = setting(
        0.0, "L_diff counts the face's pixels 1 + this many times; wants data prepared with --parsing", low=0
    )
    alignment_norm: Literal["mse", "rms", "norm"] = setting(
        "mse", "Of a layer's difference: mean square, its root, or the Euclidean norm that P writes"
    )
    alignment_layers: Literal["mean", "sum"] = setting("mean", "Over the cross-attention layers")
    diffusion_on: Literal["base", "fast"] = setting(
        "base", "Model of L_diff in stages 2 and 3; fast: as the authors did", source="A #150: both work"
    )
    identity_prompt: str = setting("portrait, color, cinematic", "C_txt of L_id", source="P 3.3")
    alignment_prompts: str = setting("pulid-alignment", "Prompts of L_align: a set or a file", source="P table 8")
    passes: Literal["both", "alternate", "shared"] = setting(
        "both", "Of stage 3. both: one 4-step pass for L_id and one for L_align in each step; alternate: in turn, each "
        "with twice its weight; shared: one pass with a prompt of the list serves both",
    )  # fmt: skip
    steps: int = setting(4, "Of the few-step sampler", low=1, high=100, source="P 7.2")
    gradient_steps: int = setting(4, "The last n of them carry gradients", low=1, source="P table 3: all")
    through: Literal["steps", "one"] = setting(
        "steps", "L_id on the whole 4-step picture; one: on the one-step prediction of L_diff's branch, the naive "
        "form that P 3.3 argues against", source="P 3.3",
    )  # fmt: skip
    checkpoint_steps: bool = setting(True, "Run each step again in backward: memory of one step, +1/3 time", free=True)
    checkpoint_decode: bool = setting(True, "The same for the autoencoder's blocks", free=True)

    def alignment(self) -> AlignmentOptions:
        return AlignmentOptions(self.semantic, self.layout, self.alignment_norm, self.alignment_layers)


@dataclass(frozen=True)
class EncoderSettings:
    """Sizes of the identity encoder; the widths of what it reads follow from `face.features`."""

    version: Literal["v1", "v1.1"] = setting("v1", "IDEncoder (MLPs) or IDFormer", source="published weights")
    width: int = setting(1024, "Inside the encoder", low=8, source="published weights")
    output_dim: int = setting(2048, "Of an identity token", low=8, source="published weights")
    queries: int = setting(32, "v1.1: tokens", low=1, source="published weights")
    heads: int = setting(16, "v1.1: of its attention", low=1, source="published weights")
    layers_per_scale: int = setting(2, "v1.1", low=1, source="published weights")
    init: Literal["base", "random", "zero"] = setting(
        "base", "Of id_to_k and id_to_v: from the base's to_k and to_v where their widths are equal, else random; "
        "zero: id_to_v begins at 0, the base as it is",
    )  # fmt: skip


@dataclass(frozen=True)
class StageSettings:
    """What a stage has of its own; null: as in `loop`."""

    steps: int = setting(30_000, "Steps of the optimiser", low=1)
    lr: float | None = setting(None, "Learning rate", above=0)
    batch: int | None = setting(None, "Samples of one process in one forward pass", low=1, free=True)
    accumulate: int | None = setting(None, "Forward passes before each step of the optimiser", low=1, free=True)


@dataclass(frozen=True)
class ValidationSettings:
    """Fixed people, prompts and seeds, every `loop.validate_every` steps."""

    people: str | None = setting(None, "Folder of photos of people who are not in the data; null: of the data itself")
    count: int = setting(4, "How many people", low=1, free=True)
    prompts: tuple[str, ...] = setting(
        ("portrait, color, cinematic", "portrait, pencil drawing", "portrait, a person wearing a spacesuit"),
        "What is drawn; a name of a prompt set alone stands for its prompts", source="P tables 7 and 8", free=True,
    )  # fmt: skip
    seeds: tuple[int, ...] = setting((0,), "Pictures of each prompt", low=0, free=True)
    judge: str | None = setting(
        None, "Second face recogniser: a folder in the layout of antelopev2. null: the detector's alone", free=True
    )


@dataclass(frozen=True)
class ResultSettings:
    """What is exported."""

    layouts: tuple[str, ...] = setting(
        ("pulid",), '"pulid": pulid.safetensors; "community": pulid_community.safetensors', free=True
    )
    dtype: Literal["float32", "float16", "bfloat16"] = setting("float32", "Of the exported weights", free=True)
    mode: str = setting(
        "plain", f"How the result joins at inference if nothing else is said: {', '.join(PRESETS)}; plain: as trained",
        free=True,
    )  # fmt: skip


@dataclass(frozen=True)
class PuLIDTrainConfig:
    """All settings of `idcore train pulid`."""

    model: ModelSettings = setting(factory=ModelSettings, doc="Frozen models")
    face: FaceSettings = setting(factory=FaceSettings, doc="Face models")
    encoder: EncoderSettings = setting(factory=EncoderSettings, doc="Identity encoder")
    loss: LossSettings = setting(factory=LossSettings, doc="Objective")
    drop_text: float = setting(0.1, "Share of samples without text in L_diff, for guidance", low=0, high=1)
    drop_identity: float = setting(
        0.1, "Share of samples whose face features are zero in L_diff, as in the unconditional half at inference",
        low=0, high=1,
    )  # fmt: skip
    prepare: PrepareConfig = setting(factory=PrepareConfig, doc="How a folder of pictures is prepared")
    data: SourceConfig = setting(factory=SourceConfig, doc="How prepared data is read")
    init: str | None = setting(None, "PuLID weights to start from, in any published layout", free=True)
    stage1: StageSettings = setting(factory=StageSettings, doc="L_diff")
    stage2: StageSettings = setting(factory=lambda: StageSettings(steps=20_000), doc="L_diff + L_id; A #166: < 30000")
    stage3: StageSettings = setting(factory=lambda: StageSettings(steps=20_000), doc="All losses; A #166: < 30000")
    validation: ValidationSettings = setting(factory=ValidationSettings, doc="In between")
    result: ResultSettings = setting(factory=ResultSettings, doc="Export")
    loop: LoopConfig = setting(factory=LoopConfig, doc="Training loop; steps stand in the stages")

    def check(self) -> None:
        """Raise InputError for values that do not go together."""
        c = self.loss
        if c.gradient_steps > c.steps:
            raise InputError(
                f"settings: loss.gradient_steps must be at most loss.steps = {c.steps}, got {c.gradient_steps}"
            )
        if c.min_snr is not None and c.diffusion_norm != "mse":
            raise InputError("settings: loss.min_snr weighs mean squares; set loss.diffusion_norm=mse with it")
        if self.face.features == "pulid" and self.encoder.version == "v1.1" and self.encoder.width % self.encoder.heads:
            raise InputError("settings: encoder.width must be a multiple of encoder.heads")
        if not self.validation.prompts or not self.validation.seeds:
            raise InputError("settings: validation.prompts and validation.seeds need at least one each")
        if self.result.mode not in PRESETS:
            raise InputError(f"settings: result.mode must be one of {', '.join(PRESETS)}, got {self.result.mode!r}")
        unknown = set(self.result.layouts) - {"pulid", "community"}
        if unknown or not self.result.layouts:
            raise InputError(f"settings: result.layouts holds pulid, community or both, got {self.result.layouts}")
        prompts.load(c.alignment_prompts)
        if self.loop.steps != LoopConfig().steps:
            raise InputError(f"{_NO_STEPS}; got loop.steps={self.loop.steps}")
        for n in STAGES:
            self.loop_of(n)

    def stage(self, number: int) -> StageSettings:
        return {1: self.stage1, 2: self.stage2, 3: self.stage3}[number]

    def loop_of(self, number: int) -> LoopConfig:
        """The loop's settings in a stage."""
        s = self.stage(number)
        own = {k: v for k in ("lr", "batch", "accumulate") if (v := getattr(s, k)) is not None}
        made = replace(self.loop, steps=s.steps, **own)
        made.check()
        return made

    def encoder_config(self) -> EncoderConfig:
        """Sizes of the encoder; what it reads is 512 + 768 and 1024 wide as published, or dlib's 128 and 256."""
        e = self.encoder
        wide = {"pulid": (1280, 1024), "tiny-pulid": (128, 256)}[self.face.features]
        more = {"queries": e.queries, "heads": e.heads, "layers_per_scale": e.layers_per_scale}
        return EncoderConfig(e.version, *wide, width=e.width, output_dim=e.output_dim, **more)

    @property
    def bases(self) -> tuple[str, ...]:
        return (self.model.base, *self.model.others)


_NO_STEPS = (
    "settings: loop.steps is not used by this training, whose stages have steps of their own: set stage1.steps, "
    "stage2.steps, stage3.steps"
)

# What differs for the embedded 64 px model (our choice throughout).
TINY: dict[str, Any] = {
    "model": {"base": "tiny", "dtype": "float32", "resolution": 64},
    "face": {"features": "tiny-pulid"},
    "prepare": {"resolution": 64, "max_aspect": 1.0, "min_face": 32},
    "validation": {"prompts": ["a photo of a person, blue background", "a pencil drawing of a person"]},
    "encoder": {"width": 128, "output_dim": 128, "init": "zero"},
    "loss": {"alignment_prompts": "tiny", "identity_prompt": "a portrait", "checkpoint_steps": False},
    "loop": {"batch": 8, "lr": 1e-3, "ema": 0.99, "warmup": 20, "save_every": 100, "validate_every": 100},
    "stage1": {"steps": 600},
    "stage2": {"steps": 300, "lr": 2e-3, "batch": 4},
    "stage3": {"steps": 300, "lr": 2e-3, "batch": 4},
}  # fmt: skip
# And for the shipped 64 px model of Stable Diffusion 1.5's layout (our choice throughout).
TINY_SD: dict[str, Any] = {
    **TINY,
    "model": {"base": "tiny-sd", "dtype": "float32", "resolution": 64},
    "encoder": {"width": 256, "output_dim": 128, "init": "base"},
    # L_id on the paper's scale: a stranger is at about 1 there, drawn ones at 0.23 of dlib's network here. L_align at
    # half the paper's weights: measured to keep the likeness while the pictures return to the text's path.
    "loss": {
        **TINY["loss"], "identity_prompt": "a portrait of a person", "identity": 4.0, "semantic": 0.3, "layout": 0.05,
    },
    "loop": {
        "batch": 16, "lr": 2e-3, "ema": 0.95, "warmup": 20, "schedule": "linear", "decay": 0.4, "lr_end": 0.1,
        "save_every": 100, "validate_every": 100,
    },
    "stage1": {"steps": 600},
    "stage2": {"steps": 100, "lr": 1e-3, "batch": 8},
    "stage3": {"steps": 100, "lr": 1e-3, "batch": 8},
}  # fmt: skip
SHIPPED = {"tiny": TINY, "tiny-sd": TINY_SD}


def load_config(
    path: str | Path | None = None, changes: Sequence[str] = (), base: str | None = None
) -> PuLIDTrainConfig:
    """Settings from a file, `a.b=value` texts (which win), and the base model; the shipped ones have defaults of
    their own (`SHIPPED`).

    Raises:
        InputError: as `settings.load`.
    """
    for text in changes:
        if text.partition("=")[0].strip() == "loop.steps":  # before it is found too few for the warm-up
            raise InputError(f"{_NO_STEPS}; got {text}")
    return load_settings(PuLIDTrainConfig, path, changes, base, presets=SHIPPED, default_base="tiny")
