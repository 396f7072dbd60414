"""A few pictures in one or several groups as the training loop's `Source`: concepts, styles, class pictures.

    FewPictures([
        Group("me/", prompts=("a photo of sks person",)),
        Group("people/", prompts=("a photo of a person",)),
    ], size=512)

Everything is decoded once, when the source is made. Faces are not its matter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...encoders.images import MAX_PIXELS, ImageLike, load_image
from ...errors import InputError
from ...files import first_few
from ..contract import Base, Batch, Step
from .buckets import Crop, crop_for
from .order import shuffled
from .reading import read_bytes, root_of, scan
from .source import pixels_of, sizes_of
from .steps import places_of

Pictures = str | Path | Sequence[ImageLike]


@dataclass(frozen=True, eq=False)
class Group:
    """Pictures that share prompts and a share of every batch.

    Attributes:
        pictures: a folder (all pictures below it; .txt captions beside them and metadata.jsonl are read), one file, or
            a sequence of paths and PIL pictures.
        prompts: one is drawn for each sample. Empty: each picture's caption is its prompt.
        captions: one for each picture, in place of those that lie beside them.
        share: of the samples, relative to the other groups' shares; > 0.
        name: in the ids of samples and in errors.
    """

    pictures: Pictures
    prompts: Sequence[str] = ()
    captions: Sequence[str] | None = None
    share: float = 1.0
    name: str = ""


@dataclass(eq=False)
class _Picture:
    id: str
    scaled: Image.Image  # covers the sample's size
    size: tuple[int, int]  # of the file: width, height
    prompts: tuple[str, ...]
    latents: dict[bool, Tensor] | None = None  # by whether it is mirrored


class FewPictures:
    """Batches of few pictures; see `idcore.training.contract.Source`.

    Which picture, prompt, crop and mirroring a sample has hangs on (seed, step, place, size of the global batch) alone.
    Groups alternate as evenly as their shares allow: where the shares of the global batch are whole numbers, each batch
    has exactly those. Within a group every picture is drawn once before any is drawn again.

    `extra["group"]` [B] int64 is the number of each sample's group; `pixels` [B, 3, H, W] in -1..1; `sizes` [B, 6].

    Args:
        groups: at least one.
        size: of the samples in pixels, one side or (height, width); pictures are scaled to cover it and cut.
        flip: share of mirrored samples, 0..1.
        crop: "centre", or "random": anywhere.
        max_pixels: of one picture.

    Attributes:
        shares: of the groups, sum 1.

    Raises:
        InputError: no groups or pictures, pictures that cannot be read (all are named), no prompt for a picture, or an
            argument out of range.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        size: int | tuple[int, int],
        *,
        flip: float = 0.0,
        crop: Literal["centre", "random"] = "centre",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.flip, self.crop = flip, crop
        _check(groups, self.size, flip, crop)
        self.names = [g.name or f"group{i}" for i, g in enumerate(groups)]
        self.groups = [_read(g, name, self.size, max_pixels) for g, name in zip(groups, self.names)]
        total = sum(g.share for g in groups)
        self.shares = tuple(g.share / total for g in groups)
        self._order = lru_cache(maxsize=4 * len(groups))(self._shuffled)

    def __len__(self) -> int:
        return sum(map(len, self.groups))

    def state(self) -> dict[str, Any]:
        """Fingerprint of pictures, prompts and how they are read."""
        h = hashlib.sha256()
        for group in self.groups:
            for p in group:
                h.update(json.dumps([p.id, p.prompts, p.size]).encode() + p.scaled.tobytes())
        counts = {name: len(g) for name, g in zip(self.names, self.groups)}
        return {
            "pictures": f"sha256:{h.hexdigest()}", "counts": counts, "shares": list(self.shares),
            "size": list(self.size), "flip": self.flip, "crop": self.crop,
        }  # fmt: skip

    def pictures(self, group: int) -> list[Image.Image]:
        """A group's pictures as they are trained on (cut in the middle)."""
        size = self.size[::-1]
        found = ((p.scaled, self._crop(p, (0.5, 0.5), False)) for p in self.groups[group])
        return [x.crop((c.left, c.top, c.left + size[0], c.top + size[1])) for x, c in found]

    def prompts(self) -> list[str]:
        """All prompts that can come, each once: to encode them before the text encoders go."""
        return list(dict.fromkeys(t for g in self.groups for p in g for t in p.prompts))

    def keep_latents(self, base: Base) -> FewPictures:
        """Encode every picture once; batches then hold `latents` too. Random crops cannot be kept (InputError)."""
        if self.crop != "centre":
            raise InputError('few pictures: crop is "random", so no latents can be kept; set crop to "centre"')
        for p in (p for g in self.groups for p in g):
            ways = {False, *([True] if self.flip else [])}
            p.latents = {
                way: base.encode_pictures(pixels_of(p.scaled, self._crop(p, (0.5, 0.5), way))[None])[0].float().cpu()
                for way in sorted(ways)
            }
        return self

    def micro_batches(self, step: int, seed: int, rank: int, world: int, size: int, count: int) -> Iterator[Batch]:
        """See `Source`. Raises InputError for numbers out of range."""
        parts, whole = places_of(step, rank, world, size, count), world * size * count
        drawn = turns(self.shares, step * whole, whole)
        dice = Step(seed, step, step + 1)
        for places in parts:
            yield _batch([self._sample(*drawn[p], p, dice) for p in places], places)

    def _shuffled(self, seed: int, group: int, epoch: int) -> np.ndarray:
        return shuffled(len(self.groups[group]), seed, epoch, group + 1)

    def _sample(self, group: int, turn: int, place: int, dice: Step) -> dict[str, Any]:
        pictures = self.groups[group]
        p = pictures[self._order(dice.seed, group, turn // len(pictures))[turn % len(pictures)]]
        x, y, mirror, word = torch.rand(4, generator=dice.generator("few", place)).tolist()
        flip = mirror < self.flip
        crop = self._crop(p, (x, y), flip)
        size = SimpleNamespace(size=p.size)
        return {
            "id": p.id, "prompt": p.prompts[int(word * len(p.prompts))], "pixels": pixels_of(p.scaled, crop),
            "latents": None if p.latents is None else p.latents[flip], "sizes": sizes_of(size, crop), "group": group,
        }  # fmt: skip

    def _crop(self, p: _Picture, where: tuple[float, float], flip: bool) -> Crop:
        return crop_for(p.size, self.size[::-1], (0, 0, 0, 0), where, mode=self.crop, flip=flip)


def turns(shares: Sequence[float], first: int, count: int) -> list[tuple[int, int]]:
    """(group, how many of this group came before) of the samples `first` .. `first + count - 1` of an endless row.

    Group k's j-th sample stands at time (j + 1/2) / share_k, and the row is in the order of the times: after n samples
    no group is off its share of n by more than the number of groups.
    """
    early = max(0.0, first - 2.0 * len(shares))
    begin = [int(early * s + 0.5) for s in shares]
    end = first + count + 2.0 * len(shares)
    found = []
    for k, (share, j) in enumerate(zip(shares, begin)):
        while (j + 0.5) / share <= end:
            found.append(((j + 0.5) / share, k, j))
            j += 1
    skipped = first - sum(begin)
    return [(k, j) for _, k, j in sorted(found)[skipped : skipped + count]]


def _batch(samples: list[dict[str, Any]], places: list[int]) -> Batch:
    latents = [s["latents"] for s in samples]
    return Batch(
        ids=[s["id"] for s in samples], places=torch.tensor(places, dtype=torch.int64),
        prompts=[s["prompt"] for s in samples], pixels=torch.stack([s["pixels"] for s in samples]),
        latents=None if latents[0] is None else torch.stack(latents),
        sizes=torch.stack([s["sizes"] for s in samples]), extra={"group": torch.tensor([s["group"] for s in samples])},
    )  # fmt: skip


def _check(groups: Sequence[Group], size: tuple, flip: float, crop: str) -> None:
    if not groups:
        raise InputError("few pictures: no group; give at least one Group(pictures, prompts=...)")
    if len(size) != 2 or not all(isinstance(s, int) and s > 0 for s in size):
        raise InputError(f"few pictures: size is a positive number of pixels or (height, width), got {size}")
    if not 0 <= flip <= 1:
        raise InputError(f"few pictures: flip is a share from 0 to 1, got {flip}")
    if crop not in ("centre", "random"):
        raise InputError(f'few pictures: crop is "centre" or "random", got {crop!r}')
    for i, g in enumerate(groups):
        name = g.name or f"group{i}"
        if not 0 < g.share < float("inf"):
            raise InputError(f"few pictures, {name}: share must be above 0, got {g.share}")
        if isinstance(g.prompts, str) or not all(isinstance(p, str) for p in g.prompts):
            raise InputError(f"few pictures, {name}: prompts is a sequence of texts, got {g.prompts!r:.80}")


def _read(group: Group, name: str, size: tuple[int, int], max_pixels: int) -> list[_Picture]:
    """The group's pictures, decoded; all that is wrong with them in one error."""
    found = _found(group.pictures, name)
    captions = [c for _, c, _ in found] if group.captions is None else list(group.captions)
    if len(captions) != len(found):
        raise InputError(f"few pictures, {name}: {len(captions)} captions for {len(found)} pictures; give one for each")
    silent = [i for (i, _, _), c in zip(found, captions) if not c]
    if not group.prompts and silent:
        raise InputError(
            f"few pictures, {name}: {len(silent)} of {len(found)} pictures have no caption: {first_few(silent, 3)}; "
            "put .txt files beside them, or give prompts for the group"
        )
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(lambda f: _decoded(f[2], size, max_pixels), found))
    bad = [f"{i}: {why}" for (i, _, _), why in zip(found, read) if isinstance(why, str)]
    if bad:
        raise InputError(
            f"few pictures, {name}: {len(bad)} of {len(found)} cannot be used: {'; '.join(bad[:3])}"
            + (f"; and {len(bad) - 3} more" if len(bad) > 3 else "")
            + ". Remove or replace them"
        )
    said = [tuple(group.prompts) or (c,) for c in captions]
    return [_Picture(f"{name}/{i}", *picture, p) for (i, _, _), picture, p in zip(found, read, said)]


def _found(pictures: Pictures, name: str) -> list[tuple[str, str | None, Any]]:
    """(id, caption, what to decode: a function or a picture) of everything that is there."""
    if isinstance(pictures, (str, Path)):
        path = Path(pictures).expanduser()
        if path.is_file() and path.suffix != ".tar":
            return [(path.name, None, path)]
        try:
            entries, root = scan(path), root_of(path)
        except InputError as e:
            raise InputError(f"few pictures, {name}: {e}") from e
        return [(e.id, e.caption, (lambda e=e: _bytes(root, e))) for e in entries]
    listed = list(pictures)
    if not listed:
        raise InputError(f"few pictures, {name}: an empty list; give at least one picture")
    paths = [Path(p) if isinstance(p, (str, Path)) else None for p in listed]
    return [(str(i) if p is None else f"{i}-{p.name}", None, listed[i]) for i, p in enumerate(paths)]


def _bytes(root: Path, entry: Any) -> bytes:
    if entry.problem is not None:
        raise InputError(f"{entry.problem[0]} ({entry.problem[1]})")
    return read_bytes(root, entry.file, entry.offset, entry.length)


def _decoded(source: Any, size: tuple[int, int], max_pixels: int) -> tuple[Image.Image, tuple[int, int]] | str:
    """The picture scaled to cover the samples, and its own size; or why there is none."""
    try:
        picture = load_image(source() if callable(source) else source, max_pixels=max_pixels)
    except InputError as e:
        return str(e)
    crop = crop_for(picture.size, size[::-1], (0, 0, 0, 0), mode="centre")
    return picture.resize((crop.width, crop.height), Image.Resampling.LANCZOS), picture.size
