"""What weights of PuLID draw of people whom no training saw: measures, and the pictures themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from ... import prompts
from ...metrics.drawn_attributes import DrawnExam, drawn_photo, table_people
from .config import PuLIDTrainConfig, ValidationSettings
from .run import Models
from .task import PuLIDTask
from .validation import Guest, Judge, Validator

GALLERY = 24  # people among whom the right one is looked for
PEOPLE = 12  # of them are drawn
SHOWN = 4  # of them are shown
PROMPTS = (0, 1, 3, 5)  # of "tiny-edits": photo, smiling, looking left, pencil
EDGE = 96  # pixels of a tile
LINE = 14


class Exam:
    """Draws everyone with the same prompts and seeds, with given weights; made once for all of them.

    Args:
        config: settings of the training: base, resolution, steps.
    """

    def __init__(self, config: PuLIDTrainConfig) -> None:
        self.models, self.config = Models(config), config
        asked = prompts.load("tiny-edits")
        self.prompts = [asked[i] for i in PROMPTS]
        self.labels = [asked.labels[i] for i in PROMPTS]
        seeds, self.gallery = table_people(GALLERY)
        judge = Judge("face", self.gallery.judge.analyzer)
        read = self.models.preprocess()
        photos = {str(s): drawn_photo(s, size=256) for s in seeds[:PEOPLE]}
        self.guests = [Guest(name, photo, read(photo)) for name, photo in photos.items()]
        settings = ValidationSettings(prompts=tuple(self.prompts), seeds=(0,))
        self.validator = Validator(self.guests, [judge], settings)

    @torch.no_grad()
    def __call__(self, weights: Path | None, sheet: Path | None = None) -> dict[str, float]:
        """Measures of a file of weights; None: of the base without identity.

        Args:
            sheet: a PNG file to write: a line for each of the first people, a column for each prompt.
        """
        system = self.models.system(weights).eval()
        task = PuLIDTask(system, 1, self.config, self.models.base)
        system.eval()
        try:
            drawn = [self.validator.draw(task, guest) for guest in self.guests]
        finally:
            task.close()
        pictures = [d[1] if weights is None else d[0] for d in drawn]
        if sheet is not None:
            paste(pictures[:SHOWN]).save(sheet)
        return judged(self.gallery, pictures, self.labels) | (
            {} if weights is None else self.validator.differences(drawn)
        )

    def photos(self) -> list[Image.Image]:
        """The photos of those who are shown."""
        return [guest.picture for guest in self.guests[:SHOWN]]


def judged(
    exam: DrawnExam, pictures: Sequence[Sequence[Image.Image]], labels: Sequence[Mapping[str, str]]
) -> dict[str, float]:
    """`DrawnExam.score` of rows of pictures: row i shows person i, column j asks for labels j."""
    flat = [p for row in pictures for p in row]
    who = [i for i, row in enumerate(pictures) for _ in row]
    return exam.score(flat, who, [label for _ in pictures for label in labels])


def paste(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Pictures in rows, each `EDGE` pixels wide."""
    sheet = Image.new("RGB", (EDGE * max(map(len, rows)), EDGE * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture.convert("RGB").resize((EDGE, EDGE), Image.Resampling.BICUBIC), (x * EDGE, y * EDGE))
    return sheet


def side_by_side(sheets: Mapping[str, Path]) -> Image.Image:
    """Sheets, each under its name."""
    parts = {name: Image.open(path).convert("RGB") for name, path in sheets.items()}
    gap = EDGE // 8
    width = sum(p.width + gap for p in parts.values()) - gap
    whole = Image.new("RGB", (width, LINE + max(p.height for p in parts.values())), "white")
    pen, x = ImageDraw.Draw(whole), 0
    for name, part in parts.items():
        pen.text((x + 2, 1), name, fill="black")
        whole.paste(part, (x, LINE))
        x += part.width + gap
    return whole
