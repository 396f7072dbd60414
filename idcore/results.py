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
        mode: of inference (for PuLID see `systems.pulid.PRESETS`).
        features: what the encoder reads of photos: "pulid" (as published) or "tiny-pulid" (the embedded recogniser).
        base: model that it was trained on: "tiny" or a folder.
    """

    system: str
    weights: str
    mode: str
    features: str
    base: str

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
        return Result(**{name: str(found[name]) for name in Result.__dataclass_fields__})
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise WeightsError(
            f"{folder} is no result of a training ({type(e).__name__}: {e}); wanted a folder with {FACTS} and the "
            "weights, such as OUT/model of `idcore train pulid`"
        ) from e
