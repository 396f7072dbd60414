"""Settings of the face ViT's training. DreamIdentity names neither data set nor objective: all are our choice but for
ArcFace's (arXiv 1801.07698)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...encoders.face_vit import FaceViTConfig
from ...errors import InputError
from ..commands import load_settings
from ..config import LoopConfig
from ..data.options import PrepareConfig
from ..data.source import SourceConfig
from ..settings import setting

DRAWN = "drawn"
ARCFACE = "arXiv 1801.07698"


@dataclass(frozen=True)
class ViTSettings:
    """The network."""

    init: str | None = setting(
        None, "Weights to begin with: a ViT in timm's key names (safetensors), whose sizes hold in place of these",
        free=True,
    )  # fmt: skip
    image_size: int = setting(112, "Side of the aligned faces, pixels", low=8)
    patch_size: int = setting(14, "Side of a patch", low=1)
    width: int = setting(192, "Of the transformer", low=1)
    depth: int = setting(6, "Blocks", low=1)
    heads: int = setting(3, "Of its attention", low=1)
    mlp_dim: int = setting(768, "Inside of the MLPs", low=1)
    id_dim: int = setting(128, "Width of the identity vector; 0: the last class token itself", low=0)
    template: Literal["arcface", "ffhq", "dlib", "head"] = setting("arcface", "How faces are cut out; head: hair too")

    def sizes(self) -> FaceViTConfig:
        s = (self.image_size, self.patch_size, self.width, self.depth, self.heads, self.mlp_dim, self.id_dim)
        return FaceViTConfig(*s)


@dataclass(frozen=True)
class ArcFaceSettings:
    """The head, which is not kept: cos(theta + margin) of the own person, times a scale, into the cross entropy."""

    scale: float = setting(64.0, "s", above=0, source=ARCFACE)
    margin: float = setting(0.5, "m, radians", low=0, below=1.5, source=ARCFACE)


@dataclass(frozen=True)
class DrawnSettings:
    """Of `--data drawn`: people that the project draws itself."""

    people: int = setting(2000, "How many; they are drawn first, about 50 a second", low=2)
    folder: str | None = setting(None, "Where they are kept; null: people/ in the run's folder", free=True)
    styles: bool = setting(False, "Half of the pictures as pencil, oil, cartoon, sepia and night")


@dataclass(frozen=True)
class ExamSettings:
    """Identification of people whom the training does not see: is the nearest other picture of the same person?"""

    share: float = setting(0.05, "Of a folder's people, at least 2; 0: none", low=0, below=1)
    people: int = setting(200, "Of drawn people", low=2)
    pictures: int = setting(400, "At most so many of a folder's pictures", low=4, free=True)


@dataclass(frozen=True)
class FaceViTTrainConfig:
    """All settings of `idcore train face-vit`."""

    vit: ViTSettings = setting(factory=ViTSettings, doc="Network")
    arcface: ArcFaceSettings = setting(factory=ArcFaceSettings, doc="Head")
    drawn: DrawnSettings = setting(factory=DrawnSettings, doc="Drawn people")
    flip: float = setting(0.5, "Share of mirrored faces", low=0, high=1)
    analyzer: str = setting("embedded", 'Detector: "embedded", or a folder in the layout of antelopev2', free=True)
    prepare: PrepareConfig = setting(
        factory=lambda: PrepareConfig(resolution=256, captions="empty", several="largest"),
        doc="How a folder of people is prepared",
    )
    data: SourceConfig = setting(factory=lambda: SourceConfig(latents=False), doc="How prepared data is read")
    exam: ExamSettings = setting(factory=ExamSettings, doc="In between")
    loop: LoopConfig = setting(
        factory=lambda: LoopConfig(
            steps=20_000, batch=128, lr=5e-4, schedule="cosine", warmup=500, weight_decay=0.05, ema=0.999
        ),
        doc="Training loop",
    )

    def check(self) -> None:
        """Raise InputError for values that do not go together."""
        self.vit.sizes()
        self.loop.check()
        if self.data.flip or self.data.latents:
            raise InputError(
                "settings: face-vit mirrors faces by `flip` and reads pictures: leave data.flip at 0 and data.latents "
                "at false"
            )


# What differs on drawn people: pictures of 64 pixels, some minutes on a CPU (our choice throughout).
SMALL: dict[str, Any] = {
    "vit": {
        "image_size": 64, "patch_size": 16, "width": 128, "depth": 4, "heads": 2, "mlp_dim": 512, "id_dim": 128,
        "template": "head",
    },
    "arcface": {"scale": 16.0, "margin": 0.1},
    "flip": 0.0,
    "loop": {
        "steps": 800, "batch": 64, "lr": 7e-4, "warmup": 40, "ema": 0.98, "save_every": 50, "validate_every": 200,
    },
}  # fmt: skip


def load_config(
    path: str | Path | None = None, changes: Sequence[str] = (), *, drawn: bool = False
) -> FaceViTTrainConfig:
    """Settings from a file and `a.b=value` texts, which win; on drawn people the defaults are `SMALL`.

    Raises:
        InputError: as `settings.load`.
    """
    return load_settings(FaceViTTrainConfig, path, changes, presets={"": SMALL} if drawn else None)
