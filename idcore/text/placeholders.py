"""Placeholders in prompts: tokenizers that give them positions of their own while words are attached.

A word's token id is negative and never used twice, so that it says by itself which word it is: nothing else travels
from the tokenizer to the text encoder, and calls from several threads cannot mix. Negative ids also keep CLIP's pooled
output right, which older configurations read at the largest id.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..errors import InputError

_KEY = "_idcore_words"  # in a tokenizer's __dict__: the words that it knows now
_numbers = itertools.count(1)


@dataclass(eq=False)
class Words:
    """k consecutive words that stand for one placeholder.

    Attributes:
        placeholder: what prompts say, such as "S*". Upper and lower case differ.
        vectors: per text encoder [Bt, k, E], floating. Gradients flow into them.
        plain: what is read in place of the placeholder while `off`.
        shown: the name in messages, where the placeholder is none that a person wrote.
        off: read `plain`.
        readers: the hooks that put them in (see `idcore.text.reader`).
        handle: what takes them off together with all that came with them; None for the time of a `with` alone.
    """

    placeholder: str
    vectors: tuple[Tensor, ...]
    plain: str = "person"
    shown: str = ""
    off: bool = False
    readers: list[Any] = field(default_factory=list)
    ids: tuple[int, ...] = ()
    handle: Any = None

    def __post_init__(self) -> None:
        check_placeholder(self.placeholder)
        self.shown = self.shown or self.placeholder
        lengths = {v.shape[1] for v in self.vectors}
        if len(lengths) != 1:
            raise InputError(f"words of {self.shown}: each text encoder needs as many words, got {sorted(lengths)}")
        self.ids = tuple(-next(_numbers) for _ in range(lengths.pop()))


def check_placeholder(text: Any) -> None:
    """Raise InputError unless `text` can stand in a prompt: not empty, no blanks."""
    if not isinstance(text, str) or not text or re.search(r"\s", text):
        raise InputError(f'a placeholder must be a word without blanks, such as "S*" or "<me>", got {text!r}')


@functools.lru_cache(maxsize=256)
def _pattern(placeholders: tuple[str, ...]) -> re.Pattern:
    """Longest first. A placeholder that begins or ends in a letter or digit is not found inside of a longer word."""
    parts = []
    for p in sorted(placeholders, key=len, reverse=True):
        left = r"(?<!\w)" if re.match(r"\w", p) else ""
        right = r"(?!\w)" if re.search(r"\w$", p) else ""
        parts.append(left + re.escape(p) + right)
    return re.compile("(" + "|".join(parts) + ")")


def replaced(text: str, by: dict[str, str]) -> str:
    """`text` with every placeholder of `by` replaced by what stands there for it."""
    return _pattern(tuple(by)).sub(lambda m: by[m.group()], text) if by else text


def mentions(text: str, placeholders: Iterable[str]) -> bool:
    """Whether a prompt holds one of the placeholders."""
    placeholders = tuple(placeholders)
    return bool(placeholders) and _pattern(placeholders).search(text) is not None


def known_to(tokenizer: Any) -> tuple[Words, ...]:
    """The words that a tokenizer knows now."""
    return getattr(tokenizer, "__dict__", {}).get(_KEY, ())


def teach(tokenizer: Any, words: Sequence[Words]) -> None:
    """Let a tokenizer know these words too.

    Raises:
        InputError: a placeholder that it knows already.
    """
    known = known_to(tokenizer)
    taken = {w.placeholder for w in known}
    for w in words:
        if w.placeholder in taken:
            raise InputError(
                f"the placeholder {w.placeholder} stands for another person in this pipeline; give another one "
                '(placeholder="T*"), or detach that one first'
            )
        taken.add(w.placeholder)
    tokenizer.__dict__[_KEY] = (*known, *words)
    if not issubclass(type(tokenizer), _KnowsWords):
        tokenizer.__class__ = _class_with_words(type(tokenizer))


def unteach(tokenizer: Any, words: Sequence[Words]) -> None:
    """Take words away again; without any the tokenizer is what it was."""
    gone = set(map(id, words))
    left = tuple(w for w in known_to(tokenizer) if id(w) not in gone)
    if left:
        tokenizer.__dict__[_KEY] = left
        return
    tokenizer.__dict__.pop(_KEY, None)
    if issubclass(type(tokenizer), _KnowsWords):
        tokenizer.__class__ = type(tokenizer).idcore_plain_class


class _KnowsWords:
    """Put before a tokenizer's own class while words are attached. Prompts without placeholders go past it."""

    def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        batch = [text] if isinstance(text, str) else text
        words = known_to(self)
        plain = super().__call__
        if not _are_strings(batch) or not any(mentions(t, (w.placeholder for w in words)) for t in batch):
            return plain(text, *args, **kwargs)
        rows = [_ids(t, words, plain) for t in batch]
        return _assembled(self, rows, words, isinstance(text, str), *args, **kwargs)

    def batch_decode(self, sequences: Any, *args: Any, **kwargs: Any) -> list[str]:
        rows = sequences.tolist() if isinstance(sequences, Tensor) else sequences
        names = {i: w for w in known_to(self) for i in w.ids}
        plain = super().__call__
        readable = [[j for i in row for j in _readable(i, names, plain)] for row in rows]
        return super().batch_decode(readable, *args, **kwargs)


