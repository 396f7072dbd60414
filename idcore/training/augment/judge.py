"""Who looks at the pictures: is there one face, whose is it, and does the picture show what the prompt says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ...encoders.analyzer import FaceAnalyzer
from ...encoders.face import Face
from .options import AugmentConfig, Prompt

SMALL = 256  # smaller pictures are enlarged to this side before faces are looked for, as in `metrics.probes`


@dataclass(frozen=True)
class Seen:
    """The face of a picture: box [4], points [5, 2] in its pixels, the detector's score, and the embedding [E]."""

    box: np.ndarray
    points: np.ndarray
    score: float
    embedding: np.ndarray


class FaceJudge:
    """Finds the one face of a picture and compares faces, in the analyzer's own measure.

    Args:
        analyzer: who finds and embeds.
        config: which faces count, and from when on two are one person.
    """

    def __init__(self, analyzer: FaceAnalyzer, config: AugmentConfig) -> None:
        self.analyzer, self.config, self.measure = analyzer, config, analyzer.measure
        self.limit = analyzer.measure.threshold if config.identity is None else config.identity

    def look(self, picture: Image.Image) -> Seen | tuple[str, str]:
        """The face, or (reason, in full) why there is none to use."""
        scale = max(1.0, SMALL / max(picture.size))
        large = picture
        if scale > 1:
            large = picture.resize(tuple(round(s * scale) for s in picture.size), Image.Resampling.BICUBIC)
        faces = self.analyzer.detect(large)
        reason = self._reason(faces, large)
        if reason is not None:
            return reason
        embedding = np.asarray(self.analyzer.embed(large, faces[0]), np.float32).reshape(-1)
        box, points = ((np.asarray(v, np.float64) + 0.5) / scale - 0.5 for v in (faces[0].box, faces[0].points))
        return Seen(box, points, float(faces[0].score), embedding)

    def _reason(self, faces: Sequence[Face], picture: Image.Image) -> tuple[str, str] | None:
        if not faces:
            return "no face", f"{self.analyzer.name} found none"
        if len(faces) > 1 and self.config.several == "refuse":
            return "several faces", f"{len(faces)}: " + "; ".join(map(str, faces[:3]))
        share = faces[0].area / (picture.width * picture.height)
        if share < self.config.min_face:
            return "face too small", f"{share:.1%} of the picture; wanted {self.config.min_face:.1%} (min_face)"
        return None

    def values(self, a: Sequence[Seen], b: Sequence[Seen]) -> np.ndarray:
        """The measure between faces [M, N]."""
        return self.measure.matrix(np.stack([s.embedding for s in a]), np.stack([s.embedding for s in b]))

    def same(self, values: np.ndarray) -> np.ndarray:
        """Which values count as one person, bool of the same shape."""
        return values <= self.limit if self.measure.smaller_is_closer else values >= self.limit

    def best_first(self, values: np.ndarray) -> np.ndarray:
        """Places of values [N] from the most alike on."""
        return np.argsort(values if self.measure.smaller_is_closer else -values, kind="stable")


class TextJudge(Protocol):
    """Text alignment: `words` says what of, `least` is what a picture needs where the settings name nothing."""

    words: str
    key: str
    least: float

    def scores(self, pictures: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[float | None]:
        """One for each picture with its prompt; None where this judge cannot tell."""
        ...


class NoTextJudge:
    """Does not look."""

    words, key, least = "not looked at", "none", 0.0

    def scores(self, pictures: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[float | None]:
        return [None] * len(pictures)


class ClipJudge:
    """Cosine of CLIP's embeddings of the picture and of the prompt, in which the class word stands for the name.

    Args:
        clip: `metrics.networks.Clip`.
        word: the class word.
    """

    least = 0.2  # our choice; pictures of their own prompt lie at 0.25 to 0.35 with ViT-L/14

    def __init__(self, clip: Any, word: str = "person") -> None:
        self.clip, self.word = clip, word
        self.words, self.key = f"cosine of {clip.words}", f"{clip.key}:{word}"
        self._texts: dict[str, np.ndarray] = {}

    def scores(self, pictures: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[float | None]:
        said = [p.of(self.word) for p in prompts]
        new = [t for t in dict.fromkeys(said) if t not in self._texts]
        if new:
            self._texts |= dict(zip(new, _unit(self.clip.text(new))))
        seen = _unit(self.clip(pictures))
        return [float(v @ self._texts[t]) for v, t in zip(seen, said)]


class DrawnJudge:
    """Share of what the prompt asks for by name (background, style, expression, pose) that a drawn picture shows."""

    words, least = "share of the named attributes", 1.0

    def __init__(self) -> None:
        from ...metrics.drawn_attributes import ASKS, AttributeJudge

        self.judge, self.asks = AttributeJudge(), ASKS
        self.key = self.judge.key

    def scores(self, pictures: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[float | None]:
        found = []
        for seen, prompt in zip(self.judge(pictures), prompts):
            asked = [k for k in prompt.labels if k in self.asks]
            right = sum(getattr(seen, k) == prompt.labels[k] for k in asked)
            found.append(right / len(asked) if asked else None)
        return found


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = np.asarray(rows, np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)
