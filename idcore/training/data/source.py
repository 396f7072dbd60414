"""Prepared data as the training loop's `Source`: batches from the index, the pictures and the caches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...encoders.images import load_image
from ...errors import InputError
from ...files import file_hash, first_few
from ..contract import Base, Batch, Step
from ..settings import setting
from ..settings_out import as_dict
from .buckets import Crop, bucket_of, bucket_sizes, crop_for
from .caches import Caches
from .latents import probe, same_probe
from .options import Record
from .order import Order
from .parts import NAME as PARTS
from .parts import parts_in_crop
from .reading import read_bytes
from .steps import in_threads, places_of
from .texts import DiskTexts


@dataclass(frozen=True)
class SourceConfig:
    """How prepared data is read. Part of a training run's settings."""

    resolution: int = setting(0, "Buckets anew with this many pixels squared; 0: as prepared", low=0)
    crop: Literal["face", "random", "centre"] = setting("face", "Where pictures are cut; face: so that it is inside")
    flip: float = setting(0.0, "Share of mirrored pictures (data prepared with flip)", low=0, high=1)
    latents: bool = setting(True, "Take cached latents where there are some; crop and flip are theirs then")
    texts: bool = setting(True, "Take encoded captions from disk where there are some", free=True)
    threads: int = setting(2, "Threads that read pictures", low=1, free=True)
    verify: bool = setting(True, "Compare each picture with the hash that it was prepared with", free=True)

    def check(self) -> None:
        """All values go together."""


