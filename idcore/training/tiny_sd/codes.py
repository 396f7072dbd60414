"""A drawn person as a word embedding: a fixed linear image of the person's parameters.

A large text-to-image model knows people by name because it saw their pictures with it. tiny-sd is told instead: the
embedding of a name holds the person's parameters, and the network learns what they look like. The space of word
embeddings is then a smooth space of people, in which new ones can be found. Our choice throughout.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ..tiny.people import sample_person

ONE_OF = {"beard": 5, "hair_style": 8, "glasses": 4}
LEFT_OUT = ("texture_id", "moles", "light_tint")  # a seed of noise, single spots, a tint
STRONG = {  # what is seen from afar is a larger part of the word
    "skin": 4.0, "hair": 4.0, "cloth": 2.0, "beard": 2.5, "hair_style": 3.0, "glasses": 3.0, "width": 2.0, "skull": 2.0,
    "chin_y": 2.0, "jaw": 2.0, "hair_length": 2.0, "hair_volume": 2.0,
}  # fmt: skip
RMS = 1.0  # of an embedding


def parameters(person: dict) -> np.ndarray:
    """All numbers of a person in one row, categories one-hot; unscaled, float32 [F]."""
    rows = []
    for key in sorted(k for k in person if k not in LEFT_OUT):
        value = person[key]
        rows.append(np.eye(ONE_OF[key])[int(value)] if key in ONE_OF else np.atleast_1d(np.asarray(value, np.float64)))
    return np.concatenate(rows).astype(np.float32)


@lru_cache(maxsize=1)
def _scale() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, deviation and weight [F] of the parameters, over 2,000 people of fixed seeds."""
    some = np.stack([parameters(sample_person(np.random.default_rng(9_000_000 + i))) for i in range(2000)])
    example = sample_person(np.random.default_rng(0))
    weight = [
        np.full(ONE_OF.get(k) or np.size(example[k]), STRONG.get(k, 1.0))
        for k in sorted(k for k in example if k not in LEFT_OUT)
    ]
    return some.mean(0), some.std(0).clip(1e-6), np.concatenate(weight).astype(np.float32)


@lru_cache(maxsize=4)
def _directions(count: int, width: int) -> np.ndarray:
    """[count, width] with orthonormal rows, fixed."""
    q, _ = np.linalg.qr(np.random.default_rng(20_231).standard_normal((width, width)))
    return q[:count].astype(np.float32)


def codes(people: list[dict], width: int = 128) -> np.ndarray:
    """Word embeddings float32 [N, width] of people; width at least the number of parameters (about 100)."""
    mean, std, weight = _scale()
    x = ((np.stack([parameters(p) for p in people]) - mean) / std).clip(-3, 3) * weight
    x = x * np.float32(RMS * np.sqrt(width) / np.sqrt((weight**2).sum()))
    return x @ _directions(x.shape[1], width)
