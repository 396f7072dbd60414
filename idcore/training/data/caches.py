"""Face features and latents of prepared data, read record by record."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...errors import InputError, WeightsError
from ...files import check_container
from .options import Record

_MISSING = (WeightsError, SafetensorError, OSError, IndexError, ValueError)
OPEN = 64  # files that are kept open (our choice)


class Caches:
    """Reads rows of the safetensors files of a prepared folder; threads may share one object."""

    def __init__(self, folder: Path, names: Sequence[str] = ()) -> None:
        """`names`: the features that every record has."""
        self.folder, self.names = folder, names
        self._files: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def face(self, record: Record, flip: bool = False) -> dict[str, Tensor]:
        """Features of a record's face by name, float32, without the batch; {} where none were prepared."""
        start = "flipped." if flip else ""
        names = [n for n in self.names if n.startswith("flipped.") == flip]
        if not names:
            return {}
        path = self.folder / "faces" / f"{record.chunk}.safetensors"
        with self._lock:
            try:
                file = self._open(path)
                rows = {n: file.get_slice(n)[record.row] for n in names}
            except _MISSING as e:
                raise InputError(
                    f"{path} does not hold the face features of {record.id} ({e}); remove {self.folder / 'chunks'}/"
                    f"{record.chunk}.json and run `idcore prepare` again"
                ) from e
        return {k.removeprefix(start): v.to(torch.float32, copy=True) for k, v in rows.items()}

    def latent(self, record: Record) -> Tensor:
        """[C, h, w] float32."""
        path = self.folder / "latents" / f"{record.chunk}.safetensors"
        with self._lock:
            try:
                return self._open(path).get_tensor(str(record.row)).to(torch.float32, copy=True)
            except _MISSING as e:
                raise InputError(
                    f"{path} does not hold the latents of {record.id} ({e}); run `idcore prepare` again"
                ) from e

    def latents_of(self, index: str) -> dict[str, Any] | None:
        """latents.json: the base whose latents these are; None where there are none.

        Raises:
            InputError: damaged, or not all of the index (its hash) are encoded.
        """
        file = self.folder / "latents.json"
        if not file.is_file():
            return None
        try:
            said = json.loads(file.read_text(encoding="utf-8"))
            done = said["index"] == index and {"base", "probe", "bucket"} <= set(said)
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise InputError(f"{file} is damaged ({e!r}); remove it, or run `idcore prepare` again") from e
        if not done:
            raise InputError(
                f"not all pictures of {self.folder} are encoded by {said.get('base')!r}; run `idcore prepare` with "
                "--base again, or set latents = false"
            )
        return said

    def _open(self, path: Path) -> Any:
        key = str(path)
        if key not in self._files:
            check_container(path, "prepared data")
            self._files[key] = safe_open(key, framework="pt")
            while len(self._files) > OPEN:
                self._files.popitem(last=False)
        self._files.move_to_end(key)
        return self._files[key]
