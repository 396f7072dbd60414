"""Which pictures are to be judged, and what is known of each: prompt, person, seed, its twin without identity."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..photos import SUFFIXES

METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class Row:
    """One picture.

    Attributes:
        file: path below the folder, with "/".
        prompt: what was asked for; "" where unknown.
        person: name of whom it should show; "" where unknown or nobody.
        seed: of its noise, or None.
        without: path below the folder of the picture with the same prompt and seed and without identity, or "".
        labels: what the prompt asks for by name ("background", "style"); see `idcore.prompts`.
    """

    file: str
    prompt: str = ""
    person: str = ""
    seed: int | None = None
    without: str = ""
    labels: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> str:
        """A line of `metadata.jsonl`, without what is not known."""
        known = {k: v for k, v in asdict(self).items() if k != "file" and v not in ("", None, {})}
        return json.dumps({"file_name": self.file, **known})


def read_rows(folder: Path) -> list[Row]:
    """The pictures of a folder, in order.

    Where there is a `metadata.jsonl` (lines {"file_name", "prompt" or "text", "person", "seed", "without", "labels"}),
    it decides. Else all pictures below the folder count: prompt from `generate.json` of `idcore generate` or from a
    text file beside the picture, person from the name of the folder in which it lies.

    Raises:
        InputError: no such folder, no pictures, a line that does not fit (with its number).
    """
    if not folder.is_dir():
        raise InputError(f"evaluate: {folder} is no folder; wanted one with pictures ({', '.join(SUFFIXES)})")
    rows = _from_metadata(folder) if (folder / METADATA).is_file() else _from_files(folder)
    if not rows:
        raise InputError(f"evaluate: {folder} holds no pictures; wanted {', '.join(SUFFIXES)} or a {METADATA}")
    return rows


def _from_metadata(folder: Path) -> list[Row]:
    rows = []
    for number, line in enumerate((folder / METADATA).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"evaluate: line {number} of {folder / METADATA}"
        try:
            data = json.loads(line)
        except json.JSONDecodeError as e:
            raise InputError(f"{where} is not JSON ({e})") from e
        if not isinstance(data, dict) or not isinstance(data.get("file_name"), str):
            raise InputError(f'{where} has no "file_name"; wanted {{"file_name": "a.png", "prompt": "...", ...}}')
        rows.append(_row(data, where))
    return rows


def _row(data: dict[str, Any], where: str) -> Row:
    texts = {"prompt": data.get("prompt", data.get("text", ""))} | {k: data.get(k, "") for k in ("person", "without")}
    for key, value in texts.items():
        if not isinstance(value, str):
            raise InputError(f"{where}: {key} must be a text, got {value!r:.60}")
    seed, labels = data.get("seed"), data.get("labels", {})
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise InputError(f"{where}: seed must be a whole number, got {seed!r:.60}")
    if not isinstance(labels, dict):
        raise InputError(f"{where}: labels must be an object of texts, got {labels!r:.60}")
    for name in (data["file_name"], texts["without"]):
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(f"{where}: {name!r} lies outside of the folder; name files below it")
    return Row(data["file_name"], seed=seed, labels={k: str(v) for k, v in labels.items()}, **texts)


def _from_files(folder: Path) -> list[Row]:
    known = _generated(folder)
    rows = []
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()):
        file = path.relative_to(folder).as_posix()
        prompt, seed = known.get(file, ("", None))
        beside = path.with_suffix(".txt")
        if not prompt and beside.is_file():
            prompt = beside.read_text(encoding="utf-8").strip()
        person = path.parent.name if path.parent != folder else ""
        rows.append(Row(file, prompt, person, seed))
    return rows


def _generated(folder: Path) -> dict[str, tuple[str, int | None]]:
    """Prompt and seed by file, as `idcore generate` noted them."""
    path = folder / "generate.json"
    if not path.is_file():
        return {}
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
        request, names = noted["request"], noted["pictures"]
        return {name: (str(request["prompt"]), int(request["seed"]) + i) for i, name in enumerate(names)}
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(f"evaluate: {path} is not as `idcore generate` writes it ({e!r}); mend or remove it") from e
