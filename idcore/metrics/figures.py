"""Scores of single pictures, and the figures over all of them with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .intervals import interval
from .rows import Row
from .similarity import Similarity

SAMPLE = 1000  # pictures between which identity diversity is measured; drawn by seed where there are more (our choice)
MISSED = {"l2": 1.5, "cosine": 0.0}  # what a picture without a face counts as; our choice (l2: the gate's)


@dataclass(frozen=True)
class Score:
    """One value per picture.

    Attributes:
        words: what it is.
        better: "higher", "lower", or "" where neither is better.
        values: [N] float64, NaN where a picture has none.
    """

    words: str
    better: str
    values: np.ndarray

    def figure(self, seed: int = 0) -> dict:
        """Mean over the pictures that have it, interval, count."""
        known = self.values[~np.isnan(self.values)]
        return {"words": self.words, "better": self.better} | interval(known, seed=seed).as_dict()


@dataclass
class Gallery:
    """References of the people: photo embeddings [photos of p, E] for each person, in order."""

    names: list[str]
    photos: list[np.ndarray] = field(default_factory=list)

    def values(self, measure: Similarity, embeddings: np.ndarray) -> np.ndarray:
        """[N, P]: mean over the person's photos of the measure."""
        out = np.empty((len(embeddings), len(self.names)))
        for p, photos in enumerate(self.photos):
            out[:, p] = rowwise(measure, embeddings, photos).mean(1)
        return out

    def between(self, measure: Similarity) -> np.ndarray:
        """[P, P] among the people themselves; the diagonal is NaN where a person has one photo."""
        out = np.full((len(self.names),) * 2, np.nan)
        for i, a in enumerate(self.photos):
            for j, b in enumerate(self.photos):
                m = measure.matrix(a, b)
                if i != j:
                    out[i, j] = m.mean()
                elif len(a) > 1:
                    out[i, i] = m[~np.eye(len(a), dtype=bool)].mean()
        return out


def rowwise(measure: Similarity, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`measure.matrix` in parts, so that thousands of pictures do not need gigabytes."""
    step = max(1, 20_000_000 // (8 * max(1, b.size)))
    return np.concatenate([measure.matrix(a[i : i + step], b) for i in range(0, len(a), step)])


@dataclass
class FaceFigures:
    """What one recogniser says: scores by key, and tables for the report."""

    scores: dict[str, Score]
    matrix: np.ndarray  # [P, P]: pictures meant for p (rows) against the photos of q; NaN where there are none
    whole: dict[str, float | None]  # figures that are not means over pictures


def face_figures(
    name: str, measure: Similarity, rows: Sequence[Row], found: Sequence[np.ndarray | None], gallery: Gallery
) -> FaceFigures:
    """Own person, others, rank 1, leak and diversity of pictures with embeddings (None: no face found).

    Without people in the gallery only diversity between pictures is left.
    """
    n, better = len(rows), "lower" if measure.smaller_is_closer else "higher"
    opposite = "higher" if measure.smaller_is_closer else "lower"
    own, other, same, first, margin = (np.full(n, np.nan) for _ in range(5))
    counted = np.full(n, np.nan)
    index = {p: i for i, p in enumerate(gallery.names)}
    named = [i for i, r in enumerate(rows) if r.person in index]
    seen = [i for i in named if found[i] is not None]
    counted[named], same[named] = MISSED[measure.name], 0.0
    first[named] = 0.0 if len(index) > 1 else np.nan
    matrix = np.full((len(index),) * 2, np.nan)
    if seen:
        table = gallery.values(measure, np.stack([found[i] for i in seen]))
        who = np.array([index[rows[i].person] for i in seen])
        own[seen] = counted[seen] = table[np.arange(len(seen)), who]
        same[seen] = [float(measure.is_same(v)) for v in own[seen]]
        if len(index) > 1:
            rivals = table.copy()
            rivals[np.arange(len(seen)), who] = np.inf if measure.smaller_is_closer else -np.inf
            other[seen] = rivals.min(1) if measure.smaller_is_closer else rivals.max(1)
            margin[seen] = (other[seen] - own[seen]) * (1 if measure.smaller_is_closer else -1)
            first[seen] = (margin[seen] > 0).astype(float)
        for p in range(len(index)):
            if (who == p).any():
                matrix[p] = table[who == p].mean(0)
    unit = "L2 distance" if measure.smaller_is_closer else "cosine"
    scores = {
        f"{name}.own": Score(f"{unit} to the own person, where a face was found", better, own),
        f"{name}.own_counted": Score(f"the same, a missing face counts {MISSED[measure.name]:g}", better, counted),
        f"{name}.same_person": Score(f"share within the threshold {measure.threshold:g}", "higher", same),
        f"{name}.other": Score(f"{unit} to the nearest other person (leak)", opposite, other),
        f"{name}.margin": Score("how much nearer the own person is than any other", "higher", margin),
        f"{name}.rank1": Score("share in which the own person is the nearest", "higher", first),
    }
    whole = diversity(name, measure, rows, found, gallery)
    return FaceFigures({k: s for k, s in scores.items() if not np.isnan(s.values).all()}, matrix, whole)


def diversity(
    name: str, measure: Similarity, rows: Sequence[Row], found: Sequence[np.ndarray | None], gallery: Gallery
) -> dict[str, float | None]:
    """Mean measure between pictures of one person, of different people, and between the people's own photos.

    Where pictures of different people are much nearer to each other than the people are, identities collapse.
    """
    seen = [i for i, r in enumerate(rows) if r.person and found[i] is not None]
    if len(seen) > SAMPLE:
        seen = sorted(np.random.default_rng(0).choice(seen, SAMPLE, replace=False).tolist())
    inside = outside = None
    if len(seen) > 1:
        e = np.stack([found[i] for i in seen])
        m, who = rowwise(measure, e, e), np.array([rows[i].person for i in seen])
        equal, off = who[:, None] == who[None], ~np.eye(len(seen), dtype=bool)
        inside = float(m[equal & off].mean()) if (equal & off).any() else None
        outside = float(m[~equal].mean()) if (~equal).any() else None
    photos = gallery.between(measure)
    off = photos[~np.eye(len(photos), dtype=bool)]
    return {
        f"{name}.between_pictures_of_one_person": inside,
        f"{name}.between_pictures_of_different_people": outside,
        f"{name}.between_photos_of_different_people": float(np.nanmean(off)) if off.size else None,
    }


def label_score(rows: Sequence[Row], label: str, said: Sequence[Mapping | None]) -> Score | None:
    """1 where a picture has what its prompt asks for, 0 where not; None where no prompt asks for it."""
    values = np.full(len(rows), np.nan)
    for i, (row, got) in enumerate(zip(rows, said)):
        if label in row.labels and got and label in got:
            values[i] = float(got[label] == row.labels[label])
    if np.isnan(values).all():
        return None
    return Score(f"share with the {label} that the prompt asks for", "higher", values)
