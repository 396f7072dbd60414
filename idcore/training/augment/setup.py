"""What a worker needs to be made in any process: base model and judges by name."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ...errors import InputError
from ..bases.opening import TINY_SD
from ..settings import about
from ..settings_out import as_dict
from .draw import Drawer
from .judge import ClipJudge, DrawnJudge, FaceJudge, NoTextJudge, TextJudge
from .options import AugmentConfig, Prompt
from .unit import Unit

SOURCE_PROMPTS = (Prompt("a photo of {person}"),)
TEXTS = ("clip", "drawn", "none")
DRAWN_SCORE = 0.8  # of the detector, for drawn faces, as in `metrics.gate`


class Models(Protocol):
    """Makes the models, in every process anew; must survive pickling."""

    def build(self, config: AugmentConfig) -> tuple[Any, FaceJudge, TextJudge]:
        """Base (`training.contract.Base`), faces and texts."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """What the pictures and their scores hang on, as plain values."""
        ...


@dataclass(frozen=True)
class NamedModels:
    """The models that `idcore augment` knows by name.

    Attributes:
        base: "tiny-sd", or a folder with a Stable Diffusion or SDXL pipeline.
        unet: one file with a whole UNet for it, such as SDXL-Lightning's.
        dtype, device: of the base and of CLIP.
        faces: "embedded", or a folder with SCRFD and ArcFace. Not the recogniser of the encoder that will be trained,
            where there is a choice: a filter favours what its recogniser sees.
        text: "clip" (a folder with a CLIP model of transformers in `clip`), "drawn" (attributes of the drawn world) or
            "none". word: stands for the name in texts that CLIP reads.
    """

    base: str = TINY_SD
    unet: str | None = None
    dtype: str = "float32"
    device: str = "cpu"
    faces: str = "embedded"
    text: str = "drawn"
    clip: str | None = None
    word: str = "person"

    def __post_init__(self) -> None:
        if self.text not in TEXTS:
            raise InputError(f"augment: text alignment by {', '.join(TEXTS)}, got {self.text!r}")
        if (self.text == "clip") != (self.clip is not None):
            raise InputError(
                "augment: text alignment is judged by CLIP from a folder (--clip FOLDER), or left out (--text none); "
                f"got text {self.text!r} and clip {self.clip!r}"
            )
        if self.dtype not in ("float32", "float16", "bfloat16"):
            raise InputError(f"augment: dtype must be float32, float16 or bfloat16, got {self.dtype!r}")

    def build(self, config: AugmentConfig) -> tuple[Any, FaceJudge, TextJudge]:
        """Raises WeightsError or InputError where a model is missing."""
        import torch

        from ...encoders.analyzer import EmbeddedAnalyzer, analyzer_from
        from ..bases.opening import open_text_base

        base = open_text_base(self.base, dtype=getattr(torch, self.dtype), device=self.device)
        base.sampler = config.sampler
        if self.unet is not None:
            from ...sampling.loading import load_unet_weights

            load_unet_weights(base.unet, self.unet)
        drawn = self.faces == "embedded" and getattr(base, "faces_in_one_place", False)
        analyzer = EmbeddedAnalyzer(min_score=DRAWN_SCORE) if drawn else analyzer_from(self.faces)
        return base, FaceJudge(analyzer, config), self._texts()

    def _texts(self) -> TextJudge:
        if self.text == "none":
            return NoTextJudge()
        if self.text == "drawn":
            return DrawnJudge()
        from ...metrics.networks import Clip

        return ClipJudge(Clip(self.clip, self.device), self.word)

    def fingerprint(self) -> dict[str, Any]:
        found = {"base": content_hash(base_path(self.base)), "dtype": self.dtype, "text by": self.text}
        found["unet"] = None if self.unet is None else content_hash(Path(self.unet))
        found["faces"] = "embedded" if self.faces == "embedded" else content_hash(Path(self.faces))
        found["clip"] = None if self.clip is None else content_hash(Path(self.clip))
        return {**found, "word": self.word if self.text == "clip" else None}


@dataclass(frozen=True)
class Job:
    """All that the work on a name hangs on; pickled to the workers."""

    models: Models
    config: AugmentConfig
    prompts: Sequence[Prompt]
    source_prompts: Sequence[Prompt] = field(default=SOURCE_PROMPTS)

    def build(self) -> Unit:
        """The worker of this process."""
        base, faces, texts = self.models.build(self.config)
        return Unit(Drawer(base, self.config), faces, texts, self.config, self.source_prompts, self.prompts)

    def fingerprint(self) -> dict[str, Any]:
        """The data set's settings."""
        import dataclasses

        free = {f.name for f in dataclasses.fields(self.config) if about(f).free}
        config = {k: v for k, v in as_dict(self.config).items() if k not in free}
        listed = {
            "source prompts": [p.text for p in self.source_prompts],
            "prompts": [[p.text, dict(p.labels)] for p in self.prompts],
        }
        return {**config, **self.models.fingerprint(), **listed}


def base_path(name: str) -> Path:
    """Where a base's files are.

    Raises:
        InputError: a hub id, whose files may change under the same name.
    """
    if name == TINY_SD:
        return Path(__file__).resolve().parents[2] / "assets" / "tiny_sd"
    if not Path(name).is_dir():
        raise InputError(f'augment: base is "{TINY_SD}" or the folder of a pipeline in diffusers\' layout, got {name}')
    return Path(name)


def content_hash(path: Path) -> str:
    """A short hash of a file, or of a folder's weights and settings: of sizes and of the ends of each file, since whole
    ones take minutes.

    Raises:
        InputError: it is not there.
    """
    if not path.exists():
        raise InputError(f"augment: there is no {path}")
    kinds = (".safetensors", ".bin", ".json", ".txt", ".onnx", ".model")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in kinds)
    h = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        h.update(f"{file.relative_to(path.parent if path.is_file() else path).as_posix()} {size}\n".encode())
        with open(file, "rb") as f:
            h.update(f.read(1 << 20))
            f.seek(max(0, size - (1 << 20)))
            h.update(f.read(1 << 20))
    return f"sha256:{h.hexdigest()[:32]}"
