"""Which prompt each part of a picture reads, where people that act through the prompt have regions; and where the
background is, which has a prompt of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import InputError
from .text.placeholders import replaced

if TYPE_CHECKING:
    from torch import Tensor

    from .generating import GenerateRequest


class Named(NamedTuple):
    """A person in the prompt."""

    placeholder: str
    class_word: str
    mask: Tensor | None  # [1, H, W], or None: everywhere
    by_stages: bool


class Texts(NamedTuple):
    """The main prompt, and the other texts with their masks: in the attention, and in passes of their own."""

    prompt: str
    others: list[tuple[str, Tensor]]
    passes: list[tuple[str, Tensor]]


def masks_of(r: GenerateRequest, people: int) -> tuple[Any, ...]:
    """One mask [1, H, W] float or None per person.

    Raises:
        InputError: a layout and masks, another number than people, a mask that is black, or a file that is no picture.
    """
    from .attention.masks import read_masks
    from .attention.regions import layout_boxes

    if r.layout is not None and r.masks:
        raise InputError(f"{r.command}: give --layout or --mask, not both")
    if not people:
        return ()
    given = len(r.masks) if r.layout is None else len(layout_boxes(r.layout))
    if given and given != people:
        said = "one --mask per person" if r.masks else "one area in --layout per person"
        raise InputError(f"{r.command}: {people} people need {said}, in the order of --id; got {given}")
    if not r.masks:
        return tuple(None if m is None or bool((m == 1).all()) else m for m in read_masks(r.layout, people))
    from .encoders.images import load_image

    masks = read_masks([load_image(m) for m in r.masks], people)
    for path, mask in zip(r.masks, masks, strict=True):
        if not bool((mask > 0).any()):
            raise InputError(f"{r.command}: --mask {path} is black, so that its person is nowhere; draw white where")
    return masks


def person_region(r: GenerateRequest, masks: Sequence[Tensor | None]) -> Tensor:
    """Where `--background` is not read: `--person-region`, else where the people are, grown by `--person-margin`.
    [1, H, W]"""
    from .systems.region_passes import grown

    return grown(_people_region(r, masks), r.person_margin)


def _people_region(r: GenerateRequest, masks: Sequence[Tensor | None]) -> Tensor:
    from .attention.masks import read_masks
    from .attention.regions import layout_boxes
    from .encoders.images import load_image

    if r.person_region is not None:
        path = r.person_region
        if not _is_file(path) and len(layout_boxes(path)) != 1:
            raise InputError(f"{r.command}: --person-region is one area, got {path!r}; a picture can hold several")
        (mask,) = read_masks([load_image(path)] if _is_file(path) else path, 1)
        return mask
    known = [m for m in masks if m is not None]
    if not known or len(known) < len(masks):
        raise InputError(
            f"{r.command}: --background is read outside of the people, and nothing says where they are; give "
            '--person-region "center" (a layout, or a picture that is white there), or --layout for all of them'
        )
    return _on_one_size(known).amax(0)


def _is_file(text: str) -> bool:
    from pathlib import Path

    return Path(text).is_file()


def _on_one_size(masks: Sequence[Tensor]) -> Tensor:
    """[n, 1, H, W]"""
    import torch
    from torch.nn.functional import interpolate

    size = [max(m.shape[i] for m in masks) for i in (-2, -1)]
    return torch.stack([interpolate(m[None], size)[0] for m in masks])


def texts_of(prompt: str, people: Sequence[Named]) -> Texts:
    """The prompts of a picture's parts.

    A person with a mask is named there alone; elsewhere the prompt reads the class word. People without a mask are
    named everywhere. One by stages is named in the main prompt, as texts in the attention do not change with the
    stage; of several, those with a mask in passes of their own.

    Args:
        prompt: names all of them.
        people: those that act through the prompt.
    """
    everywhere, apart = [p for p in people if p.mask is None], [p for p in people if p.mask is not None]
    others = [(_naming(prompt, people, [p, *_plain(people)]), p.mask) for p in apart if not p.by_stages]
    staged = [p for p in apart if p.by_stages]
    if sum(p.by_stages for p in people) > 1:
        passes = [(_naming(prompt, people, [p, *everywhere]), p.mask) for p in staged]
        return Texts(_naming(prompt, people, everywhere), others, passes)
    for p in staged:
        others.append((_naming(prompt, people, _plain(people)), _rest([p.mask, *(m for _, m in others)])))
    return Texts(_naming(prompt, people, [*everywhere, *staged]), others, [])


def _plain(people: Sequence[Named]) -> list[Named]:
    """Those that any text may name."""
    return [p for p in people if p.mask is None and not p.by_stages]


def _naming(prompt: str, people: Sequence[Named], kept: Sequence[Named]) -> str:
    names = {p.placeholder for p in kept}
    return replaced(prompt, {p.placeholder: p.class_word for p in people if p.placeholder not in names})


def _rest(masks: Sequence[Tensor]) -> Tensor:
    """What several masks leave. [1, H, W]"""
    return (1 - _on_one_size(masks).sum(0)).clamp(0, 1)
