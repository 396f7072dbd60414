"""A person of SeFi-IDE (a pair of words per stage) as an identity and as a file that others can read too.

File: a textual inversion file (`idcore.text.inversion`) of 2 S words in the order stage 0 key, stage 0 value, stage 1
key, ... ; stage 0 is that of the least noise (timesteps 0 to 199 of 1000 with five stages; ProSpect counts so too). One
text encoder: one tensor [2 S, E] under the placeholder's name, which diffusers' `load_textual_inversion` loads as the
tokens V*, V*_1, ... V*_9. SDXL: `clip_l` [2 S, 768] and `clip_g` [2 S, 1280]. Metadata: `format` "idcore-sefi-ide",
`format_version` "1", `stages`, `widths`, `placeholder`, `class_word`, `base`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from idcore.attention.staged import check_stages
from idcore.errors import InputError
from idcore.files import check_container
from idcore.identity import Identity
from idcore.text.inversion import read_words, write_words

NAME = "sefi-ide"
FORMAT = "idcore-sefi-ide"
PLACEHOLDER = "V*"


def save_tokens(path: str | os.PathLike, person: Identity, dtype: torch.dtype = torch.float32) -> Path:
    """Write the documented file: 30 KB of SD 1.x and 82 KB of SDXL with five stages, half of that in float16.

    Raises:
        InputError: an identity of another system, or no floating dtype.
        WeightsError: the file cannot be written.
    """
    (person,) = people_of(person)
    meta = {k: str(person.meta[k]) for k in ("class_word", "base") if k in person.meta}
    header = {"format": FORMAT, "format_version": "1", "stages": str(stages_of(person)), **meta}
    widths = [int(w) for w in person.meta["widths"]]
    name = str(person.meta.get("placeholder", PLACEHOLDER))
    return write_words(path, person.tokens[0].to(dtype), widths, name, {**header, "widths": json.dumps(widths)})


def is_sefi_file(path: str | os.PathLike) -> bool:
    """Whether `save_tokens` wrote it, by its header alone."""
    return check_container(path, "identity")[1].get("format") == FORMAT


def load_tokens(path: str | os.PathLike) -> Identity:
    """Read what `save_tokens` wrote.

    Raises:
        WeightsError: the file cannot be read.
        InputError: another file, or words that are no pairs.
    """
    metadata = check_container(path, "stage tokens")[1]
    if metadata.get("format") != FORMAT or metadata.get("format_version") != "1":
        raise InputError(
            f"{path} holds no stage tokens of SeFi-IDE (format {metadata.get('format')!r} "
            f"{metadata.get('format_version', '')}, wanted {FORMAT!r} 1)"
        )
    words = read_words(path)
    meta = {k: v for k, v in words.meta.items() if k != "file"}
    meta |= {"stages": int(metadata.get("stages", "0"))} | {k: metadata.get(k, "") for k in ("class_word", "base")}
    person = Identity(words.tokens, None, NAME, meta)
    stages_of(person)
    return person


def stages_of(person: Identity) -> int:
    """S of a person [1, 2 S, E].

    Raises:
        InputError: words that are no pairs of 1 to 10 stages.
    """
    rows, count, _ = person.tokens.shape
    stages = int(person.meta.get("stages", count // 2))
    if rows != 1 or count != 2 * stages:
        raise InputError(
            f"SeFi-IDE: wanted a person of [1, 2 S, E] words for S = {stages} stages, got {list(person.tokens.shape)}"
        )
    check_stages(stages)
    return stages


def people_of(identity: Any) -> tuple[Identity, ...]:
    """One person or several with as many stages, checked; raises InputError."""
    people = tuple(identity) if isinstance(identity, (list, tuple)) else (identity,)
    for j, person in enumerate(people):
        if not isinstance(person, Identity) or person.system != NAME:
            got = f"of system {person.system!r}" if isinstance(person, Identity) else type(person).__name__
            raise InputError(f"SeFi-IDE: identity {j} must be one of its own (load_tokens, SeFiTokens), got {got}")
    if len({stages_of(p) for p in people}) != 1:
        raise InputError(
            f"SeFi-IDE: people in one prompt must have as many stages, got {[stages_of(p) for p in people]}"
        )
    return people
