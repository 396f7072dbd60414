"""Latents of prepared pictures, encoded once by a frozen base model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...encoders.images import load_image
from ...errors import IdcoreError, InputError
from ...files import check_container, replace_text, write_safetensors
from ..contract import Base
from .buckets import crop_for
from .options import Record
from .reading import read_bytes

PROBE = 0.05  # largest difference between two encodings of the probe by the same model, in another dtype (our choice)


def probe(base: Base, bucket: tuple[int, int]) -> list[float]:
    """What a base makes of one fixed picture of this size, 16 numbers: tells one autoencoder from another."""
    w, h = bucket
    y, x = torch.linspace(-3, 3, h)[:, None], torch.linspace(-2, 4, w)[None]
    pixels = torch.stack([torch.sin(x * k + y * y) for k in (1.0, 2.0, 3.5)])[None]
    with torch.no_grad():
        found = base.encode_pictures(pixels).float().flatten()
    return [round(v, 4) for v in found[:: max(1, len(found) // 16)][:16].tolist()]


def same_probe(a: Iterable[float], b: Iterable[float]) -> bool:
    """Whether two probes are of one autoencoder."""
    a, b = list(a), list(b)
    return len(a) == len(b) and all(abs(x - y) <= PROBE for x, y in zip(a, b))


def cache_latents(folder: str | Path, base: Base, *, batch: int = 4, progress: bool = True) -> int:
    """Encode every record of a prepared folder, each cut so that its face is in it; what stands is kept.

    Args:
        folder: made by `prepare`.
        base: whose autoencoder encodes.
        batch: pictures in one encoding.

    Returns:
        How many were encoded now.

    Raises:
        InputError: latents of another base stand there. IdcoreError: the folder cannot be written, or NaN.
    """
    from .claiming import alone
    from .source import read_manifest

    read_manifest(Path(folder))  # before anything is written
    with alone(Path(folder)):
        return _cache(Path(folder), base, batch, progress)


def _cache(folder: Path, base: Base, batch: int, progress: bool) -> int:
    from tqdm import tqdm

    from .source import read_index, read_manifest

    manifest = read_manifest(folder)
    records = read_index(folder, manifest)
    said = _claim(folder, base, records)
    chunks: dict[str, list[Record]] = {}
    for r in records:
        chunks.setdefault(r.chunk, []).append(r)
    todo = {name: rows for name, rows in chunks.items() if not _stands(folder, name, rows)}
    bar = tqdm(desc="encoding", unit="picture", total=len(records), disable=not progress)
    bar.update(len(records) - sum(map(len, todo.values())))
    done = 0
    with bar:
        for name, rows in todo.items():
            found = _encode(Path(manifest["data"]), rows, base, batch, manifest["settings"])
            write_safetensors(folder / "latents" / f"{name}.safetensors", found)
            bar.update(len(rows))
            done += len(rows)
    replace_text(folder / "latents.json", json.dumps({**said, "index": manifest["index"]}, indent=1) + "\n")
    return done


def _claim(folder: Path, base: Base, records: list[Record]) -> dict[str, Any]:
    file = folder / "latents.json"
    bucket = tuple(records[0].bucket)
    said = {"base": base.name, "probe": probe(base, bucket), "bucket": list(bucket)}
    if file.exists():
        try:
            was = json.loads(file.read_text(encoding="utf-8"))
            was_probe = probe(base, tuple(was["bucket"]))
            differ = not same_probe(was["probe"], was_probe)
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise InputError(f"{file} is damaged ({e!r}); remove {folder / 'latents'} and it, then run again") from e
        if differ:
            raise InputError(
                f"{folder} holds latents of {was['base']!r}, {said['base']!r} has another autoencoder"
                f"; prepare for it in another --out, or remove {folder / 'latents'} and {file.name}"
            )
        return {**was, "index": None}
    try:
        (folder / "latents").mkdir(exist_ok=True)
    except OSError as e:
        raise IdcoreError(f"cannot write into {folder}: {e.strerror or e}") from e
    replace_text(file, json.dumps({**said, "index": None}, indent=1) + "\n")
    return said


def _stands(folder: Path, name: str, rows: list[Record]) -> bool:
    path = folder / "latents" / f"{name}.safetensors"
    if not path.is_file():
        return False
    return {str(r.row) for r in rows} <= set(check_container(path, "latents")[0])


def _content(root: Path, record: Record) -> bytes:
    """A picture's file. Raises InputError where it is not the one whose face was read."""
    content = read_bytes(root, record.file, record.offset, record.length)
    if f"sha256:{hashlib.sha256(content).hexdigest()}" != record.hash:
        raise InputError(
            f"{root / record.file} ({record.id}) has changed since it was prepared; run `idcore prepare` again"
        )
    return content


def _encode(root: Path, rows: list[Record], base: Base, batch: int, settings: dict[str, Any]) -> dict[str, Tensor]:
    from .source import pixels_of

    dtype = torch.float16 if settings["half"] else torch.float32
    found: dict[str, Tensor] = {}
    for bucket in sorted({tuple(r.bucket) for r in rows}):
        mine = [r for r in rows if tuple(r.bucket) == bucket]
        for start in range(0, len(mine), batch):
            part = mine[start : start + batch]
            contents = [_content(root, r) for r in part]
            pictures = [load_image(c, max_pixels=settings["max_pixels"]) for c in contents]
            crops = [crop_for(tuple(r.size), bucket, r.box) for r in part]
            pixels = torch.stack([pixels_of(p, c) for p, c in zip(pictures, crops)])
            with torch.no_grad():
                latents = base.encode_pictures(pixels).to("cpu", dtype)
            for r, latent in zip(part, latents):
                if not bool(torch.isfinite(latent).all()):
                    raise IdcoreError(f"{base.name} gave NaN or infinity for {r.id}; encode in float32")
                found[str(r.row)] = latent.clone()
    return found
