"""What lies in a data folder: pictures beside captions, metadata.jsonl or metadata.csv, and WebDataset shards.

Nothing is unpacked. A picture in a shard is known by where its bytes lie, so that any one can be read at any time.
"""

from __future__ import annotations

import csv
import json
import os
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ...errors import InputError

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
OTHERS = (".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jxl")  # named in the report, not read
METADATA = ("metadata.jsonl", "metadata.csv")
MAX_CAPTION = 1 << 16  # bytes of a caption or of a shard's json file (our choice)
MAX_BYTES = 1 << 29  # of a picture's file (our choice)


@dataclass(frozen=True)
class Entry:
    """A picture that was found, not opened yet.

    Attributes:
        id: its path in the data folder, and in the shard. file, offset, length: where its bytes lie.
        caption: or None. stamp: changes when the file does. problem: (reason, in full) why it cannot be used.
    """

    id: str
    file: str
    caption: str | None
    stamp: str
    offset: int | None = None
    length: int | None = None
    problem: tuple[str, str] | None = None


def scan(data: str | Path) -> list[Entry]:
    """All pictures in a folder (or one .tar), in the order of their names.

    Raises:
        InputError: no such folder, nothing in it, or metadata or a shard that cannot be read.
    """
    data = Path(data)
    if data.is_file() and data.suffix == ".tar":
        entries = list(_shard(data.parent, data))
    elif data.is_dir():
        entries = sorted(_folder(data), key=lambda e: e.id)
    else:
        raise InputError(f"{data} is no folder and no .tar; wanted a folder of pictures or WebDataset shards")
    if not entries:
        raise InputError(
            f"there is no picture in {data}; wanted {', '.join(PICTURES)} beside .txt captions or with a "
            "metadata.jsonl, or .tar shards of them"
        )
    seen: set[str] = set()
    out = []
    for e in entries:
        twice = e.id in seen and e.problem is None
        seen.add(e.id)
        out.append(_bad(e.id, e.file, "duplicate id", "another picture before it has this name") if twice else e)
    return out


def root_of(data: str | Path) -> Path:
    """The folder that the files of entries and records are in."""
    return Path(data).parent if Path(data).is_file() else Path(data)


def read_bytes(root: Path, file: str, offset: int | None, length: int | None) -> bytes:
    """A picture's file content. Raises InputError naming the file."""
    path = root / file
    try:
        with open(path, "rb") as f:
            size = os.fstat(f.fileno()).st_size if length is None else length
            if size > MAX_BYTES:
                raise InputError(f"{path} has {size:,} bytes; at most {MAX_BYTES:,} are read as a picture")
            f.seek(offset or 0)
            content = f.read(size)
    except OSError as e:
        raise InputError(f"{path} cannot be read: {e.strerror or e}") from e
    if len(content) < size:
        raise InputError(f"{path} is cut off: wanted {size:,} bytes from {offset or 0:,} on, got {len(content):,}")
    return content


def _bad(id: str, file: str, reason: str, detail: str) -> Entry:
    return Entry(id, file, None, "", problem=(reason, detail))


def _folder(root: Path) -> Iterator[Entry]:
    for folder, folders, names in os.walk(root, onerror=_raise):
        folders[:] = sorted(d for d in folders if not d.startswith("."))
        place = Path(folder)
        for name in (d for d in folders if (place / d).is_symlink()):  # os.walk lists them and does not enter
            id = (place / name).relative_to(root).as_posix()
            yield _bad(id, id, "linked folder", "links to folders are not followed; copy it there")
        names = {n for n in names if not n.startswith(".")}
        told = {k: v for name in METADATA if name in names for k, v in _metadata(place / name).items()}
        for name in sorted(names):
            suffix = Path(name).suffix.lower()
            if suffix == ".tar":
                yield from _shard(root, place / name)
            elif suffix in PICTURES or suffix in OTHERS:
                yield _picture(root, place / name, names, told.pop(name, None))
        for name, (_, problem) in told.items():
            if "/" in name and problem is None and _is_inside(place, name):
                continue  # its own folder's walk cannot know; see _picture
            what = problem or ("missing file", "metadata names it, and there is no such picture")
            yield _bad(posixpath.normpath(posixpath.join(place.relative_to(root).as_posix(), name)), name, *what)


def _raise(error: OSError) -> None:
    raise InputError(f"{error.filename} cannot be listed: {error.strerror}; check its permissions") from error


def _is_inside(folder: Path, name: str) -> bool:
    return (folder / name).is_file()


def _picture(root: Path, path: Path, names: set[str], told: tuple[str | None, Any] | None) -> Entry:
    id = path.relative_to(root).as_posix()
    if path.suffix.lower() in OTHERS:
        return _bad(id, id, "format", f"{path.suffix} is not read; save it as JPEG, PNG or WEBP")
    try:
        if path.is_symlink() and not path.resolve().is_relative_to(root.resolve()):
            return _bad(id, id, "outside", "a link that leads out of the data folder; copy the file there")
        stat = path.stat()
        if told is None:
            told = _from_above(root, path)
        if told is not None:
            caption, problem = told
        else:
            caption, problem = _sidecar(path, names), None
    except (OSError, InputError) as e:
        return _bad(id, id, "unreadable", str(e))
    return Entry(id, id, caption, f"{stat.st_size}:{stat.st_mtime_ns}", problem=problem)


