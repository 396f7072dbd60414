"""Identities that enter by the prompt: learned words in the places of a placeholder, nothing on the UNet.

The words are the tokens of an `Identity`, [Bi, k, E]: k consecutive words, E the width of one text encoder's word
embeddings, or of two side by side (SDXL: 768 + 1280). Such an identity comes from DreamIdentity, or from a textual
inversion file (`idcore.text.inversion`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from idcore.errors import InputError
from idcore.identity import Identity
from idcore.text.placeholders import Words, check_placeholder
from idcore.text.reader import TextPart, components_of, put_on, take_off, text_parts

PLACEHOLDER = "S*"
CLASS_WORD = "person"  # our choice
WORD_SYSTEMS = ("words", "dreamidentity")  # whose identities are words


class WordSystem:
    """Puts identities made of words on a pipeline; needs no weights of its own."""

    name = "words"

    def put_on(
        self, pipe: Any, identity: Any, *, id_scale: Any = 1.0, placeholder: Any = None, class_word: str = CLASS_WORD
    ) -> WordsHandle:
        """What `idcore.attach` calls.

        Args:
            pipe: A diffusers pipeline (SD 1.x, SD 2.x, SDXL), or an `IDPipeline`.
            identity: An `Identity` of words, or a list of them: several people in one prompt. One row serves all
                prompts of a call; several rows must divide their number.
            id_scale: 1; or 0: the placeholder is read as `class_word`.
            placeholder: What prompts say; one per identity. Default: what the identity's meta names, else "S*".
            class_word: What the placeholder reads as at scale 0 (our choice: "person").

        Raises:
            InputError: no pipeline with text encoders, words of another width, or a placeholder that is taken.
        """
        people = word_people(identity)
        names = placeholders_of(people, placeholder)
        return WordsHandle(self.name, text_parts(pipe), people, names, class_word, id_scale)


class WordsHandle:
    """Words on a pipeline's text encoders: swap them, switch them off, take them off."""

    def __init__(
        self, name: str, parts: Sequence[TextPart], people: Sequence[Identity], names: Sequence[str], class_word: str,
        id_scale: Any,
    ) -> None:  # fmt: skip
        widths = [p.width for p in parts]
        off = not word_scale(id_scale)
        self._name, self._parts, self._class_word = name, tuple(parts), class_word
        self._words = [Words(n, split_words(p, widths), class_word, off=off) for p, n in zip(people, names)]
        self._put(self._words)
        self.attached = True

    def __enter__(self) -> WordsHandle:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.detach()

    def __repr__(self) -> str:
        state = "attached" if self.attached else "detached"
        words = ", ".join(f"{w.placeholder} x {len(w.ids)}" for w in self._words)
        return f"WordsHandle({self._name}, {words}, {len(self._parts)} text encoders, {state})"

    @property
    def placeholders(self) -> tuple[str, ...]:
        """What prompts say, one per identity."""
        return tuple(w.placeholder for w in self._words)

    def detach(self) -> None:
        """Take the words off: tokenizers and text encoders are what they were. May be called again."""
        if self.attached:
            take_off(self._parts, self._words)
            self.attached = False

    def scale(self, id_scale: Any) -> None:
        """1: the words; 0: the class word in their places."""
        off = not word_scale(id_scale)
        for w in self._words:
            w.off = off

    def identity(self, identity: Any) -> None:
        """Swap the identities under the same placeholders. With an exception the old ones stay.

        Raises:
            InputError: they do not fit, or are more or fewer than the placeholders.
        """
        people = word_people(identity)
        names, off = self.placeholders, self._words[0].off
        if len(people) != len(names):
            raise InputError(f"identity: {len(names)} placeholders ({', '.join(names)}) got {len(people)} identities")
        widths = [p.width for p in self._parts]
        fresh = [Words(n, split_words(p, widths), self._class_word, off=off) for p, n in zip(people, names)]
        if self.attached:
            take_off(self._parts, self._words)
            self._put(fresh)
        self._words = fresh

    def _put(self, words: Sequence[Words]) -> None:
        put_on(self._parts, words)
        for w in words:
            w.handle = self

    def explain(self) -> str:
        """Text: which words stand for which placeholder, in which text encoders."""
        state = "attached" if self.attached else "detached"
        lines = [f"{self._name} on {len(self._parts)} text encoders, {state}"]
        for w in self._words:
            now = f'read as "{w.plain}" (scale 0)' if w.off else f"{len(w.ids)} words"
            lines.append(f"  {w.placeholder}: {now} of width {' + '.join(str(v.shape[-1]) for v in w.vectors)}")
        return "\n".join(lines)


