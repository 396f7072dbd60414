"""Drawn people as the training loop's `Source`: two views of each, put on walls in styles as they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...encoders.align import template
from ...errors import InputError
from ..contract import Batch, Step
from ..tiny.pool import Pool, make_pool
from ..tiny.prompts import BACKGROUNDS, labels_to_names, write_prompt
from ..tiny.styles import FILTERS, stylise
from .order import shuffled
from .steps import places_of

SHARD = 500  # people drawn in one file
PHOTOS = {"photo": 1.0}


class DrawnPeople:
    """Pictures of drawn people with captions, landmarks and `extra["person"]` [B] int64, their number.

    Which person, view, wall, style and light a sample has hangs on (seed, step, place, size of the global batch) alone.
    Every person comes once before any comes again.

    Args:
        folder: of the pool; people that are missing are drawn first (about 100 views a second on one core).
        people: how many of the pool, from `first` on; None: all that are drawn.
        first: number of the first.
        size: of the pictures, pixels.
        styles: shares of the styles of `idcore.training.tiny.styles`.
        flip: share of mirrored pictures.

    Raises:
        InputError: no people, an unknown style, or an empty pool.
    """

    def __init__(
        self,
        folder: str | Path,
        people: int | None = None,
        *,
        first: int = 0,
        size: int = 64,
        styles: Mapping[str, float] = PHOTOS,
        flip: float = 0.0,
    ) -> None:
        unknown = set(styles) - set(FILTERS)
        if unknown or not sum(styles.values()) > 0:
            raise InputError(f"drawn people: styles are {', '.join(FILTERS)} with their shares, got {dict(styles)}")
        if people is not None:
            if people < 1 or first < 0:
                raise InputError(f"drawn people: wanted at least 1 person from 0 on, got {people} from {first}")
            make_pool(Path(folder), -(-(first + people) // SHARD), SHARD)
        self.folder = Path(folder)
        self.pool, self.first, self.size = Pool(Path(folder)), first, size
        self.count = len(self.pool) - first if people is None else people
        self.styles, self.flip = dict(styles), flip
        self.landmarks = torch.from_numpy(template("head", size) - 0.5).float()
        self._order = lru_cache(maxsize=4)(lambda seed, epoch: shuffled(self.count, seed, epoch, 0))

    def __len__(self) -> int:
        return self.count

    def state(self) -> dict[str, Any]:
        return {
            "drawn people": self.count, "first": self.first, "size": self.size, "styles": self.styles,
            "flip": self.flip,
        }  # fmt: skip

    def micro_batches(self, step: int, seed: int, rank: int, world: int, size: int, count: int) -> Iterator[Batch]:
        """See `Source`."""
        whole = world * size * count
        dice = Step(seed, step, step + 1)
        for places in places_of(step, rank, world, size, count):
            at = [divmod(step * whole + p, self.count) for p in places]
            people = [int(self._order(seed, epoch)[row]) for epoch, row in at]
            yield self.batch(people, [dice.generator("drawn", p) for p in places], places)

    def batch(
        self,
        people: Sequence[int],
        generators: Sequence[torch.Generator],
        places: Sequence[int],
        view: int | None = None,
    ) -> Batch:
        """A picture of each of these people (counted from `first`), with these random numbers.

        Args:
            view: 0 or 1, one of the two; None: either.
        """
        views, labels = self.pool.get(np.array(people) + self.first)
        rngs = [np.random.default_rng(int(torch.randint(2**62, (), generator=g))) for g in generators]
        chosen = [int(r.integers(2)) if view is None else view for r in rngs]
        share = np.array(list(self.styles.values()), np.float64)
        styles = [list(self.styles)[r.choice(len(share), p=share / share.sum())] for r in rngs]
        walls = [list(BACKGROUNDS)[r.integers(len(BACKGROUNDS))] for r in rngs]
        said = [labels_to_names(*row[v]) for row, v in zip(labels, chosen)]
        prompts = [write_prompt(r, s, w, *names) for r, s, w, names in zip(rngs, styles, walls, said)]
        drawn = torch.from_numpy(views[np.arange(len(people)), chosen]).permute(0, 3, 1, 2).float() / 255
        flips = torch.tensor([r.random() < self.flip for r in rngs])
        pixels = _on_walls(_small(drawn, self.size), styles, walls, generators)
        return Batch(
            ids=[f"person{p + self.first}" for p in people], places=torch.tensor(places, dtype=torch.int64),
            prompts=prompts, pixels=torch.where(flips[:, None, None, None], pixels.flip(-1), pixels) * 2 - 1,
            sizes=torch.tensor([[self.size, self.size, 0, 0, self.size, self.size]] * len(people)).float(),
            extra={
                "landmarks": torch.stack([self._points(bool(f)) for f in flips]), "person": torch.tensor(people),
            },
        )  # fmt: skip

    def _points(self, flip: bool) -> Tensor:
        if not flip:
            return self.landmarks
        mirrored = self.landmarks.clone()
        mirrored[:, 0] = self.size - 1 - mirrored[:, 0]
        return mirrored[[1, 0, 2, 4, 3]]


def _small(x: Tensor, size: int) -> Tensor:
    """[N, 4, S, S] at another size, colours weighted by coverage."""
    if x.shape[-1] == size:
        return x
    cover = x[:, 3:]
    y = F.interpolate(torch.cat([x[:, :3] * cover, cover], 1), (size, size), mode="bilinear", antialias=True)
    return torch.cat([y[:, :3] / y[:, 3:].clamp_min(1e-3), y[:, 3:]], 1).clamp(0, 1)


def _on_walls(x: Tensor, styles: list[str], walls: list[str], generators: Sequence[torch.Generator]) -> Tensor:
    """Figures [N, 4, S, S] in their styles on walls whose light varies, [N, 3, S, S] in 0..1.

    The style is put on the person over grey, so that the wall keeps the colour that the caption names.
    """
    figure, cover = x[:, :3], x[:, 3:]
    styled = stylise(figure * cover + 0.5 * (1 - cover), styles)
    wall = torch.tensor([BACKGROUNDS[w] for w in walls]).float().view(-1, 3, 1, 1) / 255
    light = torch.stack([torch.randn(1, 2, 2, generator=g) for g in generators]) * 0.05
    light = F.interpolate(light, x.shape[-2:], mode="bilinear", align_corners=False)
    return (styled * cover + wall * (1 + light) * (1 - cover)).clamp(0, 1)
