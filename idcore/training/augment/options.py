"""What `idcore augment` can be told, and one record of its result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ...errors import InputError
from ..settings import setting

PERSON = "{person}"  # where the name stands in a prompt; in training, where the learned words stand


@dataclass(frozen=True)
class AugmentConfig:
    """How pictures are drawn and which are kept. All that is not `free` is part of the data set's fingerprint.

    DreamIdentity (arXiv 2307.00300) edits pictures of known names by prompts and trains on the pairs; how many,
    how they are sampled and what is filtered out it does not print.
    """

    size: int = setting(0, "Side of the pictures in pixels; 0: the base model's own", low=0)
    steps: int = setting(4, "Denoising steps; models that are not distilled want 20 and more", low=1, high=1000)
    sampler: Literal["euler", "dpmpp_2m"] = setting("euler", "Trailing Euler or DPM++ 2M")
    guidance: float = setting(1.0, "Classifier-free guidance; 1: none, as few-step models want it", low=1, below=100)
    negative: str = setting("", "Negative prompt, with guidance")
    sources: int = setting(2, "Source pictures of a name that are kept, at most", low=1)
    source_tries: int = setting(4, "Source pictures that are drawn of a name", low=1)
    agree: float = setting(
        0.5, "Share of a name's source pictures that must show one person, or the name is not known", low=0, high=1
    )
    edits: int = setting(1, "Edited pictures of a name and prompt that are kept, at most", low=1)
    tries: int = setting(2, "Edited pictures that are drawn of a name and prompt, at most", low=1)
    identity: float | None = setting(
        None, "Worst measure between source and edited picture; null: that of one person by the recogniser's maker"
    )
    text: float | None = setting(None, "Least text alignment of an edited picture; null: the measure's own")
    several: Literal["refuse", "largest"] = setting("refuse", "Pictures with several faces: drop, or take the largest")
    min_face: float = setting(0.02, "Least share of the picture that the face's box covers", low=0, below=1)
    seed: int = setting(0, "Of all pictures", low=0)
    batch: int = setting(8, "Pictures drawn at once", low=1, free=True)

    def check(self) -> None:
        """Raise InputError for values that do not go together."""
        if self.sources > self.source_tries or self.edits > self.tries:
            raise InputError(
                f"augment: at most as many pictures are kept as drawn, got sources {self.sources} of source_tries "
                f"{self.source_tries}, edits {self.edits} of tries {self.tries}"
            )


@dataclass(frozen=True)
class Prompt:
    """A prompt with `{person}` in it, and what it asks for by name (`background`, `style`, ...) where known."""

    text: str
    labels: Mapping[str, str] = field(default_factory=dict)

    def of(self, name: str) -> str:
        """The prompt for this name."""
        return self.text.replace(PERSON, name)


@dataclass
class Pair:
    """One person twice; a line of index.jsonl.

    Attributes:
        id: unique in the data set.
        name: of the person, as the base model knows it.
        source, edited: paths of PNG files in the folder, forward slashes; a source picture serves several pairs.
        source_hash, edited_hash: "sha256:..." of the files.
        prompt: what the edited picture shows, with `{person}` where the name stood. labels: what it asks for by name.
        size: width and height in pixels, of both.
        box, points, score: the face in the source picture; box [4], points [5][2] in its pixels.
        edited_box, edited_points, edited_score: the face in the edited picture.
        identity: between the two faces, in the manifest's measure. text: alignment of the edited picture, or None.
        seeds: of the two pictures' noise.
    """

    id: str
    name: str
    source: str
    edited: str
    source_hash: str
    edited_hash: str
    prompt: str
    labels: dict[str, str]
    size: list[int]
    box: list[float]
    points: list[list[float]]
    score: float
    edited_box: list[float]
    edited_points: list[list[float]]
    edited_score: float
    identity: float
    text: float | None
    seeds: list[int]


@dataclass
class Made:
    """What came of one name.

    Attributes:
        name: whose.
        pairs: as in `Pair`; picture paths relative to the name's folder.
        drops: (what, reason, in full) of each picture, prompt or name that is not kept.
        pictures: PNG files by path.
        drawn: pictures drawn.
    """

    name: str
    pairs: list[Pair] = field(default_factory=list)
    drops: list[tuple[str, str, str]] = field(default_factory=list)
    pictures: dict[str, bytes] = field(default_factory=dict)
    drawn: int = 0


def plain(value: Any) -> Any:
    """Numbers of numpy rounded to plain ones, for JSON."""
    import numpy as np

    return np.round(np.asarray(value, np.float64), 3).tolist()
