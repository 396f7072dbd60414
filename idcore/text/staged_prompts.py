"""Prompts of SeFi-IDE: one encoding per stage for keys and one for values, by the pipeline's own text encoders."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .placeholders import mentions, replaced

_POSITIVE = ("prompt", "prompt_2")
_NEGATIVE = ("negative_prompt", "negative_prompt_2")


@dataclass(frozen=True)
class StagedPerson:
    """A placeholder of prompts, and the placeholders of one word each that stand for it: S for keys, S for values."""

    placeholder: str
    class_word: str
    variants: tuple[str, ...]


class StagedPrompts:
    """Stands before a pipeline's `encode_prompt` while attached, and makes wide text (`attention.staged`) of prompts
    that name a person; other prompts go past it.

    The reference encoding, the pooled text and with `off` everything come from the prompt with the class word. SDXL's
    pooled text thus carries no identity (our choice: the paper has none, and it cannot differ by stage).
    """

    def __init__(self, pipe: Any, people: Sequence[StagedPerson]) -> None:
        self._pipe = weakref.ref(pipe)
        self._found = pipe.__dict__.get("encode_prompt")
        self.people, self.off = tuple(people), False
        pipe.__dict__["encode_prompt"] = self

    def remove(self) -> None:
        """Give the pipeline its own method back."""
        pipe = self._pipe()
        if pipe is None or pipe.__dict__.get("encode_prompt") is not self:
            return
        del pipe.__dict__["encode_prompt"]
        if self._found is not None:
            pipe.__dict__["encode_prompt"] = self._found

    def __call__(self, *args: Any, **kwargs: Any) -> tuple:
        """What `encode_prompt` gives; text of prompts with a person is wide."""
        pipe = self._pipe()
        inner = self._found or type(pipe).encode_prompt.__get__(pipe)
        given = dict(inspect.signature(inner).bind(*args, **kwargs).arguments)
        names = tuple(p.placeholder for p in self.people)
        words = {n: given[n] for n in (*_POSITIVE, *_NEGATIVE) if given.get(n) is not None}
        named = {n for n, texts in words.items() if any(mentions(t, names) for t in _list(texts))}
        if given.get("prompt_embeds") is not None or not named:
            return _alike(inner(**given))
        plain = {p.placeholder: p.class_word for p in self.people}
        made = list(inner(**{**given, **{n: _mapped(t, plain) for n, t in words.items()}}))
        if self.off:
            return tuple(made)
        for i, of in enumerate((_POSITIVE, _NEGATIVE)):
            if made[i] is not None and named & set(of):
                made[i] = self._wide(inner, given, made[i], of)
        return _alike(tuple(made))

    def _wide(self, inner: Callable, given: dict[str, Any], reference: Tensor, names: tuple[str, str]) -> Tensor:
        """[B, L, (1 + 2 S) E] of the prompts under these names."""
        count = len(self.people[0].variants)
        by = [{p.placeholder: p.variants[j] for p in self.people} for j in range(count)]
        texts = {}
        for role, name in zip(_POSITIVE, names):
            if given.get(name) is not None:
                texts[role] = [t for j in range(count) for t in _mapped(_list(given[name]), by[j])]
        call = {n: v for n, v in given.items() if not n.startswith("negative") and n not in _POSITIVE}
        if names is _NEGATIVE:
            call.pop("clip_skip", None)  # pipelines leave no layers out for it
        encoded = inner(**{**call, **texts, "do_classifier_free_guidance": False})[0]
        parts = encoded.unflatten(0, (count, -1))
        if parts.shape[1] != len(reference):  # one negative prompt for several prompts
            parts = parts.repeat_interleave(len(reference) // parts.shape[1], 1)
        return _joined(reference, parts)


def _joined(reference: Tensor, parts: Tensor) -> Tensor:
    """As `attention.staged.joined_text`, of parts [2 S, B, L, E] in one tensor."""
    from ..attention.staged import joined_text

    half = len(parts) // 2
    return joined_text(reference, tuple(parts[:half]), tuple(parts[half:]))


def _alike(made: tuple) -> tuple:
    """Plain text beside wide text serves all its stages."""
    text, other, *pooled = made
    if text is None or other is None or text.shape[-1] == other.shape[-1]:
        return made
    if text.shape[-1] > other.shape[-1]:
        other = other.repeat(1, 1, text.shape[-1] // other.shape[-1])
    else:
        text = text.repeat(1, 1, other.shape[-1] // text.shape[-1])
    return (text, other, *pooled)


def _list(texts: Any) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)


def _mapped(texts: Any, by: dict[str, str]) -> Any:
    """With placeholders replaced; a string stays one, a list a list."""
    return replaced(texts, by) if isinstance(texts, str) else [replaced(t, by) for t in texts]
