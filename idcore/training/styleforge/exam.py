"""What pictures of drawn people show: is it the style, is it what the prompt asks for, and where the style leaks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from ...metrics.gate import Judge, background_of
from ...systems.styleforge import StyleWords
from ..bases.tiny_sd import TinySDBase
from .drawn import SIZE, Styles

SEEDS = (100, 101, 102, 103)  # of the pictures
CONTENTS = {  # and their walls; the step search draws others
    "a man, blue background": "blue", "a woman smiling, red background": "red", "a person, green background": "green",
    "a woman looking left, yellow background": "yellow", "a man smiling, pink background": "pink",
    "a person surprised, white background": "white",
}  # fmt: skip
EMPTY = ("an empty scene, blue background", "nobody, red background", "an empty background, green background")
MEASURES = {
    "style": "target style", "way": "way to the style", "background": "background as asked", "face": "face found",
    "all": "all three", "nobody": "nobody where asked", "plain": "photo without the word",
}  # fmt: skip
BY_WORD = {"pencil": "a pencil drawing", "oil": "an oil painting", "cartoon": "a cartoon"}


class Exam:
    """Pictures by the prompts above, and what they show. Made while no style is on the base."""

    def __init__(self, base: TinySDBase) -> None:
        self.base, self.styles, self.faces = base, Styles(), Judge()
        self.walls = [c for c in CONTENTS.values() for _ in SEEDS]
        self.before: dict[tuple[str, float], list[Image.Image]] = {}  # the base's own pictures by word and guidance

    def __call__(
        self, target: str, words: StyleWords, guidance: float = 1.0
    ) -> tuple[dict[str, float], list[Image.Image]]:
        """`MEASURES`, most of them shares of pictures; and pictures of people, of nobody, and without the word."""
        shown = self._draw([words.person(c) for c in CONTENTS], guidance)
        empty = self._draw([words.place(c) for c in EMPTY], guidance)
        plain = self._draw([f"a photo of {c}" for c in CONTENTS], guidance)
        before = self.before.get((words.style, guidance), shown)
        styled = np.array([s == target for s in self.styles(shown)])
        walled = np.array([background_of(p) == c for p, c in zip(shown, self.walls, strict=True)])
        faced = np.array([self._face(p) for p in shown])
        figures = {
            "style": styled.mean(),
            "way": self.styles.way(before, shown, target, list(CONTENTS.values())),
            "background": walled.mean(),
            "face": faced.mean(),
            "all": (styled & walled & faced).mean(),
            "nobody": np.mean([not self._face(p) for p in empty]),
            "plain": np.mean([s == "photo" for s in self.styles(plain)]),
        }
        row = [*shown[:: len(SEEDS)], *empty[:: len(SEEDS)], *plain[:: len(SEEDS)]]
        return {k: float(v) for k, v in figures.items()}, row

    def remember(self, words: StyleWords, guidance: float = 1.0) -> None:
        """The pictures that the base draws now are where the way to a style begins."""
        self.before[words.style, guidance] = self._draw([words.person(c) for c in CONTENTS], guidance)

    def by_word(self) -> dict[str, dict[str, float]]:
        """ "style" and "way" of `MEASURES` by style, where the base is asked for it by its own name."""
        photo = self._draw([f"a photo of {c}" for c in CONTENTS])
        found = {}
        for style, said in BY_WORD.items():
            shown = self._draw([f"{said} of {c}" for c in CONTENTS])
            share = float(np.mean([s == style for s in self.styles(shown)]))
            found[style] = {"style": share, "way": self.styles.way(photo, shown, style, list(CONTENTS.values()))}
        return found

    def _face(self, picture: Image.Image) -> bool:
        return self.faces.embed(picture) is not None

    def _draw(self, prompts: Sequence[str], guidance: float = 1.0) -> list[Image.Image]:
        """A picture of every prompt with every seed, all in one pass; guidance above 1 is away from an empty prompt."""
        generators = [torch.Generator().manual_seed(s) for _ in prompts for s in SEEDS]
        return self.base.pipe(
            [p for p in prompts for _ in SEEDS], height=SIZE, width=SIZE, num_inference_steps=4,
            guidance_scale=guidance, generator=generators,
        ).images  # fmt: skip
