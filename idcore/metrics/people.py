"""The people whom pictures should show: names, photos, and where they exist identities made beforehand."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..photos import SUFFIXES

DRAWN = "drawn:"


@dataclass(frozen=True)
class Person:
    """A name, at least one photo, and an identity file for generating ("" where the photos are to be encoded)."""

    name: str
    photos: tuple[Path, ...]
    identity: Path | None = None

    def key(self) -> str:
        """Hash of the files that decide how this person is drawn."""
        h = hashlib.sha256()
        for path in (*self.photos, *([self.identity] if self.identity else [])):
            h.update(hashlib.sha256(path.read_bytes()).digest())
        return h.hexdigest()[:16]


def read_people(spec: str | Path, drawn_into: Path | None = None) -> list[Person]:
    """People from a photo, a folder, or the renderer.

    Args:
        spec: one photo (the person is its name without suffix); a folder with one photo per person, or one folder of
            photos per person, beside each an optional `NAME.safetensors` made by `idcore encode`; or "drawn:24":
            that many people that the embedded model never saw.
        drawn_into: where pictures of drawn people are written.

    Raises:
        InputError: nothing there, or two people of one name.
    """
    if str(spec).startswith(DRAWN):
        return _drawn(str(spec), drawn_into)
    path = Path(spec).expanduser()
    if path.is_file():
        return [Person(path.stem, (path,), _identity(path.parent, path.stem))]
    if not path.is_dir():
        raise InputError(f'people: {path} is neither a photo nor a folder; or draw some with "drawn:24"')
    people = []
    for entry in sorted(path.iterdir()):
        if entry.is_file() and entry.suffix.lower() in SUFFIXES:
            people.append(Person(entry.stem, (entry,), _identity(path, entry.stem)))
        elif entry.is_dir():
            photos = tuple(sorted(p for p in entry.iterdir() if p.suffix.lower() in SUFFIXES))
            if photos:
                people.append(Person(entry.name, photos, _identity(path, entry.name)))
    names = [p.name for p in people]
    if not people:
        raise InputError(f"people: {path} holds no photos ({', '.join(SUFFIXES)}), nor folders with photos")
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise InputError(f"people: {path} has {twice[0]!r} twice; rename one, names tell people apart")
    return people


def _identity(folder: Path, name: str) -> Path | None:
    path = folder / f"{name}.safetensors"
    return path if path.is_file() else None


def _drawn(spec: str, folder: Path | None) -> list[Person]:
    from ..workflows import save_picture
    from .gate import Judge, gate_people

    count = spec.removeprefix(DRAWN)
    if not count.isdigit() or not 1 <= int(count) <= 10_000:
        raise InputError(f'people: wanted "drawn:" with a number from 1 to 10000, got {spec!r}')
    if folder is None:
        raise InputError(f"people: {spec} needs a folder to draw into")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"drawn{i:04d}.png" for i in range(int(count))]
    if not all(p.is_file() for p in paths):
        for path, picture in zip(paths, gate_people(Judge(), len(paths))[0]):
            save_picture(picture, path)
    return [Person(p.stem, (p,)) for p in paths]
