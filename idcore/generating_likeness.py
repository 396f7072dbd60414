"""How alike generated pictures are to their people's photos, and what a style costs of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import InputError
from .workflows import face_choice

if TYPE_CHECKING:
    from PIL import Image

    from .encoders.analyzer import FaceAnalyzer
    from .generating import GenerateRequest

JUDGED = 256  # pixels of the shorter side, to which smaller pictures are enlarged


def photos_of(r: GenerateRequest) -> list[Path | None]:
    """A photo of each person, or None: those of `--like`, else `--id` where it is a photo.

    Raises:
        InputError: another number of photos than people.
    """
    from .generating_people import is_saved

    people = r.people()
    if r.like and len(r.like) != len(people):
        raise InputError(f"{r.command}: --like gives a photo per --id: {len(people)} people, {len(r.like)} photos")
    return list(r.like) or [None if is_saved(p) else p for p in people]


def check_photos(r: GenerateRequest) -> None:
    """Raise before anything is drawn where a person's photo cannot be read or shows no face that can be compared."""
    from .encoders.analyzer import embed_photo

    photos = [p for p in photos_of(r) if p is not None]
    judge = judge_of(r) if photos else None
    for photo in dict.fromkeys(photos):
        embed_photo(photo, judge, policy=face_choice(r.choose))


def judge_of(r: GenerateRequest) -> FaceAnalyzer:
    """Who looks: the models of `--faces`; of the small models' drawings with the detector's limit for drawn faces."""
    from .encoders.analyzer import EmbeddedAnalyzer, analyzer_from
    from .generating import is_tiny_sd
    from .metrics.gate import MIN_SCORE

    return (
        EmbeddedAnalyzer(min_score=MIN_SCORE)
        if r.faces == "embedded" and is_tiny_sd(r.base)
        else analyzer_from(r.faces)
    )


def likeness(
    photo: Path, pictures: Sequence[Image.Image], judge: FaceAnalyzer, *, choose: str = "largest", mask: Any = None
) -> list[float | None]:
    """Each picture against the photo in the recogniser's measure; None where no face is found.

    Args:
        photo: of the person.
        pictures: that should show the person.
        judge: finds and compares faces.
        choose: which face of the photo.
        mask: [1, H, W] or None: the part of the picture in which the person should be; its bounding box is looked at.
    """
    from .encoders.analyzer import embed_photo, find_face

    wanted = embed_photo(photo, judge, policy=face_choice(choose))[0]
    values: list[float | None] = []
    for picture in pictures:
        part = _enlarged(picture if mask is None else picture.crop(_box(mask, *picture.size)))
        image, face = find_face(part, judge, on_no_face="skip")
        got = None if face is None else judge.embed(image, face)
        values.append(None if got is None else round(float(judge.measure.value(wanted, got)), 4))
    return values


def _enlarged(picture: Image.Image) -> Image.Image:
    times = JUDGED / min(picture.size)
    return picture if times <= 1 else picture.resize(tuple(round(s * times) for s in picture.size), 3)


def _box(mask: Any, width: int, height: int) -> tuple[int, int, int, int]:
    """Pixels of the picture around all of a mask's cells above one half."""
    cells = np.argwhere(np.asarray(mask)[0] > 0.5)
    if not len(cells):
        return 0, 0, width, height
    scale = np.array([height, width]) / np.asarray(mask).shape[-2:]
    (y0, x0), (y1, x1) = cells.min(0) * scale, (cells.max(0) + 1) * scale
    return int(x0), int(y0), max(int(x1), int(x0) + 1), max(int(y1), int(y0) + 1)


def compared(
    r: GenerateRequest, pictures: Sequence[Image.Image], without: Sequence[Image.Image], masks: Sequence[Any]
) -> dict[str, Any] | None:
    """Likeness of every person of whom there is a photo, with and where drawn without the styles; None for nobody.

    Returns:
        {"measure", "people": [{"person", "values", "found", "mean"}]}; with `without` also "without_style" (values),
        "mean_without_style", "loss" and "pairs": by how much the style takes pictures away from the person, over the
        pairs in both of which a face is found.
    """
    photos = photos_of(r)
    if not any(p is not None for p in photos):
        return None
    judge, told = judge_of(r), []
    for i, photo in enumerate(photos):
        if photo is None:
            continue
        mask = masks[i] if i < len(masks) else None
        values = likeness(photo, pictures, judge, choose=r.choose, mask=mask)
        one = {"person": i, "values": values, **_summary(values)}
        if without:
            plain = likeness(photo, without, judge, choose=r.choose, mask=mask)
            one |= {"without_style": plain, "mean_without_style": _summary(plain)["mean"]}
            one |= _loss(values, plain, judge.measure.smaller_is_closer)
        told.append(one)
    return {"measure": judge.measure.describe(), "kind": judge.measure.name, "people": told}


def _summary(values: Sequence[float | None]) -> dict[str, Any]:
    known = [v for v in values if v is not None]
    return {"found": len(known), "mean": round(float(np.mean(known)), 4) if known else None}


def _loss(values: Sequence[float | None], plain: Sequence[float | None], smaller_is_closer: bool) -> dict[str, Any]:
    by = [a - b for a, b in zip(values, plain) if a is not None and b is not None]
    loss = None if not by else round(float(np.mean(by)) * (1 if smaller_is_closer else -1), 4)
    return {"loss": loss, "pairs": len(by)}


def in_words(found: dict[str, Any], photos: Sequence[Path | None]) -> list[str]:
    """A line per person for the screen; files' names stay on this machine."""
    lines = []
    for one in found["people"]:
        line = _line(photos[one["person"]].name, one["values"], found["kind"])
        if "loss" in one:
            line += (
                f"; without style {_number(one['mean_without_style'])}: the style takes {_number(one['loss'])} of the "
                f"likeness ({one['pairs']} pairs)"
            )
        lines.append(line)
    return [*lines, found["measure"]]


def summary_line(name: str, values: Sequence[float | None], measure: Any) -> str:
    """Mean and share of faces found, in words."""
    return _line(name, values, measure.name)


def _line(name: str, values: Sequence[float | None], kind: str) -> str:
    told, s = {"l2": "distance", "cosine": "similarity"}[kind], _summary(values)
    return f"{name}: mean {told} {_number(s['mean'])}, face found in {s['found']} of {len(values)}"


def _number(v: float | None) -> str:
    return "unknown" if v is None else f"{v:.3f}"
