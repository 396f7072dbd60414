"""The folder of an augmented data set. One process writes; a name that stands is whole, and is never written again.

OUT/settings.json           what the rest was made with; other settings are refused
OUT/names/NAME.json         pairs and drops of one name; it stands last, so a name that stands is whole
OUT/pictures/NAME/*.png     its pictures, renamed there in one step
OUT/index.jsonl, dropped.jsonl, manifest.json   of all names, written when all stand
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...errors import IdcoreError
from ...files import file_hash, replace_text
from ..data.claiming import claim
from .options import Made, Pair

VERSION = 1
FORMAT = "idcore-pairs"


class Folder:
    """An augmented data set's folder.

    Args:
        out: the folder; made where it is missing.
        settings: what the result hangs on, as plain values.

    Raises:
        InputError: it holds other things, or a data set of other settings (the first that differ are named).
        IdcoreError: it cannot be written.
    """

    def __init__(self, out: str | Path, settings: Mapping[str, Any]) -> None:
        self.out, self.settings = Path(out), {**settings, "version": VERSION}
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            claim(self.out / "settings.json", self.settings, "was made")
            for name in ("names", "pictures"):  # after the settings: a run killed here can go on
                (self.out / name).mkdir(exist_ok=True)
        except OSError as e:
            raise _not_written(self.out, e) from e

    def tidy(self) -> None:
        """Remove what a killed run left half written. Only with the lock held (`training.data.claiming.alone`)."""
        for half in (self.out / "pictures").glob(".*.part"):
            shutil.rmtree(half, ignore_errors=True)
        for half in (p for folder in (self.out, self.out / "names") for p in folder.glob(".*.part")):
            half.unlink(missing_ok=True)

    def stands(self, name: str) -> bool:
        """Whether a name is done; one that says nothing readable, or whose pictures are gone, is made anew."""
        try:
            said = self.read(name)
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return said["name"] == name and all((self.out / f).is_file() for f in said["files"])

    def read(self, name: str) -> dict[str, Any]:
        """{"name", "pairs", "drops", "files", "drawn"} of a name that stands."""
        said = json.loads((self.out / "names" / f"{key_of(name)}.json").read_text(encoding="utf-8"))
        if not {"name", "pairs", "drops", "files", "drawn"} <= set(said):
            raise ValueError("keys are missing")
        return said

    def write(self, made: Made) -> None:
        """Add a name: first its pictures, in one rename, then its record. What stands already stays as it is.

        Raises:
            IdcoreError: the disk is full or the folder cannot be written; the other names are not touched.
        """
        if self.stands(made.name):
            return
        key = key_of(made.name)
        place = self.out / "pictures" / key
        staging = place.with_name(f".{key}.{secrets.token_hex(4)}.part")
        try:
            shutil.rmtree(place, ignore_errors=True)  # of a run that was killed before the record stood
            if made.pictures:
                staging.mkdir()
                for file, content in made.pictures.items():
                    _write_flushed(staging / file, content)
                os.replace(staging, place)
        except OSError as e:
            shutil.rmtree(staging, ignore_errors=True)
            raise _not_written(self.out, e) from e
        at = f"pictures/{key}"
        pairs = [
            {**asdict(p), "id": f"{key}/{p.id}", "source": f"{at}/{p.source}", "edited": f"{at}/{p.edited}"}
            for p in made.pairs
        ]
        said = {
            "name": made.name, "drawn": made.drawn, "pairs": pairs, "drops": made.drops,
            "files": [f"{at}/{f}" for f in made.pictures],
        }  # fmt: skip
        replace_text(self.out / "names" / f"{key}.json", json.dumps(said, ensure_ascii=False) + "\n")

    def finish(self, names: Sequence[str], told: Mapping[str, Any]) -> tuple[list[Pair], list[dict], dict[str, Any]]:
        """Write index, drops and manifest of these names, all of which stand.

        Args:
            names: in the order of the index.
            told: what else the manifest says (measure, base, ...).

        Returns:
            The pairs, the drops ({"what", "reason", "detail"}) and the manifest.
        """
        read = [self.read(name) for name in names]
        pairs = [Pair(**p) for said in read for p in said["pairs"]]
        drops = [dict(zip(("what", "reason", "detail"), d)) for said in read for d in said["drops"]]
        for file, rows in (("index.jsonl", [asdict(p) for p in pairs]), ("dropped.jsonl", drops)):
            replace_text(self.out / file, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
        manifest = {
            "format": FORMAT, "version": VERSION, "names": len(names), "used": len({p.name for p in pairs}),
            "pairs": len(pairs), "drawn": sum(said["drawn"] for said in read),
            "index": file_hash(self.out / "index.jsonl"), **told, "settings": self.settings,
        }  # fmt: skip
        replace_text(self.out / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
        return pairs, drops, manifest


def key_of(name: str) -> str:
    """A name as a file's name: its letters, and a hash that tells names with the same letters apart."""
    letters = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40]
    return f"{letters or 'name'}-{hashlib.blake2b(name.encode(), digest_size=5).hexdigest()}"


def _write_flushed(path: Path, content: bytes) -> None:
    with open(path, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())


def _not_written(out: Path, e: OSError) -> IdcoreError:
    return IdcoreError(
        f"cannot write into {out}: {e.strerror or e}; free some space or choose another --out, and run it again: what "
        "stands is kept"
    )
