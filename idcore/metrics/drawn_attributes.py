"""Is it the drawn person who was meant, doing what the prompt asks? For pictures of models of the procedural domain.

What a prompt may ask: background colour (nearest named colour of the upper corners), style (`tiny_style`), expression
and pose (`drawn_judge`). Who it is: the embedded recogniser's distance to that person's reference, and whether that
reference is the nearest among all. A picture without a found face is never left out: it counts as the wrong person at
`gate.MISS_DISTANCE`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..errors import InputError
from .drawn_judge import DrawnJudge
from .gate import MISS_DISTANCE, Judge, background_of
from .tiny_style import StyleJudge

ASKS = ("background", "style", "expression", "pose")
PEOPLE_SEED = 5_500_000  # of people for tables: no training draws them, nor are they the names of tiny-sd


@dataclass(frozen=True)
class Attributes:
    """What a picture shows, by the names of `training.tiny.prompts` and `training.tiny.people`."""

    background: str
    style: str
    expression: str
    pose: str


class AttributeJudge:
    """Pictures to `Attributes`. `key` changes with everything that changes an answer; `right`: how often each of its
    networks was right on drawings of unseen people."""

    def __init__(self, style: StyleJudge | None = None, face: DrawnJudge | None = None) -> None:
        self.style, self.face = style or StyleJudge.from_package(), face or DrawnJudge.from_package()
        self.key = f"drawn-attributes-v1:{self.style.key}:{self.face.key}"
        self.right = {"style": self.style.right, **self.face.right}

    def __call__(self, pictures: Sequence[Image.Image]) -> list[Attributes]:
        if not pictures:
            return []
        seen = zip(pictures, self.style(pictures), self.face(pictures))
        return [Attributes(background_of(p), style, *face) for p, style, face in seen]


def check_labels(labels: Mapping[str, str]) -> None:
    """Raise InputError for labels that no picture of this domain can show."""
    from ..training.tiny.people import EXPRESSIONS, POSES
    from ..training.tiny.prompts import COLOURS, STYLES

    known = dict(zip(ASKS, (COLOURS, STYLES, EXPRESSIONS, POSES)))
    for name, value in labels.items():
        if name in known and value not in known[name]:
            raise InputError(f"attributes: {name} must be one of {', '.join(known[name])}, got {value!r}")
    if not set(labels) & set(ASKS):
        raise InputError(f"attributes: a prompt must ask for one of {', '.join(ASKS)}, got {dict(labels)}")


class DrawnExam:
    """Judges pictures of some drawn people.

    Args:
        references: one picture of each person, in any style; an unmistakable one is neutral, from the front.
        judge, attributes: what looks; the embedded ones.

    Raises:
        InputError: fewer than two references, or one without a face.
    """

    def __init__(
        self, references: Sequence[Image.Image], judge: Judge | None = None, attributes: AttributeJudge | None = None
    ) -> None:
        self.judge, self.attributes = judge or Judge(), attributes or AttributeJudge()
        if len(references) < 2:
            raise InputError(f"drawn exam: wanted references of two people or more, got {len(references)}")
        found = [self.judge.embed(r) for r in references]
        missing = [i for i, e in enumerate(found) if e is None]
        if missing:
            raise InputError(f"drawn exam: no face is found in reference {missing[0]}; take another picture or person")
        self.gallery = np.stack(found)

    def distances(self, picture: Image.Image) -> np.ndarray | None:
        """Euclidean distances [people] of the picture's face to the references; None: no face."""
        found = self.judge.embed(picture)
        return None if found is None else np.linalg.norm(self.gallery - found, axis=1)

    def score(
        self, pictures: Sequence[Image.Image], people: Sequence[int], labels: Sequence[Mapping[str, str]]
    ) -> dict[str, float]:
        """Means over the pictures.

        Args:
            pictures: at least one.
            people: whom each should show, as an index into the references.
            labels: what each should show, `ASKS` to names; other keys mean nothing here.

        Returns:
            "distance" (smaller: more alike; 0.6 is dlib's threshold for photos), "rank1" (share whose nearest reference
            is the right one), "found" (share with a face), "adherence" (share of all asked attributes that are
            there), and each asked attribute's own share by its name.

        Raises:
            InputError: lengths that differ, unknown people or labels.
        """
        if not pictures or not len(pictures) == len(people) == len(labels):
            raise InputError(
                f"drawn exam: wanted a person and labels for each picture, got {len(pictures)} pictures, "
                f"{len(people)} people, {len(labels)} labels"
            )
        if bad := [p for p in people if not 0 <= p < len(self.gallery)]:
            raise InputError(f"drawn exam: there are references of {len(self.gallery)} people, got person {bad[0]}")
        for wanted in labels:
            check_labels(wanted)
        away = [self.distances(p) for p in pictures]
        own = [MISS_DISTANCE if a is None else float(a[i]) for a, i in zip(away, people)]
        right = [a is not None and int(a.argmin()) == i for a, i in zip(away, people)]
        found = [a is not None for a in away]
        told = {"distance": _mean(own), "rank1": _mean(right), "found": _mean(found)}
        return told | self._asked(pictures, labels)

    def _asked(self, pictures: Sequence[Image.Image], labels: Sequence[Mapping[str, str]]) -> dict[str, float]:
        hits: dict[str, list[bool]] = {}
        for seen, wanted in zip(self.attributes(pictures), labels):
            for name in ASKS:
                if name in wanted:
                    hits.setdefault(name, []).append(getattr(seen, name) == wanted[name])
        return {"adherence": _mean([h for v in hits.values() for h in v])} | {k: _mean(v) for k, v in hits.items()}


