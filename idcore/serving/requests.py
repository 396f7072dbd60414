"""What one user wants drawn, its limits, and how several of them become one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ..attention.regions import layout_masks
from ..errors import InputError
from ..identity import Identity

MAX_PEOPLE = 8  # in one picture
MAX_TOKENS = 1024  # of an identity from outside; our choice, PuLID's have 10 to 148
MAX_STEPS = 100
MAX_COUNT = 64


@dataclass(frozen=True, eq=False)
class DrawRequest:
    """What one user wants drawn; every request of a batch has values of its own but for those of its key.

    Attributes:
        prompt, negative: in words.
        people: identities, all in one picture.
        scales: strength of each of them, 0 to 5.
        regions: where each of them acts, a layout such as "left, right" (`attention.regions`), or None.
        seed: picture i is made from seed + i.
        count: pictures.
        steps, guidance, width, height, start, end: as in `IDPipeline`; equal in a batch. Sizes None: the model's own.
    """

    prompt: str
    negative: str = ""
    people: tuple[Identity, ...] = ()
    scales: tuple[float, ...] = ()
    regions: str | None = None
    seed: int = 0
    count: int = 1
    steps: int = 4
    guidance: float = 1.0
    width: int | None = None
    height: int | None = None
    start: float = 0.0
    end: float = 1.0


def check_person(identity: Identity, system: Any) -> None:
    """Raises InputError unless this is one person of this system."""
    identity.require_system(system.name)
    if len(identity) != 1:
        raise InputError(f"an identity of one person has one row, got {len(identity)}; save people one by one")
    if identity.tokens.shape[1] > MAX_TOKENS:
        raise InputError(f"an identity may have up to {MAX_TOKENS} tokens, got {identity.tokens.shape[1]}")


def check_request(r: DrawRequest, size: tuple[int, int] | None) -> None:
    """Raises InputError where a value is out of range; `size`: the only (height, width) that there is, or None."""
    if not r.prompt.strip():
        raise InputError("the prompt is empty; write what to draw in words")
    if not (_is_text(r.prompt) and _is_text(r.negative)):
        raise InputError("a prompt holds half a character (a lone surrogate); send valid Unicode")
    if size is not None and ((r.height or size[0]), (r.width or size[1])) != size:
        raise InputError(f"this model draws {size[1]}x{size[0]} pictures, got {r.width}x{r.height}; leave the size out")
    if not 1 <= r.steps <= MAX_STEPS:
        raise InputError(f"steps must be 1 to {MAX_STEPS}, got {r.steps}")
    if not 1 <= r.count <= MAX_COUNT:
        raise InputError(f"count must be 1 to {MAX_COUNT}, got {r.count}")
    if not 0 <= r.seed < 2**63 - MAX_COUNT:
        raise InputError(f"seed must be a whole number from 0 to 2^63 - {MAX_COUNT + 1}, got {r.seed}")
    if not 0 <= r.start < r.end <= 1:
        raise InputError(f"start and end must be 0 <= start < end <= 1, got {r.start} and {r.end}")
    if not 0 <= r.guidance <= 30:
        raise InputError(f"guidance must be 0 to 30, got {r.guidance}")
    if len(r.people) > MAX_PEOPLE or len(r.scales) != len(r.people):
        raise InputError(f"up to {MAX_PEOPLE} people with a scale each, got {len(r.people)} and {len(r.scales)} scales")
    if not all(0 <= s <= 5 for s in r.scales):
        raise InputError(f"scales of identities must be 0 to 5, got {', '.join(f'{s:g}' for s in r.scales)}")


def region_masks(r: DrawRequest) -> list[torch.Tensor]:
    """A mask [H, W] per person. Raises InputError for another number of areas than people, or no layout."""
    masks = layout_masks(r.regions)
    if len(masks) != len(r.people):
        raise InputError(f"regions {r.regions!r} hold {len(masks)} people, the request names {len(r.people)}")
    return masks


def people_of(each: Sequence[DrawRequest]) -> tuple[list[Identity], dict[str, Any]]:
    """Identities, scales and masks of a batch with one entry per picture: slot by slot, with a row per picture."""
    slots = max(len(r.people) for r in each)
    if not slots:
        return [], {}
    somebody = next(r.people[0] for r in each if r.people)
    rows = [[*r.people, *[somebody] * (slots - len(r.people))] for r in each]
    scales = [[*r.scales, *[0.0] * (slots - len(r.people))] for r in each]
    columns = [list(c) for c in zip(*rows)]
    # The very same person stays projected from batch to batch.
    people = [c[0] if all(p is c[0] for p in c) else Identity.batch(c) for c in columns]
    same = all(s == scales[0] for s in scales)
    return people, {"id_scale": scales[0] if same else torch.tensor(scales).T, "id_masks": _masks_of(each, slots)}


def _masks_of(each: Sequence[DrawRequest], slots: int) -> list[torch.Tensor | None] | None:
    if all(r.regions is None for r in each):
        return None
    rows = [[] if r.regions is None else region_masks(r) for r in each]
    everywhere = torch.ones_like(next(m for row in rows for m in row))
    return [torch.stack([row[j] if j < len(row) else everywhere for row in rows]) for j in range(slots)]


def by_request(pictures: Sequence[Image.Image], requests: Sequence[DrawRequest]) -> list[list[Image.Image]]:
    """Pictures of a batch, dealt out."""
    left = iter(pictures)
    return [[next(left) for _ in range(r.count)] for r in requests]


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
