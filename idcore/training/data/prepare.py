"""`idcore prepare`: every picture examined once, in chunks that are each saved in one step.

    OUT/settings.json         what the rest was made with; other settings are refused
    OUT/chunks/NAME.json      records and drops of one chunk; it stands last, so a chunk that stands is whole
    OUT/faces/NAME.safetensors  face features of the chunk's records, [n, ...] by name
    OUT/latents/NAME.safetensors  latents of the chunk's records, where a base model was given
    OUT/texts/NAME.safetensors  their encoded captions, where asked for
    OUT/index.jsonl, dropped.jsonl, manifest.json   of all chunks, written when all stand

A chunk's name is a hash of the settings and of its pictures' names, sizes and times: a second run finds what stands,
whoever made it, and a picture more or less changes a chunk or two. The pictures of a chunk follow from the names alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

from ...errors import IdcoreError
from ...files import check_container, file_hash, replace_text, write_safetensors
from ..settings_out import as_dict
from .claiming import FOLDERS, alone, claim
from .examine import Examiner
from .faces import Faces, FaceSetup
from .options import Drop, PrepareConfig, Record
from .reading import Entry, root_of, scan
from .report import Report, without_duplicates

VERSION = 1


def prepare(
    data: str | Path,
    out: str | Path,
    config: PrepareConfig | None = None,
    faces: FaceSetup | None = None,
    *,
    workers: int = 1,
    dry_run: bool = False,
    progress: bool = True,
) -> Report:
    """Examine a data folder and write what training reads. A second call goes on where the first stopped.

    Args:
        data: folder of pictures with captions, or with WebDataset shards, or one shard.
        out: folder to write; another run's, made with the same settings, is continued.
        config, faces: how pictures are judged, and by whom.
        workers: processes; the result is the same for any number.
        dry_run: examine all (without features), write nothing.

    Raises:
        InputError: no data, or `out` was made with other settings (the first that differ are named).
        IdcoreError: the folder cannot be written, or a worker died. What stands is kept.
    """
    config, faces = config or PrepareConfig(), faces or Faces()
    config.check()
    entries = scan(data)
    root = root_of(data).resolve()
    if dry_run:
        return _dry(entries, root, config, faces, progress)
    settings = {**as_dict(config), **{f"faces {k}": v for k, v in faces.fingerprint().items()}, "version": VERSION}
    out = Path(out)
    _claim(out, settings)
    with alone(out):
        chunks = {_name(settings, part): part for part in _chunks(entries, config.chunk)}
        missing = {name: part for name, part in chunks.items() if not _stands(out, name)}
        _examine(missing, out, root, config, faces, workers, progress, len(entries))
        reused = len(entries) - sum(map(len, missing.values()))
        return _finish(out, root, settings, list(chunks), len(entries), config, reused)


def _dry(entries: list[Entry], root: Path, config: PrepareConfig, faces: FaceSetup, progress: bool) -> Report:
    from tqdm import tqdm

    examiner = Examiner(root, config, faces.build()[0], None)
    records, drops = [], []
    for entry in tqdm(entries, desc="examining", unit="picture", disable=not progress):
        found, lost, _ = examiner.chunk([entry])
        records += found
        drops += lost
    records, twice = without_duplicates(records, config)
    return Report(len(entries), records, drops + twice, no_caption=sum(not r.caption for r in records))


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Make the folder this run's, or refuse another run's settings."""
    file = out / "settings.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        claim(file, settings, "was prepared")
        for name in FOLDERS[:2]:  # after the settings: a run that is killed here can go on
            (out / name).mkdir(exist_ok=True)
    except OSError as e:
        raise IdcoreError(f"cannot write into {out}: {e.strerror or e}; choose another --out folder") from e


