"""Fixed people, prompts and seeds: pictures with each person's words and with the class word, and their likeness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ...identity import Identity
from ...systems.dreamidentity import DreamIdentity
from ...systems.words import WordSystem
from ..contract import Validation
from .config import DreamIdentityTrainConfig

TILE, LINE = 128, 14  # pixels of a tile of the sheet, and of a line of text
CHUNK = 8  # pictures that are drawn at once


@dataclass(eq=False)
class Guest:
    """A person of the validation: the picture, and the face [3, S, S] that the encoder reads."""

    name: str
    picture: Image.Image
    crop: Tensor


class Validator:
    """Draws every guest with every prompt and seed, as `idcore.attach` does it, from the same noise for all.

    Measures: the recogniser's between guests and their pictures, the same with the class word in their place, and the
    share of pictures with a face.

    Args:
        guests: at least one.
        config: all settings.
        judge: `training.pulid.validation.Judge`.
    """

    def __init__(self, guests: Sequence[Guest], config: DreamIdentityTrainConfig, judge: Any) -> None:
        self.guests, self.config, self.judge = list(guests), config, judge
        self.jobs = [(p, s) for p in config.validation.prompts for s in config.validation.seeds]
        self._own = [judge.look(g.picture)[0] for g in self.guests]
        self._plain: list[Image.Image] | None = None  # without a person: always the same

    @torch.no_grad()
    def __call__(self, system: DreamIdentity, base: Any) -> Validation:
        people = identities(system, torch.stack([g.crop for g in self.guests]))
        if self._plain is None:
            self._plain = self.draw(base, people[0], id_scale=0.0)
        drawn = [self.draw(base, person) for person in people]
        return Validation({"people": self._sheet(drawn)}, self._measures(drawn))

    def draw(self, base: Any, person: Identity, id_scale: float = 1.0) -> list[Image.Image]:
        """A picture of each job."""
        v, edge = self.config.validation, self.config.model.resolution
        made: list[Image.Image] = []
        with WordSystem().put_on(base.pipe, person, id_scale=id_scale, placeholder=self.config.people.placeholder):
            for start in range(0, len(self.jobs), CHUNK):
                part = self.jobs[start : start + CHUNK]
                made += draw(base.pipe, [p for p, _ in part], [s for _, s in part], v.steps, v.guidance, edge)
        return made

    def _measures(self, drawn: Sequence[Sequence[Image.Image]]) -> dict[str, float]:
        looks = [[self.judge.look(p)[0] for p in row] for row in drawn]
        plain = [e for e in (self.judge.look(p)[0] for p in self._plain or ()) if e is not None]
        kind = "distance" if self.judge.measure.smaller_is_closer else "similarity"
        value = self.judge.measure.value
        near = [value(o, e) for o, row in zip(self._own, looks) if o is not None for e in row if e is not None]
        bare = [value(o, e) for o in self._own if o is not None for e in plain]
        out = {"face/found": float(np.mean([e is not None for row in looks for e in row]))}
        told = {f"face/{kind}": near, f"face/{kind}_without": bare}
        return out | {k: float(np.mean(v)) for k, v in told.items() if v}

    def _sheet(self, drawn: Sequence[Sequence[Image.Image]]) -> Image.Image:
        """A column for the photos, and one for each job: the class word above, the people below."""
        sheet = Image.new("RGB", ((1 + len(self.jobs)) * TILE, (1 + len(drawn)) * TILE + LINE), "white")
        pen = ImageDraw.Draw(sheet)
        for i, (prompt, _) in enumerate(self.jobs):
            pen.text((TILE * (1 + i) + 2, 1), prompt[:22], fill="black")
        rows = [[None, *(self._plain or ())], *([g.picture, *row] for g, row in zip(self.guests, drawn))]
        for row, tiles in enumerate(rows):
            for column, tile in enumerate(tiles):
                if tile is not None:
                    sheet.paste(tile.resize((TILE, TILE), 3), (column * TILE, LINE + row * TILE))
        return sheet


def identities(system: DreamIdentity, crops: Tensor) -> list[Identity]:
    """People of faces [N, 3, S, S], each by itself."""
    p = next(system.parameters())
    words = system(crops.to(p.device, p.dtype)).detach().float().cpu()
    return [Identity(w[None], None, system.name, {"widths": list(system.config.widths)}) for w in words]


def draw(pipe: Any, said: Sequence[str], seeds: Sequence[int], steps: int, guidance: float, edge: int) -> list[Any]:
    """A picture for each prompt and seed by diffusers' pipeline as it stands, without a progress bar."""
    quiet = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(disable=True)
    try:
        return pipe(
            list(said), num_inference_steps=steps, guidance_scale=guidance, height=edge, width=edge,
            generator=[torch.Generator().manual_seed(s) for s in seeds],
        ).images  # fmt: skip
    finally:
        pipe.set_progress_bar_config(**(quiet or {}))