def _from_above(root: Path, path: Path) -> tuple[str | None, Any] | None:
    """What the metadata of a folder above (with file names such as train/a.jpg) say of a picture."""
    for folder in path.parent.parents:
        if folder != root and root not in folder.parents:
            return None
        for name in METADATA:
            if (folder / name).is_file():
                found = _metadata(folder / name).get(path.relative_to(folder).as_posix())
                if found is not None:
                    return found
    return None


def _sidecar(path: Path, names: set[str]) -> str | None:
    beside = path.with_suffix(".txt")
    if beside.name not in names:
        return None
    size = beside.stat().st_size
    if size > MAX_CAPTION:
        raise InputError(f"its caption file has {size:,} bytes; at most {MAX_CAPTION:,} are read")
    return clean(beside.read_bytes(), beside.name)


def clean(content: bytes | str, name: str) -> str | None:
    """One line of text, or None where there is nothing but space."""
    try:
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise InputError(f"{name} is not UTF-8 text ({e.reason} at byte {e.start})") from e
    return " ".join(text.replace("\0", " ").split()) or None


_read: dict[tuple[str, int, int], dict] = {}


def _metadata(path: Path) -> dict[str, tuple[str | None, Any]]:
    """File name -> (caption, problem), of a metadata.jsonl or .csv as diffusers' and Hugging Face's folders have it."""
    try:
        stat = path.stat()
    except OSError as e:
        raise InputError(f"{path} cannot be read: {e.strerror or e}; has it been moved meanwhile? Run it again") from e
    key = (str(path), stat.st_size, stat.st_mtime_ns)
    if key in _read:
        return _read[key]
    found: dict[str, tuple[str | None, Any]] = {}
    for where, row in _rows(path):
        if not isinstance(row.get("file_name"), str) or not row["file_name"]:
            raise InputError(f"{where} has no file_name; it has {', '.join(map(str, row)) or 'nothing'}")
        name = row["file_name"].replace("\\", "/")
        text = next((row[k] for k in ("text", "caption") if isinstance(row.get(k), str)), None)
        tidy = posixpath.normpath(name)
        problem = None
        if posixpath.isabs(name) or tidy.startswith("../") or tidy == ".." or "\0" in name or ":" in name[:3]:
            problem = ("outside", f"{where} names a file outside of its folder; name it relative to the folder")
        elif tidy in found:
            problem = ("duplicate id", f"{where} names it again")
            found[tidy + f" ({where})"] = (None, problem)
            continue
        found[tidy] = (clean(text, where) if text is not None else None, problem)
    _read.clear()
    _read[key] = found
    return found


def _rows(path: Path) -> Iterator[tuple[str, dict]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            if path.suffix == ".csv":
                for row in csv.DictReader(f):
                    yield f"{path} row for {row.get('file_name')!r}", row
                return
            for number, line in enumerate(f, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError(f"line {number} is not an object")
                    yield f"{path.name} line {number}", row
    except (OSError, ValueError, csv.Error) as e:
        raise InputError(f"{path} cannot be read: {e}; wanted one object a line, with file_name and text") from e


def _shard(root: Path, path: Path) -> Iterator[Entry]:
    """Pictures of a WebDataset shard: files of one name up to its first dot belong together."""
    file = path.relative_to(root).as_posix()
    pictures: list[tuple[str, tarfile.TarInfo]] = []
    texts: dict[str, str | None] = {}
    problems: list[Entry] = []
    try:
        stat = path.stat()
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                head, _, name = member.name.rpartition("/")
                key, _, kind = name.partition(".")
                key, kind = f"{head}/{key}", kind.lower()
                if f".{kind}" in PICTURES:
                    trouble = _trouble(member)
                    if trouble:
                        problems.append(_bad(f"{file}/{member.name}", file, *trouble))
                    else:
                        pictures.append((key, member))
                elif kind in ("txt", "json") and member.isreg() and (kind == "txt" or key not in texts):
                    texts[key] = _text(tar, member, kind, f"{file}/{member.name}")
    except (tarfile.TarError, OSError, EOFError) as e:
        raise InputError(
            f"shard {path} cannot be read: {e}; wanted an uncompressed tar that is whole. Fetch it again, or "
            "unpack and pack it anew"
        ) from e
    yield from problems
    for key, m in pictures:
        stamp = f"{stat.st_size}:{stat.st_mtime_ns}"
        yield Entry(f"{file}/{m.name}", file, texts.get(key), stamp, m.offset_data, m.size)


def _trouble(member: tarfile.TarInfo) -> tuple[str, str] | None:
    if PurePosixPath(member.name).is_absolute() or ".." in PurePosixPath(member.name).parts:
        return "outside", "its name leads out of the archive"
    if not member.isreg() or member.issparse():
        return "unreadable", "it is a link or a special file in the archive"
    return None


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo, kind: str, name: str) -> str | None:
    if member.size > MAX_CAPTION:
        return None
    content = tar.extractfile(member).read()
    try:
        if kind == "txt":
            return clean(content, name)
        said = json.loads(content)
        said = said if isinstance(said, dict) else {}
        return next((clean(said[k], name) for k in ("text", "caption") if isinstance(said.get(k), str)), None)
    except ValueError:  # of clean, too: reported as a missing caption
        return None