def _bits(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")


def _chunks(entries: Sequence[Entry], size: int) -> Iterator[list[Entry]]:
    """Half to twice `size` entries, cut where a name's hash says so: a new picture moves the boundaries near it."""
    part: list[Entry] = []
    half = max(1, size // 2)
    for e in entries:
        part.append(e)
        if len(part) == 2 * size or len(part) >= half and _bits(e.id) % half == 0:
            yield part
            part = []
    if part:
        yield part


def _name(settings: dict[str, Any], part: Sequence[Entry]) -> str:
    said = [settings, [[e.id, e.caption, e.stamp, e.offset, e.length, e.problem] for e in part]]
    return hashlib.blake2b(json.dumps(said).encode(), digest_size=10).hexdigest()


def _stands(out: Path, name: str) -> bool:
    """Whether a chunk is done; one that says nothing readable is made anew."""
    try:
        said = json.loads((out / "chunks" / f"{name}.json").read_text(encoding="utf-8"))
        features = said["features"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    path = out / "faces" / f"{name}.safetensors"
    return features is None or (path.is_file() and path.stat().st_size == features)


_examiner: Examiner | None = None


def _end_with_parent() -> None:
    """Workers of a killed run would wait for work for ever."""
    parent_process().join()
    os._exit(1)


def _start(root: Path, config: PrepareConfig, faces: FaceSetup) -> None:
    """Of a worker process."""
    global _examiner
    import torch

    Thread(target=_end_with_parent, daemon=True).start()

    torch.set_num_threads(1)
    _examiner = Examiner(root, config, *faces.build())


def _do(out: Path, name: str, part: list[Entry], examiner: Examiner | None = None) -> int:
    """One chunk, from pictures to files."""
    records, drops, features = (examiner or _examiner).chunk(part)
    size = None
    if features:
        size = write_safetensors(out / "faces" / f"{name}.safetensors", features).stat().st_size
    for r in records:
        r.chunk = name
    said = {"records": [asdict(r) for r in records], "drops": [asdict(d) for d in drops], "features": size}
    replace_text(out / "chunks" / f"{name}.json", json.dumps(said) + "\n")
    return len(part)


def _examine(
    missing: dict[str, list[Entry]],
    out: Path,
    root: Path,
    config: PrepareConfig,
    faces: FaceSetup,
    workers: int,
    progress: bool,
    total: int,
) -> None:
    from tqdm import tqdm

    if not missing:
        return
    todo = sum(map(len, missing.values()))
    bar = tqdm(total=total, initial=total - todo, desc="preparing", unit="picture", disable=not progress)
    try:
        if workers <= 1:
            examiner = Examiner(root, config, *faces.build())
            for name, part in missing.items():
                bar.update(_do(out, name, part, examiner))
        else:
            _in_processes(missing, out, (root, config, faces), min(workers, len(missing)), bar.update)
    finally:
        bar.close()


def _in_processes(
    missing: dict[str, list[Entry]], out: Path, setup: tuple, workers: int, done: Callable[[int], Any]
) -> None:
    # Not forked: a child of a process with running thread pools may wait for their locks for ever.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start, initargs=setup)
    jobs, running = iter(missing.items()), set()
    try:
        while True:
            for name, part in jobs:
                running.add(pool.submit(_do, out, name, part))
                if len(running) >= 2 * workers:
                    break
            if not running:
                break
            ready, running = wait(running, return_when=FIRST_COMPLETED)
            for f in ready:
                done(f.result())
    except BrokenProcessPool as e:
        raise IdcoreError(
            "a worker process ended by itself; most often there was too little memory for so many (--workers). Run it "
            "again: what stands is kept"
        ) from e
    finally:
        pool.shutdown(cancel_futures=True)


def _features(out: Path, records: list[Record]) -> list[str]:
    """Names of the features that every record has."""
    if not records:
        return []
    path = out / "faces" / f"{records[0].chunk}.safetensors"
    return sorted(check_container(path, "face features")[0]) if path.exists() else []


def _finish(
    out: Path, root: Path, settings: dict[str, Any], names: list[str], found: int, config: PrepareConfig, reused: int
) -> Report:
    """Index, drops and manifest of all chunks, and what no chunk needs any more removed."""
    records, drops = [], []
    for name in names:
        said = json.loads((out / "chunks" / f"{name}.json").read_text(encoding="utf-8"))
        records += [Record(**r) for r in said["records"]]
        drops += [Drop(**d) for d in said["drops"]]
    records, twice = without_duplicates(records, config)
    drops = sorted(drops + twice, key=lambda d: d.id)
    for file, rows in (("dropped.jsonl", drops), ("index.jsonl", records)):
        replace_text(out / file, "".join(json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in rows))
    report = Report(found, records, drops, reused, sum(not r.caption for r in records), out)
    manifest = {
        "version": VERSION, "data": str(root), "pictures": found, "records": len(records),
        "dropped": dict(report.counts), "features": _features(out, records),
        "index": file_hash(out / "index.jsonl"), "settings": settings,
    }  # fmt: skip
    replace_text(out / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    for folder in FOLDERS:
        suffix = ".json" if folder == "chunks" else ".safetensors"
        for path in (out / folder).glob(f"*{suffix}"):
            if path.stem not in names:
                path.unlink()
    return report