def word_people(identity: Any) -> tuple[Identity, ...]:
    """One identity or several, checked.

    Raises:
        InputError: none, or identities that are no words.
    """
    people = tuple(identity) if isinstance(identity, (list, tuple)) else (identity,)
    if not people:
        raise InputError("attach: got an empty list of identities; give one Identity or a list of them")
    for j, person in enumerate(people):
        if not isinstance(person, Identity) or person.system not in WORD_SYSTEMS:
            got = f"of system {person.system!r}" if isinstance(person, Identity) else type(person).__name__
            raise InputError(
                f"attach: identity {j} must be words for the prompt (of DreamIdentity, or of a textual inversion "
                f"file), got {got}"
            )
    return people


def placeholders_of(people: Sequence[Identity], given: Any, default: str = PLACEHOLDER) -> list[str]:
    """One placeholder per identity.

    Raises:
        InputError: another number of them, or two that are the same.
    """
    if given is None:
        given = [str(p.meta.get("placeholder", default)) for p in people]
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, (list, tuple)) or len(names) != len(people):
        raise InputError(f'placeholder: {len(people)} identities need as many, such as ["A*", "B*"], got {given!r}')
    for name in names:
        check_placeholder(name)
    if len(set(names)) != len(names):
        raise InputError(
            f"placeholder: {len(people)} identities need different ones, got {', '.join(names)}; pass "
            'placeholder=["A*", "B*"]'
        )
    return list(names)


def split_words(person: Identity, widths: Sequence[int]) -> tuple[Tensor, ...]:
    """Per text encoder [Bi, k, E_i] of tokens [Bi, k, sum of E_i].

    Raises:
        InputError: another sum.
    """
    if person.tokens.shape[-1] != sum(widths):
        made_for = person.meta.get("widths", [person.tokens.shape[-1]])
        raise InputError(
            f"attach: the identity's words have width {' + '.join(map(str, made_for))}, this pipeline's text encoders "
            f"have {' + '.join(map(str, widths))}; encode the photos with weights for this base model"
        )
    return person.tokens.split(list(widths), -1)


def word_scale(value: Any) -> float:
    """0.0 or 1.0. Words have no strength between."""
    scalar = isinstance(value, (int, float, Tensor)) and not (isinstance(value, Tensor) and value.numel() != 1)
    if scalar and float(value) in (0.0, 1.0):
        return float(value)
    raise InputError(
        f"id_scale: words of a prompt act or do not: 1, or 0 (the placeholder reads as the class word), got {value!r}; "
        "weaken them by the prompt, or use a system that acts in the attention"
    )


def words_in(pipe: Any, words: Mapping[str, Sequence[Tensor]], class_word: str = CLASS_WORD) -> _Scope:
    """For training: a context in which prompts of a pipeline read these vectors, with gradients.

    Args:
        pipe: As in `WordSystem.put_on`.
        words: Placeholder to one [Bt, k, E] per text encoder; Bt is 1, or one row per prompt.
        class_word: As in `WordSystem.put_on`.
    """
    return _Scope(text_parts(pipe), [Words(n, tuple(v), class_word) for n, v in words.items()])


class _Scope:
    def __init__(self, parts: Sequence[TextPart], words: Sequence[Words]) -> None:
        self.parts, self.words = parts, words

    def __enter__(self) -> None:
        put_on(self.parts, self.words)

    def __exit__(self, *exc: Any) -> None:
        take_off(self.parts, self.words)


def encode_with_words(
    pipe: Any, prompts: Sequence[str], words: Mapping[str, Sequence[Tensor]]
) -> tuple[Tensor, Tensor | None]:
    """Prompts with placeholders through the pipeline's own text encoders, with gradients into the words.

    Returns:
        Text [B, L, E] and SDXL's pooled text [B, P] (None for one text encoder).
    """
    pipe = components_of(pipe)
    device = text_parts(pipe)[0].encoder.get_input_embeddings().weight.device
    with words_in(pipe, words), torch.enable_grad():
        made = pipe.encode_prompt(
            prompt=list(prompts), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    return made[0], (made[2] if len(made) == 4 else None)
