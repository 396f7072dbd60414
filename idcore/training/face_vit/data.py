"""Faces with the number of their person: folders of identities, or drawn people."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ...errors import InputError
from ...files import first_few
from ..commands import Say
from ..contract import Batch, Source, Step
from ..data.drawn import DrawnPeople
from ..data.faces import Faces
from ..data.mixed import WithCrops
from ..data.opening import prepared_folder
from ..data.order import shuffled
from ..data.source import PreparedSource, SourceConfig
from .config import DRAWN, FaceViTTrainConfig

STYLES = {"photo": 0.5, "pencil": 0.1, "oil": 0.1, "cartoon": 0.1, "sepia": 0.1, "night": 0.1}


class FaceFolders(PreparedSource):
    """Prepared pictures of people, a folder each (PERSON/*.jpg): `extra["person"]` [B] int64, their number.

    Args:
        folder: made by `idcore prepare`.
        config: how it is read.
        held_out: share of the people, at least 2, who are not trained on; 0: none.
        exam: give those, not the others.

    Raises:
        InputError: pictures outside of a person's folder, or fewer than two people.
    """

    def __init__(self, folder: str | Path, config: SourceConfig, *, held_out: float = 0.0, exam: bool = False) -> None:
        super().__init__(folder, config)
        loose = [r.id for r in self.records if "/" not in r.id]
        if loose:
            raise InputError(
                f"{self.root}: each person needs a folder of pictures, PERSON/*.jpg; {len(loose)} pictures lie outside "
                f"of one: {first_few(loose, 3)}"
            )
        people = sorted({_person(r.id) for r in self.records})
        away = max(2, round(held_out * len(people))) if held_out else 0
        if len(people) - away < 2:
            raise InputError(
                f"{self.root}: identification needs at least two people, and {away} more that are held out; found "
                f"{len(people)}: {first_few(people, 3)}"
            )
        order = [people[i] for i in shuffled(len(people), 0)]
        self.people = sorted(order[:away] if exam else order[away:])
        self.numbers = {name: i for i, name in enumerate(self.people)}
        self.records = [r for r in self.records if _person(r.id) in self.numbers]
        self.held_out = held_out

    def state(self) -> dict[str, Any]:
        return {**super().state(), "people": len(self.people), "held out": self.held_out}

    def micro_batches(self, step: int, seed: int, rank: int, world: int, size: int, count: int) -> Iterator[Batch]:
        for batch in super().micro_batches(step, seed, rank, world, size, count):
            batch.extra["person"] = torch.tensor([self.numbers[_person(i)] for i in batch.ids])
            yield batch


class Mirrored:
    """A source of chips of which a share is mirrored, each by (seed, step, place)."""

    def __init__(self, inner: WithCrops, share: float) -> None:
        self.inner, self.share = inner, share

    def __len__(self) -> int:
        return len(self.inner)

    def state(self) -> dict[str, Any]:
        return {**self.inner.state(), "mirrored": self.share}

    def micro_batches(self, step: int, seed: int, rank: int, world: int, size: int, count: int) -> Iterator[Batch]:
        dice = Step(seed, step, step + 1)
        for batch in self.inner.micro_batches(step, seed, rank, world, size, count):
            turned = (dice.uniform("mirror", batch.places) < self.share)[:, None, None, None]
            chip = batch.face["crop"]
            batch.face["crop"] = torch.where(turned, chip.flip(-1), chip)
            yield batch


def open_data(data: str, out: Path, config: FaceViTTrainConfig, say: Say) -> tuple[Source, int, list[Batch]]:
    """The training's source, the number of its people, and batches of the exam (people whom it does not have).

    Args:
        data: "drawn"; a folder of identities; or one that was prepared.
        out: folder of the run.

    Raises:
        InputError: no data, or data that does not fit.
    """
    size, template = config.vit.image_size, config.vit.template
    if data == DRAWN:
        d = config.drawn
        folder = Path(d.folder or out / "people")
        styles = STYLES if d.styles else {"photo": 1.0}
        people = DrawnPeople(folder, d.people, size=size, styles=styles)
        source = Mirrored(WithCrops(people, size, template), config.flip)
        return source, d.people, drawn_exam(folder, d.people, config.exam.people, size, template)
    folder = prepared_folder(Path(data), out, config.prepare, Faces("none", config.analyzer), say)
    inner = FaceFolders(folder, config.data, held_out=config.exam.share)
    source = Mirrored(WithCrops(inner, size, template), config.flip)
    if not config.exam.share:
        return source, len(inner.people), []
    unseen = FaceFolders(folder, config.data, held_out=config.exam.share, exam=True)
    chips = WithCrops(unseen, size, template)
    steps = min(len(unseen), config.exam.pictures)
    return source, len(inner.people), [next(chips.micro_batches(i, 0, 0, 1, 1, 1)) for i in range(steps)]


def drawn_exam(folder: Path, first: int, people: int, size: int, template: str) -> list[Batch]:
    """Both views of drawn people `first` and on, as photographs on walls of their own."""
    source = DrawnPeople(folder, people, first=first, size=size)
    numbers, batches = list(range(people)), []
    for view in (0, 1):
        dice = Step(view, 0, 1)
        batch = source.batch(numbers, [dice.generator("exam", p) for p in numbers], numbers, view)
        batches += WithCrops(_Given(batch), size, template).micro_batches(0, 0, 0, 1, people, 1)
    return batches


class _Given:
    """One batch as a source."""

    def __init__(self, batch: Batch) -> None:
        self.given = batch

    def __len__(self) -> int:
        return len(self.given)

    def state(self) -> dict[str, Any]:
        return {}

    def micro_batches(self, *place: int) -> Iterator[Batch]:
        yield self.given


def _person(name: str) -> str:
    return name.split("/")[0]
