"""Prompt sets: those of the papers and of this project as data files, and a user's own.

load("pulid-alignment")           # a sequence of 15 strings
load("styleforge-heldout", person_style="sks style", background_style="sks style")
load("mine.txt")                  # one prompt a line; or a JSON file of the shipped form
"""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import InputError

FOLDER = Path(__file__).resolve().parent / "assets" / "prompts"
FORMAT = "idcore-prompts"
_FORM = f'{{"format": "{FORMAT}", "name": ..., "prompts": ["...", {{"text": "...", "style": "..."}}]}}'


class PromptSet(Sequence[str]):
    """Prompts in their order; iterating gives strings.

    Attributes:
        name, about, source: of the set; the source names paper and table, or says that the set is our choice.
        labels: for each prompt a dictionary of what it asks for ("background", "style", "role", ...); often empty.
    """

    def __init__(self, name: str, texts: Sequence[str], labels: Sequence[dict] = (), about: str = "", source: str = ""):
        self.name, self.about, self.source = name, about, source
        self.texts = tuple(texts)
        self.labels = tuple(labels) or tuple({} for _ in self.texts)

    def __getitem__(self, i):
        return self.texts[i]

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        return f"PromptSet({self.name!r}, {len(self)} prompts; {self.source})"

    def where(self, **labels: str) -> tuple[str, ...]:
        """The prompts that carry all of these labels."""
        return tuple(t for t, have in zip(self.texts, self.labels) if labels.items() <= have.items())


def names() -> tuple[str, ...]:
    """The shipped sets."""
    return tuple(sorted(p.stem for p in FOLDER.glob("*.json")))


def load(name: str | Path, **fill: str) -> PromptSet:
    """A shipped set by name, or a file: .json of the shipped form, or .txt with one prompt a line.

    Args:
        name: one of `names()`, or a path.
        fill: values of the set's placeholders, such as `person_style="sks style"`; what is not given keeps the
            set's own value ("[V] style").

    Raises:
        InputError: no such set or file, another form, no prompts, an unknown placeholder.
    """
    path = FOLDER / f"{name}.json" if str(name) in names() else Path(name).expanduser()
    if not path.is_file():
        raise InputError(f"prompts: {str(name)!r} is no file and none of the shipped sets: {', '.join(names())}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"prompts: {path} cannot be read as text: {e}") from e
    if path.suffix.lower() != ".json":
        entries: list[Any] = [line.strip() for line in text.splitlines() if line.strip()]
        return _build({"name": path.stem, "prompts": entries, "source": str(path)}, path, fill, braces=False)
    try:
        data = json.loads(text)
    except json.JSONDecodeError as e:
        raise InputError(f"prompts: {path} is not JSON ({e}); wanted {_FORM}") from e
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("prompts"), list):
        raise InputError(f"prompts: {path} has another form; wanted {_FORM}")
    return _build(data, path, fill, braces=bool(data.get("placeholders")))


def _build(data: dict, path: Path, fill: dict[str, str], *, braces: bool) -> PromptSet:
    known = dict(data.get("placeholders", {}))
    if unknown := sorted(set(fill) - set(known)):
        raise InputError(
            f"prompts: {data.get('name', path)} has no placeholder {unknown[0]!r}; it has {sorted(known) or 'none'}"
        )
    values = known | fill
    texts, labels = [], []
    for i, entry in enumerate(data["prompts"]):
        entry = {"text": entry} if isinstance(entry, str) else entry
        words = entry.get("text") if isinstance(entry, dict) else None
        if not isinstance(words, str) or not words.strip():
            raise InputError(f"prompts: entry {i + 1} of {path} is {entry!r:.80}; wanted a text, or an object with one")
        texts.append(_filled(words, values, path) if braces else words)
        labels.append({k: str(v) for k, v in entry.items() if k != "text"})
    if not texts:
        raise InputError(f"prompts: {path} holds no prompts; write one a line")
    return PromptSet(data.get("name", path.stem), texts, labels, data.get("about", ""), data.get("source", ""))


def _filled(words: str, values: dict[str, str], path: Path) -> str:
    missing = [f for _, f, _, _ in string.Formatter().parse(words) if f is not None and f not in values]
    if missing:
        raise InputError(f"prompts: {path} uses the placeholder {missing[0]!r}, which its 'placeholders' do not name")
    return words.format(**values)
