"""Fixed people, prompts and seeds: pictures with and without identity, and what they measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ... import prompts
from ...encoders.align import invert, similarity_transform, template, transform_points
from ...encoders.pulid_features import PuLIDFeatures
from ...metrics.similarity import Similarity
from ..contract import Step, Validation
from ..losses.alignment import AlignmentOptions
from ..losses.faces import DetectedFace, as_bytes
from ..through_steps import Through, Walk, through_steps
from .config import ValidationSettings

TILE, LINE = 128, 14  # pixels of a tile of the sheet, and of a line of text
CHUNK = 4  # pictures that are drawn at once


Drawn = tuple[list[Image.Image], list[Image.Image], dict[str, Tensor]]
"""Pictures with and without identity, and the alignment's distances [jobs] by name."""


@dataclass(eq=False)
class Guest:
    """A person of the validation: the picture, and what the encoder reads of it ([1, 1, ...])."""

    name: str
    picture: Image.Image
    features: PuLIDFeatures


class Judge:
    """A face recogniser that looks at finished pictures, as nothing in the training does: found, aligned, embedded.

    Args:
        name: in front of the measures.
        analyzer: a `FaceAnalyzer`.
    """

    def __init__(self, name: str, analyzer: Any) -> None:
        self.name, self.analyzer = name, analyzer
        self.locate = DetectedFace(analyzer)

    @property
    def measure(self) -> Similarity:
        return self.analyzer.measure

    def look(self, picture: Image.Image) -> tuple[np.ndarray | None, np.ndarray | None]:
        """(embedding [E], five points in the picture's pixels) of the largest face, or None twice."""
        scale = max(1.0, self.locate.enlarge / max(picture.size))
        large = picture if scale == 1 else picture.resize([round(n * scale) for n in picture.size], 3)
        faces = self.analyzer.detect(large)
        if not faces:
            return None, None
        face = self.analyzer.choose(faces, "largest")
        return self.analyzer.embed(large, face), (face.points + 0.5) / scale - 0.5


def prompts_of(given: Sequence[str]) -> tuple[str, ...]:
    """Prompts as they are; the name of a shipped set or a file alone stands for its prompts."""
    if len(given) == 1 and (given[0] in prompts.names() or given[0].endswith((".json", ".txt"))):
        return tuple(prompts.load(given[0]))
    return tuple(given)


