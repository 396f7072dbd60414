"""A base model by its name on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import InputError, WeightsError
from .latent import LatentBase

TINY_SD = "tiny-sd"
_WANTED = (
    '"tiny-sd" (the embedded model of drawn people), or a folder or cached hub id with a Stable Diffusion 1.x, '
    "2.x or SDXL pipeline in diffusers' layout"
)


def open_base(name: str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Any:
    """A frozen base (`contract.Base`) for training.

    Args:
        name: "tiny-sd" or a folder of `idcore train tiny-sd`; a folder in diffusers' layout, or a hub id that is there
            already; "tiny" or a folder of `idcore train tiny`, which draws an average face.
        dtype: of UNet and text encoders; the embedded models stay float32.
        device: of everything.

    Raises:
        WeightsError: nothing of the kind is there, or it does not load.
    """
    from .tiny import TinyBase

    folder = Path(name)
    if name == "tiny":
        return TinyBase.from_package(somebody=True).to(device)
    if name == TINY_SD or is_tiny_sd(folder):
        from .tiny_sd import TinySDBase

        return (TinySDBase.from_package() if name == TINY_SD else TinySDBase.from_folder(folder)).to(device)
    if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
        return TinyBase.from_folder(name, somebody=True).to(device)
    from .sd15 import SD15Base
    from .sdxl import SDXLBase

    known = {"StableDiffusionPipeline": SD15Base, "StableDiffusionXLPipeline": SDXLBase}
    kind = _pipeline_class(name)
    if kind not in known:
        raise WeightsError(f"base model {name} is a {kind}; wanted {_WANTED}")
    return known[kind].from_pretrained(name, dtype=dtype, device=device)


def open_text_base(name: str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> LatentBase:
    """As `open_base`, for systems that act through the text encoders.

    Raises:
        InputError: "tiny", which has none.
    """
    base = open_base(name, dtype=dtype, device=device)
    if not isinstance(base, LatentBase):
        raise InputError(f"base model {name}: it has no text encoder; give {_WANTED}")
    return base


def face_points(base: Any, edge: int) -> np.ndarray | None:
    """Where a base draws the five points of every face, [5, 2] pixels of a picture of this edge; None: anywhere.

    The shipped models learned from pictures that are all framed alike: as the recogniser's wide chip.
    """
    if not getattr(base, "faces_in_one_place", False):
        return None
    from ...encoders.align import template
    from ...systems.tiny import WIDE_PADDING

    return template("dlib", edge, WIDE_PADDING) - 0.5


def analyzer_for(faces: str, base: Any) -> Any:
    """Who finds faces in what a base draws: `faces` as `encoders.analyzer.analyzer_from` takes it; the embedded
    detector finds the drawn people of the shipped models at a lower score. `base`: the base, or its name."""
    from ...encoders.analyzer import EmbeddedAnalyzer, analyzer_from
    from ...metrics.gate import MIN_SCORE

    drawn = _draws_people(base) if isinstance(base, str) else getattr(base, "faces_in_one_place", False)
    return EmbeddedAnalyzer(min_score=MIN_SCORE) if drawn and faces == "embedded" else analyzer_from(faces)


def _draws_people(name: str) -> bool:
    folder = Path(name)
    return name in ("tiny", TINY_SD) or (
        (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()
    )


def is_tiny_sd(folder: Path) -> bool:
    """A result of `idcore train tiny-sd` (that of `idcore train tiny` has the same files)."""
    try:
        return json.loads((folder / "config.json").read_text())["kind"] == TINY_SD
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _pipeline_class(name: str) -> str:
    from diffusers import DiffusionPipeline

    if Path(name).exists() and not (Path(name) / "model_index.json").is_file():
        raise WeightsError(f"base model {name} has no model_index.json; wanted {_WANTED}")
    try:
        return str(DiffusionPipeline.load_config(name, local_files_only=True)["_class_name"])
    except (OSError, ValueError, KeyError) as e:
        raise WeightsError(f"base model {name} is not there ({type(e).__name__}); wanted {_WANTED}") from e
