"""What a photo keeps when it is redrawn with more and more strength, on tiny-sd."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...metrics.drawn_attributes import DrawnExam, drawn_photo
from ...metrics.layouts import same_layout
from ...metrics.tiny_style import StyleJudge
from ...sampling.stylise import stylise
from ...workflows import write_text

STRENGTHS = (0.25, 0.5, 0.75, 1.0)
PROMPT = "a pencil drawing of a person, green background"


def redrawn(pipe: Any, seed: int, exam: DrawnExam, people: Sequence[int], folder: Path) -> list[dict[str, Any]]:
    """A row per strength: "layout" (agreement of coarse shades with the photo), "style" (share that a judge no longer
    takes for a photo), "distance" to the person.

    Args:
        pipe: tiny-sd.
        seed: of the noise.
        exam: knows the people.
        people: their seeds, in the exam's order.
        folder: where the figures are kept; what is there is not made again.
    """
    path = folder / "strengths.json"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({str(s): _figures(pipe, seed, s, exam, people) for s in STRENGTHS}))
    return [{"run": f"strength {s}", "seed": seed, **f} for s, f in json.loads(path.read_text()).items()]


def _figures(pipe: Any, seed: int, strength: float, exam: DrawnExam, people: Sequence[int]) -> dict[str, float]:
    photos = [drawn_photo(p, size=128, background="green") for p in people]
    made = [
        stylise(pipe, p, PROMPT, strength=strength, long_side=64, seed=100 * seed + i) for i, p in enumerate(photos)
    ]
    told = exam.score(made, list(range(len(people))), [{"background": "green"}] * len(made))
    styles = StyleJudge.from_package()(made)
    return {
        "layout": float(np.mean([same_layout(p, m) for p, m in zip(photos, made, strict=True)])),
        "style": float(np.mean([s != "photo" for s in styles])), "distance": told["distance"],
    }  # fmt: skip