class Validator:
    """Draws every guest with every prompt and seed, from the same noise for all, with the weights as they are.

    Measures: for each judge its measure between guest and pictures, the same without identity, and the share of
    pictures with a face; the alignment's two distances (mean squares); and the root mean square between
    pictures with and without identity, of the whole and outside of the face (0..1).
    """

    def __init__(self, guests: Sequence[Guest], judges: Sequence[Judge], settings: ValidationSettings) -> None:
        self.guests, self.judges = list(guests), list(judges)
        self.prompts, self.seeds = prompts_of(settings.prompts), tuple(settings.seeds)
        self._own = [[j.look(g.picture)[0] for g in self.guests] for j in self.judges]
        self._bare: list[list[tuple]] | None = None  # judges' looks at the pictures without identity: always the same

    @property
    def jobs(self) -> list[tuple[str, int]]:
        return [(p, s) for p in self.prompts for s in self.seeds]

    @torch.no_grad()
    def __call__(self, task: Any, step: Step) -> Validation:
        drawn = [self.draw(task, guest) for guest in self.guests]
        bare = drawn[0][1]
        measures = self.differences(drawn) | self._likeness([d[0] for d in drawn])
        sheet = self._sheet([d[0] for d in drawn], bare)
        return Validation({"people": sheet}, measures)

    def draw(self, task: Any, guest: Guest) -> Drawn:
        """Pictures with and without identity, and the alignment's distances, of all jobs."""
        base, edge = task.fast, task.config.model.resolution
        tokens = task.module(guest.features)
        count = task.config.loss.steps
        with_id, without, terms = [], [], []
        for start in range(0, len(self.jobs), CHUNK):
            part = self.jobs[start : start + CHUNK]
            noise = [torch.randn(base.latent_shape(edge, edge), generator=_generator(s)) for _, s in part]
            text = base.text([p for p, _ in part], edge, edge)
            walk: Walk = through_steps(
                base, task.fast_injection, task.fast_injection.person(tokens), text, torch.stack(noise),
                Through(count, count, False, False, False), align=AlignmentOptions(1.0, 1.0),
            )  # fmt: skip
            with_id += _pictures(base.decode(walk.latents))
            without += _pictures(base.decode(walk.plain))
            terms.append(walk.alignment)
        return with_id, without, {k: torch.cat([t[k] for t in terms]).cpu() for k in terms[0]}

    def differences(self, drawn: Sequence[Drawn]) -> dict[str, float]:
        """What the identity changed: the alignment's distances, and pictures with against without."""
        if self._bare is None:
            self._bare = [[j.look(p) for p in drawn[0][1]] for j in self.judges]
        terms = [d[2] for d in drawn]
        means = {k: float(torch.stack([t[k] for t in terms]).mean()) for k in terms[0]}
        return means | self._pictures([d[0] for d in drawn], drawn[0][1])

    def _likeness(self, drawn: Sequence[Sequence[Image.Image]]) -> dict[str, float]:
        out: dict[str, float] = {}
        for j, judge in enumerate(self.judges):
            values, before, found, total = [], [], 0, 0
            for own, pictures in zip(self._own[j], drawn):
                looks = [judge.look(p)[0] for p in pictures]
                found, total = found + sum(e is not None for e in looks), total + len(looks)
                if own is None:
                    continue
                values += [judge.measure.value(own, e) for e in looks if e is not None]
                before += [judge.measure.value(own, e) for e, _ in self._bare[j] if e is not None]
            kind = "distance" if judge.measure.smaller_is_closer else "similarity"
            out[f"{judge.name}/found"] = found / total
            if values:
                out[f"{judge.name}/{kind}"] = float(np.mean(values))
            if before:
                out[f"{judge.name}/{kind}_without"] = float(np.mean(before))
        return out

    def _pictures(self, drawn: Sequence[Sequence[Image.Image]], bare: Sequence[Image.Image]) -> dict[str, float]:
        whole, outside = [], []
        for pictures in drawn:
            for i, (a, b) in enumerate(zip(pictures, bare)):
                square = ((_array(a) - _array(b)) ** 2).mean(2)
                whole.append(float(square.mean() ** 0.5))
                points = self.judges[0].look(a)[1]
                points = self._bare[0][i][1] if points is None else points
                kept = ~face_region(points, a.size) if points is not None else np.ones(square.shape, bool)
                if kept.any():
                    outside.append(float(square[kept].mean() ** 0.5))
        return {"change": float(np.mean(whole)), "change_outside_face": float(np.mean(outside or whole))}

    def _sheet(self, drawn: Sequence[Sequence[Image.Image]], bare: Sequence[Image.Image]) -> Image.Image:
        """A line for each guest: the photo, then for every prompt and seed without and with identity."""
        columns = 1 + 2 * len(self.jobs)
        sheet = Image.new("RGB", (columns * TILE, LINE + len(drawn) * TILE), "white")
        pen = ImageDraw.Draw(sheet)
        for i, (prompt, _) in enumerate(self.jobs):
            pen.text((TILE * (1 + 2 * i) + 2, 1), f"without / with: {prompt}"[:40], fill="black")
        for row, (guest, pictures) in enumerate(zip(self.guests, drawn)):
            tiles = [guest.picture, *(p for pair in zip(bare, pictures) for p in pair)]
            for column, tile in enumerate(tiles):
                sheet.paste(tile.resize((TILE, TILE), 3), (column * TILE, LINE + row * TILE))
        return sheet


def face_region(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bool [H, W]: the upright box around the recogniser's padded chip of a face with these five points."""
    matrix = invert(similarity_transform(points, template("dlib", 1)))
    corners = transform_points([(0, 0), (1, 0), (0, 1), (1, 1)], matrix)
    (x0, y0), (x1, y1) = corners.min(0), corners.max(0)
    x, y = np.arange(size[0]), np.arange(size[1])
    return ((y >= y0) & (y <= y1))[:, None] & ((x >= x0) & (x <= x1))[None]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _pictures(decoded: Tensor) -> list[Image.Image]:
    return [Image.fromarray(a) for a in as_bytes(decoded)]


def _array(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture, np.float32) / 255
