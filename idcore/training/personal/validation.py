"""Fixed prompts and seeds: pictures with the person and with the class word, and how alike they are to the photos."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from ...text.placeholders import replaced
from ..contract import Validation

TILE, LINE = 128, 14  # pixels of a tile of the sheet, and of a line of text
CHUNK = 4  # pictures that are drawn at once


class Validator:
    """Draws every prompt with every seed, as `idcore.attach` does it, and compares faces with the photos.

    Measures, with a recogniser: the mean of its measure between pictures and photos, the same with the class word in
    the person's place, and the share of pictures with a face.

    Args:
        photos: of the person.
        config: all settings.
        size: height and width of the pictures.
        judge: `training.pulid.validation.Judge`, or None: nothing is measured.
    """

    def __init__(self, photos: Sequence[Image.Image], config: Any, size: tuple[int, int], judge: Any) -> None:
        self.photos, self.config, self.size, self.judge = list(photos), config, size, judge
        v = config.validation
        self.jobs = [(p, s) for p in config.texts(v.prompts) for s in v.seeds]
        looks = [] if judge is None else [judge.look(p)[0] for p in self.photos]
        self._own = [e for e in looks if e is not None]
        self._plain: list[Image.Image] | None = None  # without the person: always the same

    @torch.no_grad()
    def __call__(self, task: Any) -> Validation:
        if self._plain is None:
            self._plain = self.draw(task, plain=True)
        drawn = self.draw(task)
        return Validation({"person": self._sheet(drawn)}, self._measures(drawn))

    def draw(self, task: Any, plain: bool = False) -> list[Image.Image]:
        """A picture of each job."""
        v, person, pipe = self.config.validation, self.config.person, task.base.pipe
        quiet, made = getattr(pipe, "_progress_bar_config", None), []
        pipe.set_progress_bar_config(disable=True)
        try:
            with task.drawing():
                for start in range(0, len(self.jobs), CHUNK):
                    part = self.jobs[start : start + CHUNK]
                    said = [replaced(p, {person.placeholder: person.class_word}) if plain else p for p, _ in part]
                    made += pipe(
                        said, num_inference_steps=v.steps, guidance_scale=v.guidance, height=self.size[0],
                        width=self.size[1], generator=[torch.Generator().manual_seed(s) for _, s in part],
                    ).images  # fmt: skip
        finally:
            pipe.set_progress_bar_config(**(quiet or {}))
        return made

    def _measures(self, drawn: Sequence[Image.Image]) -> dict[str, float]:
        if self.judge is None:
            return {}
        looks = [self.judge.look(p)[0] for p in drawn]
        out = {f"{self.judge.name}/found": float(np.mean([e is not None for e in looks]))}
        kind = "distance" if self.judge.measure.smaller_is_closer else "similarity"
        without = [self.judge.look(p)[0] for p in self._plain or ()]
        for name, seen in ((kind, looks), (f"{kind}_without", without)):
            values = [self.judge.measure.value(own, e) for own in self._own for e in seen if e is not None]
            if values:
                out[f"{self.judge.name}/{name}"] = float(np.mean(values))
        return out

    def _sheet(self, drawn: Sequence[Image.Image]) -> Image.Image:
        """A column for the first photo, and one for each job: the class word above, the person below."""
        sheet = Image.new("RGB", ((1 + len(drawn)) * TILE, 2 * TILE + LINE), "white")
        pen = ImageDraw.Draw(sheet)
        for i, (prompt, _) in enumerate(self.jobs):
            pen.text((TILE * (1 + i) + 2, 1), prompt[:22], fill="black")
        rows = [[None, *(self._plain or ())], [self.photos[0], *drawn]]
        for row, tiles in enumerate(rows):
            for column, tile in enumerate(tiles):
                if tile is not None:
                    sheet.paste(tile.resize((TILE, TILE), 3), (column * TILE, LINE + row * TILE))
        return sheet
