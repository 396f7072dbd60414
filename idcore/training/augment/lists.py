"""The lists that `idcore augment` works through: names and prompts."""

from __future__ import annotations

from pathlib import Path

from ...errors import InputError
from ...files import first_few
from ...prompts import load
from .options import PERSON, Prompt


def read_names(source: str | Path) -> list[str]:
    """Names in their order, each once.

    Args:
        source: "tiny-sd" (the people that the embedded base knows), a shipped set of names, or a file as
            `idcore.prompts.load` reads it: one name a line.

    Raises:
        InputError: no such file, or nothing in it.
    """
    if str(source) == "tiny-sd":
        from ...sampling.tiny_sd import names

        found = list(names())
    else:
        found = [" ".join(n.split()) for n in load(source)]
    return list(dict.fromkeys(found))


def read_prompts(source: str | Path) -> list[Prompt]:
    """Edit prompts in their order, each once.

    Args:
        source: a shipped set with the placeholder "person", such as "dreamidentity-edits" or "tiny-augment"; or a file:
            .txt with one prompt a line, or JSON of the shipped form, `{person}` where the name stands.

    Raises:
        InputError: no such file, nothing in it, or prompts without `{person}`.
    """
    found = load(source)
    try:
        found = load(source, person=PERSON)
    except InputError:  # a set without placeholders: {person} is written out in it, or missing
        pass
    return check_prompts([Prompt(t, labels) for t, labels in zip(found, found.labels)], str(source))


def check_prompts(prompts: list[Prompt], where: str) -> list[Prompt]:
    """The prompts, each once. Raises InputError where one does not say `{person}`."""
    silent = [p.text for p in prompts if PERSON not in p.text]
    if silent:
        raise InputError(
            f"augment: {len(silent)} of {len(prompts)} prompts in {where} do not say {PERSON}, where the name stands: "
            f"{first_few([repr(s) for s in silent], 2)}. Write e.g. '{PERSON} as a nurse'"
        )
    if not prompts:
        raise InputError(f"augment: there is no prompt in {where}; give at least one with {PERSON} in it")
    return list({p.text: p for p in prompts}.values())
