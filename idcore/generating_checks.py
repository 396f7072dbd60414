"""What can be told of a request before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import InputError

if TYPE_CHECKING:
    from .generating import GenerateRequest

MOST_SEED = 2**63 - 1


def check_texts(r: GenerateRequest) -> None:
    """Raise InputError for a prompt that says nothing, numbers out of range, or regions of a background that do not
    fit."""
    if not r.prompt.strip():
        raise InputError(f"{r.command}: the prompt is empty; write what to draw, and the style, in words")
    if r.seed + r.count > MOST_SEED:
        raise InputError(f"{r.command}: --seed plus --count is {MOST_SEED} at the most, got {r.seed} and {r.count}")
    if r.guidance is not None and not 0 <= r.guidance <= 100:
        raise InputError(f"{r.command}: --guidance is a number from 0 to 100 (1 leaves it out), got {r.guidance}")
    if r.preset is not None:
        from .systems.pulid import PRESETS

        if r.preset not in PRESETS:
            raise InputError(f"{r.command}: --preset must be one of {', '.join(PRESETS)}, got {r.preset!r}")
    if r.person_region is not None and r.background is None:
        raise InputError(f"{r.command}: --person-region says where --background is not read; give both")
    if not 0 <= r.person_margin <= 0.25:
        raise InputError(f"{r.command}: --person-margin is 0 to 0.25 of the longer side, got {r.person_margin}")


def unused(r: GenerateRequest) -> list[str]:
    """What was given and does nothing in this call."""
    lines = []
    if not r.people():
        given = [n for n in ("weights", "vision", "parsing", "retinaface", "preset") if getattr(r, n) is not None]
        given = [n for n in given if not (n == "weights" and r.system in ("auto", "sefi-ide"))]
        if given:
            lines.append(f"{', '.join(f'--{n}' for n in given)}: not used, since no --id says who is drawn")
    if r.negative and r.guides() == 1:
        lines.append("--negative: not used at --guidance 1; give a higher one")
    return lines