@functools.cache
def _class_with_words(cls: type) -> type:
    """Of the same name and module, for what writes them into files."""
    own = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "idcore_plain_class": cls}
    return type(cls.__name__, (_KnowsWords, cls), own)


def _are_strings(batch: Any) -> bool:
    return isinstance(batch, (list, tuple)) and bool(batch) and all(isinstance(t, str) for t in batch)


def _ids(text: str, words: Sequence[Words], plain: Callable) -> list[int]:
    """Token ids of a prompt without begin and end."""
    by = {w.placeholder: w for w in words}
    out: list[int] = []
    for piece in _pattern(tuple(by)).split(text):
        word = by.get(piece)
        if word is not None:
            for reader in word.readers:
                reader.settle()
            if not word.off:
                out += word.ids
                continue
            piece = word.plain
        if piece.strip():
            out += plain(piece, add_special_tokens=False, verbose=False)["input_ids"]
    return out


def _assembled(
    tokenizer: Any, rows: list[list[int]], words: Sequence[Words], single: bool, *, padding: Any = False,
    truncation: Any = None, max_length: int | None = None, return_tensors: Any = None, add_special_tokens: bool = True,
    return_attention_mask: bool | None = None, verbose: bool = True, **others: Any,
) -> Any:  # fmt: skip
    """What the tokenizer gives for these ids; of its arguments those that pipelines use."""
    unknown = sorted(k for k, v in others.items() if v not in (None, False, 0))
    if unknown:
        raise InputError(f"prompts with placeholders: the tokenizer's {', '.join(unknown)} cannot be used with them")
    limit = (max_length or tokenizer.model_max_length) if truncation not in (None, False, "do_not_truncate") else None
    ends = ([tokenizer.bos_token_id], [tokenizer.eos_token_id]) if add_special_tokens else ([], [])
    room = None if limit is None else limit - sum(map(len, ends))
    for row in rows:
        _check_room(row, room, words)
    made = [ends[0] + row[:room] + ends[1] for row in rows]
    alone = single and return_tensors is None
    return tokenizer.pad(
        {"input_ids": made[0] if alone else made}, padding=padding, max_length=max_length, verbose=False,
        return_tensors=return_tensors, return_attention_mask=return_attention_mask,
    )  # fmt: skip


def _check_room(row: list[int], room: int | None, words: Sequence[Words]) -> None:
    """A person that is cut off would be lost in silence; a prompt's other words the pipeline warns about itself."""
    if room is None or all(i >= 0 for i in row[room:]):
        return
    lost = next(w.shown for w in words if set(w.ids) & set(row[room:]))
    raise InputError(
        f"the prompt has {len(row)} tokens, the text encoder reads {room} of them, and {lost} or a part of it stands "
        "behind: move it to the front, or shorten the prompt"
    )


def _readable(i: int, names: dict[int, Words], plain: Callable) -> list[int]:
    word = names.get(i)
    if word is None:
        return [i]
    return plain(word.shown, add_special_tokens=False)["input_ids"] if i == word.ids[0] else []
