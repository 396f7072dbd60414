"""Several sources as one, mixed sample by sample in fixed shares; and the face that an encoder reads of each sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ...encoders.face_crops import crops_of
from ...errors import InputError
from ..contract import Batch, Source, Step
from .few import turns
from .steps import in_threads, places_of


class Mixed:
    """A `Source` of several: which one a place of the global batch draws from hangs on its number alone.

    The shares are kept as evenly as whole numbers allow, within a batch and from batch to batch. Each source is asked
    for one sample after the other of its own endless order (as a global batch of one), so that a run is the same
    however it is divided among processes. All samples of a batch must be of one size.

    `extra["group"]` [B] int64 is the number of each sample's source.

    Args:
        sources: at least one.
        shares: one for each, relative to each other; those of share 0 are left out.
        threads: that read samples.

    Raises:
        InputError: no source, another number of shares, or a share below 0.
    """

    def __init__(self, sources: Sequence[Source], shares: Sequence[float], *, threads: int = 2) -> None:
        if len(sources) != len(shares) or not sources or min(shares) < 0 or not sum(shares) > 0:
            raise InputError(f"mixed data: {len(sources)} sources need as many shares, not below 0, got {list(shares)}")
        self.numbers = [i for i, s in enumerate(shares) if s > 0]
        self.sources = [sources[i] for i in self.numbers]
        self.shares = [shares[i] / sum(shares) for i in self.numbers]
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="idcore-mixed")

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def state(self) -> dict[str, Any]:
        """Fingerprints of all sources, and the shares."""
        return {"shares": self.shares, **{f"source {i}": s.state() for i, s in zip(self.numbers, self.sources)}}

    def check_base(self, base: Any) -> None:
        """Of the sources that have cached latents."""
        for source in self.sources:
            if hasattr(source, "check_base"):
                source.check_base(base)

    def micro_batches(self, step: int, seed: int, rank: int, world: int, size: int, count: int) -> Iterator[Batch]:
        """See `Source`. Raises InputError where samples of one batch differ in size."""
        parts, whole = places_of(step, rank, world, size, count), world * size * count
        drawn = turns(self.shares, step * whole, whole)
        for places, samples in in_threads(self._pool, lambda p: self._sample(*drawn[p], seed), parts):
            yield _joined(samples, places)

    def _sample(self, which: int, number: int, seed: int) -> Batch:
        batch = next(iter(self.sources[which].micro_batches(number, seed, 0, 1, 1, 1)))
        batch.extra["group"] = torch.tensor([self.numbers[which]])
        return batch


def _joined(samples: Sequence[Batch], places: Sequence[int]) -> Batch:
    """Batches of one as one batch: what all of them have."""

    def both(values: Sequence[Tensor | None]) -> Tensor | None:
        return None if any(v is None for v in values) else torch.cat(list(values))

    sizes = {tuple(b.pixels.shape[-2:]) if b.pixels is not None else None for b in samples}
    if len(sizes) > 1:
        told = " and ".join(sorted("x".join(map(str, s)) if s else "cached latents" for s in sizes))
        raise InputError(
            f"mixed data: a batch's samples must be of one size, got {told}; prepare the data with max_aspect=1 and "
            "the resolution of the other source, read with data.latents=false, or set loop.batch=1"
        )
    extra = [k for k in samples[0].extra if all(isinstance(b.extra.get(k), Tensor) for b in samples)]
    face = [k for k in samples[0].face if all(k in b.face for b in samples)]
    return Batch(
        ids=[b.ids[0] for b in samples], places=torch.tensor(places, dtype=torch.int64),
        prompts=[b.prompts[0] for b in samples], pixels=both([b.pixels for b in samples]),
        latents=both([b.latents for b in samples]), sizes=both([b.sizes for b in samples]),
        face={k: torch.cat([b.face[k] for b in samples]) for k in face},
        extra={k: torch.cat([b.extra[k] for b in samples]) for k in extra},
    )  # fmt: skip


class WithCrops:
    """A `Source` with `face["crop"]` [B, 3, S, S] in -1..1: the aligned face that an encoder reads of each sample, cut
    out of its pixels by `extra["landmarks"]` [B, 5, 2].

    Args:
        inner: the source.
        size: S.
        template: see `idcore.encoders.face_crops.FaceCrops`.
        prompts: what the samples say in place of their captions, one drawn for each; (): their own.
    """

    def __init__(self, inner: Source, size: int, template: str = "arcface", *, prompts: Sequence[str] = ()) -> None:
        self.inner, self.size, self.template, self.prompts = inner, size, template, tuple(prompts)

    def __len__(self) -> int:
        return len(self.inner)

    def state(self) -> dict[str, Any]:
        return {**self.inner.state(), "crop": [self.size, self.template], "prompts": list(self.prompts)}

    def check_base(self, base: Any) -> None:
        if hasattr(self.inner, "check_base"):
            self.inner.check_base(base)

    def micro_batches(self, step: int, seed: int, rank: int, world: int, size: int, count: int) -> Iterator[Batch]:
        """See `Source`. Raises InputError where the data has no pictures or no landmarks."""
        for batch in self.inner.micro_batches(step, seed, rank, world, size, count):
            points = batch.extra.get("landmarks")
            if batch.pixels is None or points is None:
                what = "pictures (set data.latents=false)" if batch.pixels is None else "landmarks of faces"
                raise InputError(f"training on faces: the data has no {what}; samples {', '.join(batch.ids[:3])}")
            batch.face["crop"] = crops_of(batch.pixels, points, self.size, self.template)
            if self.prompts:
                batch.prompts = [self._said(step, seed, p) for p in batch.places.tolist()]
            yield batch

    def _said(self, step: int, seed: int, place: int) -> str:
        dice = Step(seed, step, step + 1).generator("words", place)
        return self.prompts[int(torch.randint(len(self.prompts), (), generator=dice))]
