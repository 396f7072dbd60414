"""Networks that look at whole pictures, always by a path: CLIP, and feature networks for FID and KID.

Nothing is fetched here. A `Looker` turns pictures into vectors; its `key` names the network and the hash of its
weights, so that figures of two networks are never mixed.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from ..encoders.onnx_runtime import sha256_of
from ..errors import InputError, MissingDependencyError, WeightsError


class Looker(Protocol):
    """Pictures (RGB, any size) to float32 vectors [N, D]."""

    key: str
    words: str

    def __call__(self, pictures: Sequence[Image.Image]) -> np.ndarray: ...


class Clip:
    """A CLIP model of transformers from a folder, for text and image scores.

    Attributes:
        key, words: name and hash of the weights; in words.
    """

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu") -> None:
        """Raises WeightsError where the folder is missing or holds no whole CLIP (both towers, processor)."""
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise WeightsError(
                f"CLIP: {folder} has no config.json; wanted a folder with a CLIP model of transformers, such as a copy "
                "of openai/clip-vit-large-patch14 (nothing is downloaded here)"
            )
        try:
            self.model, told = CLIPModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
            self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            self.processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as e:
            raise WeightsError(f"CLIP: {folder} does not load: {str(e).strip().splitlines()[0]}") from e
        if missing := sorted(told["missing_keys"]):
            raise WeightsError(
                f"CLIP: {folder} lacks {len(missing)} tensors ({missing[0]}, ...); wanted text and image towers with "
                "their projections, not one tower alone"
            )
        self.device = torch.device(device)
        self.model = self.model.eval().requires_grad_(False).to(self.device)
        self.key = f"clip:{_folder_hash(folder)[:16]}"
        self.words = f"CLIP {folder.name}"

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """Projected image embeddings [N, D] float32, not normalised."""
        pixels = self.processor(images=[p.convert("RGB") for p in pictures], return_tensors="pt")["pixel_values"]
        seen = self.model.vision_model(pixel_values=pixels.to(self.device)).pooler_output
        return self.model.visual_projection(seen).float().cpu().numpy()

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> np.ndarray:
        """Projected text embeddings [N, D] float32, not normalised; prompts are cut at the model's length."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).to(self.device)
        seen = self.model.text_model(**{k: tokens[k] for k in ("input_ids", "attention_mask")}).pooler_output
        return self.model.text_projection(seen).float().cpu().numpy()


class TorchScriptFeatures:
    """A TorchScript network from a file: uint8 pictures [N, 3, H, W] (0..255, RGB) to features [N, D].

    The form in which Inception-v3 for FID is published as `inception-2015-12-05.pt`; it resizes by itself.
    """

    def __init__(self, path: str | Path, device: str | torch.device = "cpu") -> None:
        path = _existing(path)
        try:
            self.net = torch.jit.load(str(path), map_location=device).eval()
        except (RuntimeError, ValueError) as e:
            raise WeightsError(
                f"features: {path} is no TorchScript network ({str(e).strip().splitlines()[0]:.120}); wanted a file "
                "such as inception-2015-12-05.pt, or torch-fidelity:FILE for its weights"
            ) from e
        self.device = torch.device(device)
        self._options = self._return_features()
        self.key, self.words = f"torchscript:{sha256_of(path)[:16]}", f"TorchScript {path.name}"

    def _return_features(self) -> dict:
        """The published file gives class scores unless told otherwise."""
        names = [a.name for a in self.net.forward.schema.arguments]
        return {"return_features": True} if "return_features" in names else {}

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        rows = []
        for part in _one_size(pictures):
            rows.append(self.net(part.to(self.device), **self._options))
            if rows[-1].ndim != 2 or len(rows[-1]) != len(part):
                got = list(rows[-1].shape)
                raise WeightsError(f"features: {self.words} gives {got} for {len(part)} pictures; wanted [N, D]")
        return torch.cat(rows).float().cpu().numpy()


class FidelityInception:
    """torch-fidelity's Inception-v3 (the FID network of PyTorch papers), weights from a file. Wants torchvision."""

    def __init__(self, path: str | Path, device: str | torch.device = "cpu") -> None:
        path = _existing(path)
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as e:
            raise MissingDependencyError(
                f"features: torch-fidelity:{path.name} needs torch-fidelity and a torchvision that fits this PyTorch "
                f"(pip install 'idcore[fid]'): {e}. A TorchScript Inception needs neither"
            ) from e
        name = "inception-v3-compat"
        self.net = FeatureExtractorInceptionV3(name, ["2048"], feature_extractor_weights_path=str(path)).to(device)
        self.device = torch.device(device)
        self.key, self.words = f"torch-fidelity:{sha256_of(path)[:16]}", f"torch-fidelity Inception-v3 {path.name}"

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        return torch.cat([self.net(p.to(self.device))[0] for p in _one_size(pictures)]).float().cpu().numpy()


class FaceStages:
    """Means of the stages of the embedded face recogniser over the whole picture at 150 x 150: 736 numbers.

    Needs no file, and is our choice for small drawn pictures: its distances compare runs of this project with each
    other and with nothing published.
    """

    key = "face-stages-v1"
    words = "stages of the embedded face recogniser (not comparable with published FID or KID)"

    def __init__(self) -> None:
        from ..encoders.dlib_resnet import DlibResnet

        self.net = DlibResnet("cpu")

    def __call__(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        side = (self.net.size, self.net.size)
        chips = np.stack([np.asarray(p.convert("RGB").resize(side, Image.Resampling.BICUBIC)) for p in pictures])
        return np.concatenate([f.mean((2, 3)) for f in self.net.features(chips).feats], 1).astype(np.float32)


def feature_network(spec: str, device: str | torch.device = "cpu") -> Looker:
    """The network that `spec` names: "embedded", "clip:FOLDER", "torch-fidelity:FILE", or a TorchScript file.

    Raises:
        InputError: an empty name. WeightsError: a file is missing or of another kind. MissingDependencyError.
    """
    kind, _, rest = str(spec).partition(":")
    if not str(spec).strip():
        raise InputError('features: wanted "embedded", clip:FOLDER, torch-fidelity:FILE or a TorchScript file, got ""')
    if spec == "embedded":
        return FaceStages()
    if kind == "clip" and rest:
        return Clip(rest, device)
    if kind == "torch-fidelity" and rest:
        return FidelityInception(rest, device)
    return TorchScriptFeatures(spec, device)


def _existing(path: str | Path) -> Path:
    path = Path(path).expanduser()
    if not path.is_file():
        raise WeightsError(f"features: there is no file {path}; nothing is downloaded here, name one that you have")
    return path


def _one_size(pictures: Sequence[Image.Image]) -> Iterator[torch.Tensor]:
    """Runs of pictures of one size as uint8 [N, 3, H, W], in order."""
    for _, run in itertools.groupby(pictures, key=lambda p: p.size):
        yield torch.from_numpy(np.stack([np.array(p.convert("RGB")) for p in run])).permute(0, 3, 1, 2).contiguous()


def _folder_hash(folder: Path) -> str:
    """Over the files that decide what a model computes."""
    h = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".bin", ".json", ".txt"):
            h.update(f"{path.name} {sha256_of(path)}\n".encode())
    return h.hexdigest()
