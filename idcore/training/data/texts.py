"""Encoded captions of prepared pictures, encoded once by a base model's frozen text encoders and kept on disk.

    OUT/texts.json              whose they are: base, dtype, and what its encoders make of one fixed prompt
    OUT/texts/NAME.safetensors  of a chunk's records, by the caption's hash: [L, E], and pooled [P] where there is one

They are in the encoders' own dtype, so that a run with them computes the same numbers as one without.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...errors import IdcoreError, InputError, WeightsError
from ...files import check_container, replace_text, write_safetensors
from ..bases.text_cache import Rows
from .options import Record

PROBED = "a portrait of one person, seen from the front"
NEAR = 0.02  # largest distance of two probes of the same encoders, relative, in another arithmetic (our choice)
OPEN = 64  # files that are kept open (our choice)


def cache_texts(folder: str | Path, base: Any, *, progress: bool = True) -> int:
    """Encode every caption of a prepared folder; what stands is kept.

    Args:
        folder: made by `prepare`.
        base: `training.bases.latent.LatentBase`.

    Returns:
        How many captions were encoded now.

    Raises:
        InputError: a base without text encoders, or embeddings of others stand there. IdcoreError: the folder cannot be
            written, or NaN.
    """
    from tqdm import tqdm

    from .claiming import alone
    from .source import read_index, read_manifest

    folder = Path(folder)
    manifest = read_manifest(folder)
    with alone(folder):
        records = read_index(folder, manifest)
        said = _claim(folder, base)
        todo = {name: found for name, found in _captions(records).items() if not _stands(folder, name, found)}
        bar = tqdm(desc="encoding captions", unit="caption", total=sum(map(len, todo.values())), disable=not progress)
        with bar:
            for name, captions in todo.items():
                write_safetensors(folder / "texts" / f"{name}.safetensors", _encoded(captions, base, bar.update))
        replace_text(folder / "texts.json", json.dumps({**said, "index": manifest["index"]}, indent=1) + "\n")
        return bar.n if progress else sum(map(len, todo.values()))


class DiskTexts:
    """The encoded captions of a prepared folder, read one by one: `bases.text_cache.TextCache.stored`.

    Args:
        folder: the prepared folder.
        records: of its index.
        index: the index's hash.

    Raises:
        InputError: the captions are not encoded, or not all of this index.
    """

    def __init__(self, folder: Path, records: Iterable[Record], index: str) -> None:
        self.folder, self.said = folder, _read_said(folder)
        if self.said.get("index") != index:
            raise InputError(
                f"not all captions of {folder} are encoded by {self.said['base']!r}; run `idcore prepare` with --base "
                "and --texts again, or set texts = false"
            )
        self._where = {key_of(r.caption): r.chunk for r in records}
        self._files: dict[str, Any] = {}

    def __call__(self, prompt: str) -> Rows | None:
        """([L, E], [P] or None) of a caption; None for other prompts.

        Raises:
            InputError: its file is damaged or gone.
        """
        key = key_of(prompt)
        if key not in self._where:
            return None
        path = self.folder / "texts" / f"{self._where[key]}.safetensors"
        try:
            file = self._open(path)
            pooled = file.get_tensor(f"{key}.pooled").clone() if f"{key}.pooled" in file.keys() else None  # noqa: SIM118
            return file.get_tensor(key).clone(), pooled
        except (WeightsError, SafetensorError, OSError) as e:
            raise InputError(
                f"{path} does not hold the text of {prompt!r:.80} ({e}); remove it and run `idcore prepare` with "
                "--base and --texts again"
            ) from e

    def check_base(self, base: Any) -> None:
        """Raise InputError where the embeddings are of other text encoders than `base` has, or of another dtype."""
        _require_same(self.folder, self.said, _said_of(base))

    def _open(self, path: Path) -> Any:
        key = str(path)
        if key not in self._files:
            check_container(path, "encoded captions")
            while len(self._files) >= OPEN:
                self._files.pop(next(iter(self._files)))
            self._files[key] = safe_open(key, framework="pt")
        return self._files[key]


def key_of(caption: str) -> str:
    """The name of a caption's tensors."""
    return hashlib.blake2b(caption.encode(), digest_size=16).hexdigest()


def _captions(records: Iterable[Record]) -> dict[str, list[str]]:
    """Captions by chunk, each in the last chunk that has it, where `DiskTexts` looks."""
    last = {r.caption: r.chunk for r in records}
    found: dict[str, list[str]] = {}
    for caption, chunk in last.items():
        found.setdefault(chunk, []).append(caption)
    return found


def _encoded(captions: Sequence[str], base: Any, done: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for caption in captions:
        embeds, pooled = base.texts([caption])
        rows = {key_of(caption): embeds[0], f"{key_of(caption)}.pooled": None if pooled is None else pooled[0]}
        for name, row in rows.items():
            if row is not None:
                if not bool(torch.isfinite(row).all()):
                    raise IdcoreError(f"{base.name} gave NaN or infinity for {caption!r:.80}; encode in float32")
                found[name] = row
        done(1)
    return found


def _stands(folder: Path, name: str, captions: Sequence[str]) -> bool:
    path = folder / "texts" / f"{name}.safetensors"
    return path.is_file() and {key_of(c) for c in captions} <= set(check_container(path, "encoded captions")[0])


def _said_of(base: Any) -> dict[str, Any]:
    """Raises InputError for a base without text encoders whose work can be kept."""
    if not hasattr(base, "texts"):
        raise InputError(
            f"{base.name} has no text encoders whose work is kept; leave --texts out, or set texts = false"
        )
    embeds, pooled = base.texts([PROBED])
    some = embeds[0].float().flatten()
    probe = [round(v, 4) for v in some[:: max(1, len(some) // 64)][:64].tolist()]
    sizes = [list(embeds.shape[1:]), None if pooled is None else list(pooled.shape[1:])]
    return {"base": base.name, "dtype": str(embeds.dtype).removeprefix("torch."), "sizes": sizes, "probe": probe}


def _require_same(folder: Path, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    advice = "prepare for it in another --out, or set texts = false"
    if was["dtype"] != now["dtype"]:
        raise InputError(f"{folder} holds texts in {was['dtype']}, {now['base']!r} encodes in {now['dtype']}; {advice}")
    same = was["sizes"] == now["sizes"]
    if same:
        a, b = (torch.tensor(said["probe"], dtype=torch.float64) for said in (was, now))
        same = float((a - b).norm()) <= NEAR * max(float(a.norm()), 1e-6)
    if not same:
        raise InputError(f"{folder} holds texts of {was['base']!r}, {now['base']!r} has other text encoders; {advice}")


def _read_said(folder: Path) -> dict[str, Any]:
    file = folder / "texts.json"
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        if not {"base", "dtype", "sizes", "probe"} <= set(said):
            raise ValueError("keys are missing")
    except (OSError, ValueError, TypeError) as e:
        raise InputError(
            f"{file} is damaged or missing ({e!r}); remove {folder / 'texts'} and it, then prepare again"
        ) from e
    return said


def _claim(folder: Path, base: Any) -> dict[str, Any]:
    """Make the texts this base's, or refuse another's."""
    now = _said_of(base)
    if (folder / "texts.json").exists():
        was = _read_said(folder)
        _require_same(folder, was, now)
        return was
    try:
        (folder / "texts").mkdir(exist_ok=True)
    except OSError as e:
        raise IdcoreError(f"cannot write into {folder}: {e.strerror or e}") from e
    replace_text(folder / "texts.json", json.dumps({**now, "index": None}, indent=1) + "\n")
    return now
