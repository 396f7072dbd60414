"""Pairs of `idcore augment` as the training loop's `Source`: a face to read, and the edited picture to draw.

DreamIdentity's second source (arXiv 2307.00300, self-augmented editability learning): the encoder sees the source face,
the prompt says `S*` where the name stood, the target is the edited picture.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...encoders.align import TEMPLATES, align
from ...encoders.images import load_image
from ...errors import InputError
from ...files import file_hash
from ..augment.options import PERSON, Pair
from ..augment.store import FORMAT
from ..contract import Batch
from .order import Order
from .reading import read_bytes
from .steps import in_threads, places_of


class PairSource:
    """Batches of an augmented data set; see `idcore.training.contract.Source`.

    Of each sample: `prompts` with the placeholder in it, `pixels` [B, 3, H, W] the edited picture in -1..1,
    `face["crop"]` [B, 3, S, S] the aligned face of the source picture in -1..1 as `encoders.face_crops.FaceCrops` cuts
    it, `extra["landmarks"]` [B, 5, 2] and `extra["boxes"]` [B, 4] of the edited face, in pixels of `pixels`.

    Args:
        folder: made by `idcore augment`.
        size: H and W of the edited pictures in pixels.
        crop: S, side of the source's face in pixels.
        placeholder: stands for the person in prompts.
        template: how the face is cut out, as in `FaceCrops`.
        verify: compare each picture with the hash that it was written with.
        threads: that read pictures.

    Raises:
        InputError: no such data set, not made to the end, changed since, empty, or arguments that do not fit.
    """

    def __init__(
        self,
        folder: str | Path,
        size: int,
        crop: int,
        *,
        placeholder: str = "S*",
        template: str = "arcface",
        verify: bool = True,
        threads: int = 2,
    ) -> None:
        if template not in TEMPLATES or min(size, crop, threads) < 1 or not placeholder.strip():
            raise InputError(
                f"pairs: wanted sizes above 0, a placeholder and a template of {', '.join(TEMPLATES)}, got size "
                f"{size}, crop {crop}, threads {threads}, placeholder {placeholder!r}, template {template!r}"
            )
        self.folder, self.size, self.crop = Path(folder), size, crop
        self.placeholder, self.template, self.verify = placeholder, template, verify
        self.manifest = read_manifest(self.folder)
        self.pairs = read_pairs(self.folder, self.manifest)
        self._order = lru_cache(maxsize=4)(self._ordered)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="idcore-pairs")

    def __len__(self) -> int:
        return len(self.pairs)

    def prompts(self) -> list[str]:
        """All prompts that can come, each once: to encode them before the text encoders go."""
        return list(dict.fromkeys(self._prompt(p) for p in self.pairs))

    def state(self) -> dict[str, Any]:
        """Fingerprint of the pairs and of how they are read."""
        keys = ("size", "crop", "placeholder", "template")
        return {"pairs": self.manifest["index"], **{k: getattr(self, k) for k in keys}}

    def micro_batches(self, step: int, seed: int, rank: int, world: int, size: int, count: int) -> Iterator[Batch]:
        """See `Source`: every pair is drawn once before any is drawn again. Raises InputError where a picture is gone
        or changed, or for numbers out of range."""
        parts = places_of(step, rank, world, size, count)
        chosen = self._order(seed, world * size * count).at(step)
        for places, samples in in_threads(self._pool, lambda p: self._sample(self.pairs[int(chosen[p])]), parts):
            yield _batch(samples, places)

    def close(self) -> None:
        """End the reading threads."""
        self._pool.shutdown(cancel_futures=True)

    def _ordered(self, seed: int, batch: int) -> Order:
        return Order([np.arange(len(self.pairs))], seed, batch)

    def _prompt(self, pair: Pair) -> str:
        return pair.prompt.replace(PERSON, self.placeholder)

    def _sample(self, pair: Pair) -> dict[str, Any]:
        edited = self._picture(pair.edited, pair.edited_hash)
        source = self._picture(pair.source, pair.source_hash)
        chip = align(source, np.array(pair.points, np.float32), self.template, self.crop)
        scale = self.size / edited.width
        if edited.size != (self.size, self.size):
            edited = edited.resize((self.size, self.size), Image.Resampling.LANCZOS)
        points, box = (torch.tensor(v, dtype=torch.float64) for v in (pair.edited_points, pair.edited_box))
        return {
            "id": pair.id, "prompt": self._prompt(pair), "pixels": _pixels(np.asarray(edited)),
            "crop": _pixels(chip), "landmarks": ((points + 0.5) * scale - 0.5).float(),
            "boxes": ((box + 0.5) * scale - 0.5).float(),
        }  # fmt: skip

    def _picture(self, file: str, wanted: str) -> Image.Image:
        content = read_bytes(self.folder, file, None, None)
        if self.verify and f"sha256:{hashlib.sha256(content).hexdigest()}" != wanted:
            raise InputError(
                f"{self.folder / file} has changed since it was made; remove it and run the same `idcore augment` again"
            )
        return load_image(content)


def read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json of an augmented data set. Raises InputError where it is none, or not made to the end."""
    file = folder / "manifest.json"
    if not file.is_file():
        begun = (folder / "settings.json").is_file() and (folder / "names").is_dir()
        raise InputError(
            f"{folder} was not made to the end; run the same `idcore augment` again to go on"
            if begun
            else f"{folder} holds no pairs; make them with `idcore augment --out {folder}`"
        )
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found.get("format") != FORMAT or "index" not in found:
            raise ValueError(f"it is of format {found.get('format')!r}, wanted {FORMAT!r}")
    except (OSError, ValueError, AttributeError) as e:
        raise InputError(f"{file} is not that of `idcore augment`: {e}") from e
    return found


def read_pairs(folder: Path, manifest: dict[str, Any]) -> list[Pair]:
    """All pairs. Raises InputError where the index is not the manifest's, or is empty."""
    file = folder / "index.jsonl"
    if not file.is_file() or file_hash(file) != manifest["index"]:
        raise InputError(f"{file} is not the one that was made; run the same `idcore augment` again")
    with open(file, encoding="utf-8") as f:
        pairs = [Pair(**json.loads(line)) for line in f]
    if not pairs:
        raise InputError(f"{folder} holds no pair; its dropped.jsonl says why")
    return pairs


def _pixels(a: np.ndarray) -> Tensor:
    """uint8 [H, W, 3] to float32 [3, H, W] in -1..1."""
    return (torch.from_numpy(np.array(a)).permute(2, 0, 1).float() / 127.5 - 1).contiguous()


def _batch(samples: list[dict[str, Any]], places: Sequence[int]) -> Batch:
    def stack(key: str) -> Tensor:
        return torch.stack([s[key] for s in samples])

    return Batch(
        ids=[s["id"] for s in samples], places=torch.tensor(places, dtype=torch.int64),
        prompts=[s["prompt"] for s in samples], pixels=stack("pixels"), face={"crop": stack("crop")},
        extra={"landmarks": stack("landmarks"), "boxes": stack("boxes")},
    )  # fmt: skip