class PreparedSource:
    """Batches of a folder made by `idcore prepare`; see `idcore.training.contract.Source`.

    The order is a function of (records, seed, step, size of the global batch): nothing is remembered, and reading in
    several threads changes nothing. All samples of a step are of one bucket.

    Args:
        folder: the prepared folder.
        config: how it is read.
        data: where the pictures are, if they were moved since.
        wanted: settings that the data must have been prepared with, such as {"faces system": "pulid"}.

    Raises:
        InputError: not prepared, not to the end, changed since, or with other settings than wanted.
    """

    def __init__(
        self,
        folder: str | Path,
        config: SourceConfig | None = None,
        *,
        data: str | Path | None = None,
        wanted: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.config = Path(folder), config or SourceConfig()
        self.manifest = read_manifest(self.folder)
        self.settings: dict[str, Any] = self.manifest["settings"]
        _check_wanted(self.folder, self.settings, wanted or {})
        self.records = read_index(self.folder, self.manifest)
        self.root = Path(data or self.manifest["data"])
        self.caches = Caches(self.folder, self.manifest["features"])
        self.latents = self.caches.latents_of(self.manifest["index"]) if self.config.latents else None
        kept = self.config.texts and (self.folder / "texts.json").is_file()
        self.texts = DiskTexts(self.folder, self.records, self.manifest["index"]) if kept else None
        self._sizes = self._buckets()
        self._check_options()
        self._order = lru_cache(maxsize=4)(self._ordered)
        self._pool = ThreadPoolExecutor(self.config.threads, thread_name_prefix="idcore-data")

    def __len__(self) -> int:
        return len(self.records)

    def state(self) -> dict[str, Any]:
        """Fingerprint of the data and of how it is read."""
        free = ("texts", "threads", "verify")
        told = {k: v for k, v in as_dict(self.config).items() if k not in free}
        base = None if self.latents is None else self.latents["base"]
        settings = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()
        return {"index": self.manifest["index"], "settings": f"sha256:{settings}", "latents": base, **told}

    def check_base(self, base: Base) -> None:
        """Raise InputError where cached latents or texts are of another autoencoder or text encoders than base's."""
        if self.texts is not None:
            self.texts.check_base(base)
        if self.latents is None:
            return
        mine = probe(base, tuple(self.latents["bucket"]))
        if not same_probe(self.latents["probe"], mine):
            raise InputError(
                f"{self.folder} holds latents of {self.latents['base']!r}, {base.name!r} has another autoencoder; "
                "prepare the data for it, or set latents = false"
            )

    def bucket(self, record: Record) -> tuple[int, int]:
        """Width and height that a record is trained at."""
        if self._sizes is None:
            return tuple(record.bucket)
        return bucket_of(*record.size, self._sizes)

    def micro_batches(self, step: int, seed: int, rank: int, world: int, size: int, count: int) -> Iterator[Batch]:
        """See `Source`. Raises InputError where a picture is gone or changed."""
        parts = places_of(step, rank, world, size, count)
        chosen, dice = self._order(seed, world * size * count).at(step), Step(seed, step, step + 1)
        for places, samples in in_threads(self._pool, lambda p: self._sample(int(chosen[p]), p, dice), parts):
            yield _batch(samples, places)

    def close(self) -> None:
        """End the reading threads."""
        self._pool.shutdown(cancel_futures=True)

    def _buckets(self) -> tuple[tuple[int, int], ...] | None:
        if not self.config.resolution or self.config.resolution == self.settings["resolution"]:
            return None
        return bucket_sizes(self.config.resolution, self.settings["multiple"], self.settings["max_aspect"])

    def _check_options(self) -> None:
        if self.config.flip and not self.settings["flip"]:
            raise InputError(
                f"{self.folder} was prepared without mirrored face features, so flip must be 0, got "
                f"{self.config.flip}; prepare it with flip = true"
            )
        if self.latents is not None and (self._sizes is not None or self.config.flip):
            raise InputError(
                f"{self.folder} holds latents at {self.settings['resolution']} pixels, not mirrored; resolution and "
                "flip cannot be set beside them. Set latents = false to encode pictures while training"
            )

    def _ordered(self, seed: int, batch: int) -> Order:
        found: dict[tuple[int, int], list[int]] = {}
        for i, r in enumerate(self.records):
            found.setdefault(self.bucket(r), []).append(i)
        return Order([np.array(found[k]) for k in sorted(found)], seed, batch)

    def _sample(self, number: int, place: int, dice: Step) -> dict[str, Any]:
        record = self.records[number]
        crop = self._crop(record, place, dice)
        out = {
            "id": record.id, "prompt": record.caption, "sizes": sizes_of(record, crop),
            "landmarks": torch.from_numpy(crop.landmarks(np.array(record.points), record.size)).float(),
            "boxes": torch.from_numpy(crop.box(np.array(record.box), record.size)).float(),
            "face": self.caches.face(record, crop.flip),
        }  # fmt: skip
        if PARTS in out["face"]:
            out[PARTS] = parts_in_crop(out["face"].pop(PARTS), crop)
        if self.latents is not None:
            out["latents"] = self.caches.latent(record)
        else:
            content = self._content(record)
            out["pixels"] = pixels_of(load_image(content, max_pixels=self.settings["max_pixels"]), crop)
        return out

    def _crop(self, record: Record, place: int, dice: Step) -> Crop:
        bucket = self.bucket(record)
        if self.latents is not None:
            return crop_for(record.size, bucket, record.box)
        where = torch.rand(3, generator=dice.generator("crop", place)).tolist()
        mode, flip = self.config.crop, where[2] < self.config.flip
        return crop_for(record.size, bucket, record.box, (where[0], where[1]), mode=mode, flip=flip)

    def _content(self, record: Record) -> bytes:
        """A picture's file, as it was prepared."""
        try:
            content = read_bytes(self.root, record.file, record.offset, record.length)
        except InputError as e:
            raise InputError(f"{e}; was the data moved or changed? Run `idcore prepare` again") from e
        if self.config.verify and f"sha256:{hashlib.sha256(content).hexdigest()}" != record.hash:
            raise InputError(
                f"{self.root / record.file} ({record.id}) has changed since it was prepared; run `idcore prepare` again"
            )
        return content


def pixels_of(picture: Image.Image, crop: Crop) -> Tensor:
    """The crop [3, H, W] float32 in -1..1."""
    if picture.size != (crop.width, crop.height):
        # Only what the crop needs is resampled; the part's edges may be fractions of a pixel.
        sx, sy = picture.width / crop.width, picture.height / crop.height
        area = (crop.left * sx, crop.top * sy, (crop.left + crop.bucket[0]) * sx, (crop.top + crop.bucket[1]) * sy)
        picture = picture.resize(crop.bucket, Image.Resampling.LANCZOS, box=area)
    else:
        picture = picture.crop((crop.left, crop.top, crop.left + crop.bucket[0], crop.top + crop.bucket[1]))
    if crop.flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()
    return (x / 127.5 - 1).contiguous()


def sizes_of(record: Record, crop: Crop) -> Tensor:
    """[6] float32: original height, width; crop top, left; target height, width (arXiv 2307.01952, section 2.2)."""
    w, h = record.size
    left = crop.width - crop.bucket[0] - crop.left if crop.flip else crop.left
    return torch.tensor([h, w, crop.top, left, crop.bucket[1], crop.bucket[0]], dtype=torch.float32)


def _batch(samples: list[dict[str, Any]], places: Sequence[int]) -> Batch:
    def stack(key: str) -> Tensor | None:
        return torch.stack([s[key] for s in samples]) if key in samples[0] else None

    extra = {k: stack(k) for k in ("landmarks", "boxes", PARTS) if k in samples[0]}
    face = {k: torch.stack([s["face"][k] for s in samples]) for k in samples[0]["face"]}
    return Batch(
        ids=[s["id"] for s in samples], places=torch.tensor(places, dtype=torch.int64),
        prompts=[s["prompt"] for s in samples], pixels=stack("pixels"), latents=stack("latents"),
        sizes=stack("sizes"), face=face, extra=extra,
    )  # fmt: skip


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises InputError where the folder is not prepared, or not to the end."""
    file = folder / "manifest.json"
    if not file.is_file():
        begun = (folder / "settings.json").is_file()
        raise InputError(
            f"{folder} was not prepared to the end; run the same `idcore prepare` again to go on"
            if begun
            else f"{folder} holds no prepared data; make it with `idcore prepare DATA --out {folder}`"
        )
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not {"settings", "index", "data", "features"} <= set(found):
            raise ValueError("keys are missing")
    except (OSError, ValueError) as e:
        raise InputError(f"{file} is damaged: {e}; run `idcore prepare` again") from e
    return found


def read_index(folder: Path, manifest: Mapping[str, Any]) -> list[Record]:
    """All records. Raises InputError where the index is not the manifest's, or is empty."""
    file = folder / "index.jsonl"
    if not file.is_file() or file_hash(file) != manifest["index"]:
        raise InputError(f"{file} is not the one that was prepared; run `idcore prepare` again")
    with open(file, encoding="utf-8") as f:
        records = [Record(**json.loads(line)) for line in f]
    if not records:
        reasons = ", ".join(f"{k} {v}" for k, v in manifest.get("dropped", {}).items())
        raise InputError(f"{folder} holds no picture: all {manifest.get('pictures')} were dropped ({reasons})")
    return records


def _check_wanted(folder: Path, settings: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    differ = [f"{k} = {settings.get(k)!r}, wanted {v!r}" for k, v in wanted.items() if settings.get(k) != v]
    if differ:
        raise InputError(f"{folder} was prepared with {first_few(differ, 3)}; prepare the data for this run")
