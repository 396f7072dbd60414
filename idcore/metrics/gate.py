"""The embedded model's gate: does an unseen person stay that person? Fixed people, prompts and seeds.

Two parts. Procedural: 24 drawn people that the training never drew, one picture per prompt. Real: one photo
that no training saw, every prompt with four seeds. Every picture is made with four steps, enlarged from 64 to
256 pixels (bicubic), and then looked at by the same detector and recogniser that condition the model: a high
score says that this recogniser sees the person, not that everybody does.

A picture in which no face is found is never left out: it counts as not found, as a wrong answer for rank-1
and with `MISS_DISTANCE` in every median.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ..encoders.analyzer import EmbeddedAnalyzer
from ..encoders.images import ImageLike
from ..prompts import load

if TYPE_CHECKING:
    from ..identity import Identity
    from ..sampling.tiny_pipeline import TinyPipeline

_SET = load("tiny")
PROMPTS = tuple((text, labels["background"]) for text, labels in zip(_SET, _SET.labels))
PEOPLE = 24
FIRST_SEED = 1_000  # people of the gate; those of the training begin at pool.TRAIN_SEED
REAL_SEEDS = 4
MISS_DISTANCE = 1.5  # farther than any two faces measured here; the score of a picture without a face
LIMITS = {"rank1": 0.9, "face_found": 0.95, "background": 0.95}
MIN_SCORE = 0.8  # of the detector, for drawn faces (our choice; photos use 0.9)


class Judge:
    """Finds and embeds the face of a small picture."""

    def __init__(self, analyzer: EmbeddedAnalyzer | None = None) -> None:
        self.analyzer = analyzer or EmbeddedAnalyzer(min_score=MIN_SCORE)

    def embed(self, picture: Image.Image) -> np.ndarray | None:
        """Embedding [128] of the largest face, or None where none is found. Small pictures are enlarged to 256."""
        if max(picture.size) < 256:
            picture = picture.resize((256, 256), Image.Resampling.BICUBIC)
        faces = self.analyzer.detect(picture)
        return self.analyzer.embed(picture, faces[0]) if faces else None


def background_of(picture: Image.Image) -> str:
    """The named background colour that is nearest to the picture's upper corners (median, RGB distance)."""
    from ..training.tiny.prompts import BACKGROUNDS

    a = np.asarray(picture.convert("RGB"), np.float32)
    n = max(2, a.shape[0] // 10)
    corners = np.concatenate([a[:n, :n].reshape(-1, 3), a[:n, -n:].reshape(-1, 3)])
    colour = np.median(corners, axis=0)
    return min(BACKGROUNDS, key=lambda k: float(np.linalg.norm(colour - np.array(BACKGROUNDS[k]))))


def gate_person(seed: int, size: int = 256) -> Image.Image:
    """The reference picture of an unseen procedural person: neutral, from the front, on a plain wall."""
    from ..training.tiny.people import sample_person, sample_view
    from ..training.tiny.renderer import render

    rng = np.random.default_rng(seed)
    person = sample_person(rng, wildness=0.0)
    a = render(person, sample_view(rng, "neutral", "front"), size)
    cover = a[..., 3:] / 255.0
    wall = rng.uniform(90, 220, 3)
    return Image.fromarray((a[..., :3] * cover + wall * (1 - cover)).astype(np.uint8))


def gate_people(judge: Judge, count: int = PEOPLE) -> tuple[list[Image.Image], np.ndarray, int]:
    """References whose face the detector finds, their embeddings [count, 128], and how many were passed over."""
    pictures, embeddings, seed = [], [], FIRST_SEED
    while len(pictures) < count:
        picture = gate_person(seed)
        embedding = judge.embed(picture)
        seed += 1
        if embedding is not None:
            pictures.append(picture)
            embeddings.append(embedding)
    return pictures, np.stack(embeddings), seed - FIRST_SEED - count


Progress = Callable[[int, int, str], None]


def print_progress(done: int, total: int, what: str) -> None:
    """A one-line bar on standard error."""
    bar = "#" * int(20 * done / total)
    end = "\n" if done == total else ""
    print(f"\r[{bar:.<20}] {what} {done}/{total}", end=end, file=sys.stderr, flush=True)


def procedural_gate(
    pipe: TinyPipeline, judge: Judge, people: int = PEOPLE, progress: Progress | None = None
) -> tuple[dict, np.ndarray]:
    """Figures on unseen procedural people, and the embeddings of their references."""
    references, gallery, passed_over = gate_people(judge, people)
    found = right = colour = 0
    distances = []
    for i, reference in enumerate(references):
        pictures = pipe([p for p, _ in PROMPTS], reference, seed=FIRST_SEED + i)
        for picture, (_, name) in zip(pictures, PROMPTS):
            colour += background_of(picture) == name
            embedding = judge.embed(picture)
            if embedding is None:
                distances.append(MISS_DISTANCE)
                continue
            d = np.linalg.norm(gallery - embedding, axis=1)
            found, right = found + 1, right + int(d.argmin() == i)
            distances.append(float(d[i]))
        if progress:
            progress(i + 1, people, "unseen procedural people")
    n = people * len(PROMPTS)
    figures = {"people": people, "pictures": n, "rank1": right / n, "face_found": found / n, "background": colour / n}
    figures |= {"median_distance": float(np.median(distances)), "references_without_face": passed_over}
    figures["reached"] = all(figures[k] >= v for k, v in LIMITS.items())
    return figures, gallery


def real_gate(
    pipe: TinyPipeline,
    judge: Judge,
    photo: ImageLike,
    others: np.ndarray,
    identity: Identity | None = None,
    progress: Progress | None = None,
) -> tuple[dict, list[dict]]:
    """Figures on one photo, and per picture {"prompt", "seed", "picture", "distance" (None: no face)}.

    Args:
        photo: a picture with a face; the largest counts.
        others: embeddings [N, 128] of other people, for the baseline.
        identity: the photo's, where it is there already.
    """
    from ..encoders.analyzer import default_analyzer, find_face

    analyzer = default_analyzer()
    picture, face = find_face(photo, analyzer)
    own = analyzer.embed(picture, face)
    identity = identity or pipe.encode(picture)
    rows, to_others = [], []
    for k, (prompt, _) in enumerate(PROMPTS):
        pictures = pipe(prompt, identity, seed=0, num_images_per_prompt=REAL_SEEDS)
        for seed, made in enumerate(pictures):
            e = judge.embed(made)
            rows.append({"prompt": prompt, "seed": seed, "picture": made})
            rows[-1]["distance"] = None if e is None else float(np.linalg.norm(e - own))
            to_others.append(MISS_DISTANCE if e is None else float(np.median(np.linalg.norm(others - e, axis=1))))
        if progress:
            progress(k + 1, len(PROMPTS), "prompts on the photo")
    return _real_figures(rows, to_others, analyzer.measure.threshold), rows


def _real_figures(rows: list[dict], to_others: list[float], threshold: float) -> dict:
    scored = [MISS_DISTANCE if r["distance"] is None else r["distance"] for r in rows]
    found = sum(r["distance"] is not None for r in rows) / len(rows)
    figures = {
        "pictures": len(rows),
        "median_distance": float(np.median(scored)),
        "median_distance_others": float(np.median(to_others)),
        "threshold": threshold,
        "face_found": found,
        "share_below_threshold": float(np.mean([s < threshold for s in scored])),
    }
    per_prompt = {}
    for r, s in zip(rows, scored):
        per_prompt.setdefault(r["prompt"], []).append(s)
    figures["median_by_prompt"] = {p: float(np.median(v)) for p, v in per_prompt.items()}
    below = figures["median_distance"] < threshold
    figures["reached"] = bool(below and figures["median_distance"] < figures["median_distance_others"])
    return figures


def gate(pipe: TinyPipeline, photo: ImageLike, progress: Progress | None = None) -> dict:
    """Both parts: {"procedural": ..., "real": ..., "rows": pictures of the photo with their distances}."""
    judge = Judge()
    procedural, others = procedural_gate(pipe, judge, progress=progress)
    real, rows = real_gate(pipe, judge, photo, others, progress=progress)
    return {"procedural": procedural, "real": real, "rows": rows}
