"""Folders that a training exports: weights, and `result.json`, which says how they are to be used."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import WeightsError

FACTS = "result.json"
FORMAT = "idcore-result"


@dataclass(frozen=True)
class Result:
    """What `result.json` says.

    Attributes:
        system: such as "pulid".
        weights: file in the folder.
        base: model that it was trained on: a name such as "tiny", or a folder.
        mode: of inference, where the system has several (for PuLID see `systems.pulid.PRESETS`); "": it has none.
        features: what PuLID's encoder reads of photos: "pulid" (as published) or "tiny-pulid" (the embedded
            recogniser); "" for systems that read photos in one way.
    """

    system: str
    weights: str
    base: str
    mode: str = ""
    features: str = ""

    def write(self, folder: Path, more: dict[str, Any]) -> Path:
        """Write `folder/result.json`, with `more` for people to read."""
        from .workflows import write_text

        write_text(folder / FACTS, json.dumps({"format": FORMAT, **asdict(self), **more}, indent=1))
        return folder / FACTS


def is_result(folder: str | Path) -> bool:
    """Whether this is a folder that a training exported."""
    return (Path(folder) / FACTS).is_file()


def read_result(folder: str | Path) -> Result:
    """Raises WeightsError where the folder is none, or its result.json is damaged."""
    try:
        found = json.loads((Path(folder) / FACTS).read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']!r}")
        needed = {name: str(found[name]) for name in ("system", "weights", "base")}
        return Result(**needed, mode=str(found.get("mode", "")), features=str(found.get("features", "")))
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise WeightsError(
            f"{folder} is no result of a training ({type(e).__name__}: {e}); wanted a folder with {FACTS} and the "
            "weights, such as OUT/model of `idcore train pulid`"
        ) from e


def trained_on(*places: str | Path) -> str | None:
    """The base model of the first of these that is a result of a training; None where none is."""
    return next((found for p in places if is_result(p) and (found := read_result(p).base)), None)
