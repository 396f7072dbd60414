"""A small source of drawn people for tests of PuLID's training: no files, no detector."""

import functools

import numpy as np
import torch

from idcore.encoders.align import template
from idcore.encoders.analyzer import default_analyzer
from idcore.encoders.dlib_tokens import EMBEDDING_STD, tokens_of
from idcore.encoders.pulid_features import PuLIDFeatures
from idcore.systems.tiny import WIDE_PADDING, chips_of
from idcore.training.contract import Batch


@functools.lru_cache(maxsize=4)
def drawn(count, first=5_000):
    """Frames uint8 [N, 96, 96, 3] of people in the embedded model's framing."""
    from idcore.training.tiny.somebody import _frame

    return np.stack([_frame(first + i) for i in range(count)])


@functools.lru_cache(maxsize=4)
def read(count, first=5_000):
    """Pixels [N, 3, 64, 64] in -1..1 and face features by name."""
    x = torch.from_numpy(drawn(count, first)).permute(0, 3, 1, 2).float() / 255
    wide, tight = ((c.permute(0, 2, 3, 1).clamp(0, 1) * 255 + 0.5).byte().numpy() for c in chips_of(x))
    recogniser = default_analyzer().recogniser
    face = {"id_cond": torch.from_numpy(recogniser.embed(tight)) / EMBEDDING_STD}
    face |= {f"hidden.{i}": t for i, t in enumerate(tokens_of(recogniser.features(wide)))}
    face = {k: v[:, None] for k, v in face.items()}
    pixels = torch.nn.functional.interpolate(x, size=(64, 64), mode="bilinear", antialias=True) * 2 - 1
    return pixels, face


def features(count, first=5_000):
    _, face = read(count, first)
    return PuLIDFeatures(face["id_cond"], [face[f"hidden.{i}"] for i in range(5)])


class DrawnPeople:
    """A `Source` of `count` people; the order is a function of (seed, step)."""

    def __init__(self, count=16):
        self.count = count

    def __len__(self):
        return self.count

    def micro_batches(self, step, seed, rank, world, size, count):
        n = world * size * count
        order = torch.randint(self.count, (n,), generator=torch.Generator().manual_seed(seed * 9973 + step))
        pixels, face = read(self.count)
        points = torch.from_numpy(template("dlib", 64, WIDE_PADDING) - 0.5).float()
        for m in range(count):
            start = (m * world + rank) * size
            rows = order[start : start + size]
            yield Batch(
                [f"person{i}" for i in rows.tolist()], torch.arange(start, start + size), ["a photo"] * size,
                pixels[rows], face={k: v[rows] for k, v in face.items()},
                extra={"landmarks": points.expand(size, 5, 2)},
            )  # fmt: skip

    def state(self):
        return {"drawn": self.count}
