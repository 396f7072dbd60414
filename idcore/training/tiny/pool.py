"""A pool of rendered people on disk: made once, memory-mapped by the training.

A shard is one `people_NNNN.npy` (uint8 [people, 2, S, S, 4]: two views of each person) with
`people_NNNN.labels.npy` (uint8 [people, 2, 2]: expression and pose of each view). A shard is written to
a temporary name and renamed, so that a half-written shard is never read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from idcore.errors import InputError

from .people import EXPRESSIONS, POSES, sample_person, sample_view
from .renderer import render

TRAIN_SEED = 7_000_000  # people below this seed belong to the gate and the tests


def render_person(seed: int, size: int = 96) -> tuple[np.ndarray, np.ndarray]:
    """Two views of the person of this seed: uint8 [2, S, S, 4] and labels uint8 [2, 2]."""
    rng = np.random.default_rng(seed)
    person = sample_person(rng)
    views = [sample_view(rng) for _ in range(2)]
    labels = [(EXPRESSIONS.index(v["expression"]), POSES.index(v["pose"])) for v in views]
    return np.stack([render(person, v, size) for v in views]), np.array(labels, np.uint8)


def write_shard(folder: Path, index: int, people: int = 500, size: int = 96) -> Path:
    """Render one shard; an existing one is left as it is."""
    folder = Path(folder)
    done = folder / f"people_{index:04d}.npy"
    if done.exists():
        return done
    folder.mkdir(parents=True, exist_ok=True)
    pictures = np.empty((people, 2, size, size, 4), np.uint8)
    labels = np.empty((people, 2, 2), np.uint8)
    for k in range(people):
        pictures[k], labels[k] = render_person(TRAIN_SEED + index * people + k, size)
    _save(folder / f"people_{index:04d}.labels.npy", labels)
    _save(done, pictures)
    return done


def _save(path: Path, array: np.ndarray) -> None:
    part = path.with_suffix(f".{os.getpid()}.part")
    with open(part, "wb") as f:
        np.save(f, array)
    part.replace(path)


def make_pool(folder: Path, shards: int, people: int = 500, size: int = 96, workers: int = 1) -> None:
    """Render `shards` shards of `people` people each, in `workers` processes."""
    if shards < 1 or people < 1:
        raise InputError(f"a pool needs at least one shard and one person, got {shards} and {people}")
    missing = [i for i in range(shards) if not (Path(folder) / f"people_{i:04d}.npy").exists()]
    if workers <= 1:
        for i in _bar(missing, len(missing)):
            write_shard(folder, i, people, size)
        return
    n = len(missing)
    with ProcessPoolExecutor(workers) as ex:
        list(_bar(ex.map(write_shard, [folder] * n, missing, [people] * n, [size] * n), n))


def _bar(items: Iterable, total: int) -> Iterable:
    from tqdm import tqdm

    return tqdm(items, total=total, desc="rendering people", unit="shard", disable=total == 0)


class Pool:
    """Read access to a folder of shards; `len(pool)` people."""

    def __init__(self, folder: Path) -> None:
        files = sorted(f for f in Path(folder).glob("people_*.npy") if ".labels" not in f.name)
        if not files:
            raise InputError(f"no people_*.npy shard in {folder}: render a pool first (make_pool)")
        self.pictures = [np.load(f, mmap_mode="r") for f in files]
        self.labels = [np.load(str(f)[:-4] + ".labels.npy") for f in files]
        self.starts = np.cumsum([0] + [len(p) for p in self.pictures])
        self.size = self.pictures[0].shape[2]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def get(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pictures uint8 [n, 2, S, S, 4] and labels uint8 [n, 2, 2] of these people."""
        shard = np.searchsorted(self.starts, indices, side="right") - 1
        at = indices - self.starts[shard]
        pictures = np.stack([self.pictures[s][i] for s, i in zip(shard, at)])
        return pictures, np.stack([self.labels[s][i] for s, i in zip(shard, at)])