def drawn_photo(
    seed: int,
    *,
    expression: str = "neutral",
    pose: str = "front",
    style: str = "photo",
    background: str = "gray",
    size: int = 64,
    number: int = 0,
) -> Image.Image:
    """A picture of the drawn person `seed`, in the frame of tiny-sd's pictures.

    Args:
        seed: who; take `PEOPLE_SEED` + i.
        expression, pose, style, background: what it shows.
        size: edge in pixels.
        number: another one has other light, other strength of the expression and of the turn.

    Raises:
        InputError: an unknown attribute.
    """
    import torch
    import torch.nn.functional as F

    from ..training.tiny.people import sample_person, sample_view
    from ..training.tiny.prompts import BACKGROUNDS
    from ..training.tiny.renderer import render
    from ..training.tiny.styles import stylise

    check_labels({"expression": expression, "pose": pose, "style": style, "background": background})
    person = sample_person(np.random.default_rng(seed), wildness=0.0)
    view = sample_view(np.random.default_rng([seed, number]), expression, pose)
    drawn = torch.from_numpy(render(person, view, max(96, size))).permute(2, 0, 1)[None].float() / 255
    cover = drawn[:, 3:]
    # The style is put on the person over grey, so that the wall keeps its colour.
    parts = torch.cat([drawn[:, :3] * cover + 0.5 * (1 - cover), cover], 1)
    parts = F.interpolate(parts, size=(size, size), mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)
    cover, wall = parts[:, 3:], torch.tensor(BACKGROUNDS[background]).view(1, 3, 1, 1) / 255
    made = stylise(parts[:, :3], [style]) * cover + wall * (1 - cover)
    return Image.fromarray((made[0].permute(1, 2, 0).clamp(0, 1) * 255 + 0.5).to(torch.uint8).numpy())


def table_people(count: int, judge: Judge | None = None, first: int = PEOPLE_SEED) -> tuple[list[int], DrawnExam]:
    """Seeds of people for a table, whose face is found in a neutral picture from the front, and their exam."""
    judge, seeds, seed = judge or Judge(), [], first
    while len(seeds) < count:
        if judge.embed(drawn_photo(seed)) is not None:
            seeds.append(seed)
        seed += 1
    return seeds, DrawnExam([drawn_photo(s) for s in seeds], judge)


def _mean(values: Sequence[Any]) -> float:
    return float(np.mean(values))
