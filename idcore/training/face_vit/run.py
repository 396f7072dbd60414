"""`idcore train face-vit`, callable from Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ...encoders.face_vit import FaceViT
from ...weights import read_safetensors
from ...workflows import writable_folder
from ..commands import Say, TrainArguments, run_training, silent
from ..loop import train
from ..processes import device_of
from .config import DRAWN, FaceViTTrainConfig, load_config
from .data import open_data
from .task import FaceClassifier, FaceViTTask

__all__ = ["load_vit", "new_vit", "run_command", "train_face_vit"]


def train_face_vit(
    config: FaceViTTrainConfig,
    data: str | Path,
    out: str | Path,
    *,
    resume: bool = False,
    allow_change: Sequence[str] = (),
    say: Say = silent,
) -> Path:
    """Train a face ViT for identification.

    Args:
        config: all settings.
        data: folders of people, PERSON/*.jpg, as they are or prepared; or "drawn".
        out: folder of the run.
        resume, allow_change: see `loop.train`.
        say: gets lines about the data.

    Returns:
        OUT/model; or the newest checkpoint's folder where `loop.stop_at` ended the run early.

    Raises:
        InputError, WeightsError, TrainingStopped: see `loop.train`.
    """
    out = writable_folder(Path(out))
    source, people, exam = open_data(str(data), out, config, say)
    vit = new_vit(config)
    say(f"{people} people, {len(source)} pictures; {sum(p.numel() for p in vit.parameters()) / 1e6:.1f} M parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.loop.seed + 1)
        module = FaceClassifier(vit.requires_grad_(True), people).to(device_of(config.loop))
    task = FaceViTTask(module, config, exam)
    return train(task, source, config.loop, out, resume=resume, settings=config, allow_change=allow_change)


def new_vit(config: FaceViTTrainConfig) -> FaceViT:
    """With new weights, the same for the same `loop.seed`; or those of `vit.init`, read at `vit.image_size`."""
    c = config.vit
    if c.init is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.loop.seed)
            return FaceViT(c.sizes())
    return load_vit(c.init, image_size=c.image_size)


def load_vit(path: str | Path, image_size: int | None = None, head: str = "auto") -> FaceViT:
    """A ViT in timm's key names; the number of heads from the file where this project wrote it."""
    tensors, about = read_safetensors(path, what="face ViT weights")
    heads = int(about["heads"]) if about.get("heads", "").isdigit() else None
    return FaceViT.from_tensors(tensors, path, image_size=image_size, heads=heads, head=head)


def run_command(data: str | None, arguments: TrainArguments) -> list[str]:
    """What `idcore train face-vit` does; see its --help. Raises InputError: --data or --out is missing."""
    a = arguments
    settings = load_config(a.config, a.changes, drawn=data == DRAWN)

    def go(config: FaceViTTrainConfig, out: Path) -> Path:
        return train_face_vit(config, data, out, resume=a.resume, allow_change=a.allow_change, say=a.say)

    use = "idcore train dreamidentity --vit {made}/face_vit.safetensors"
    return run_training("face-vit", a, settings, go, needed=[("--data FOLDER (or drawn)", data)], use=use)
