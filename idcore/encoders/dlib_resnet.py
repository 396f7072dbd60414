"""dlib's face recognition ResNet on ONNX Runtime: aligned chips in, 128 numbers per face out."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from idcore.encoders.onnx_runtime import OnnxModel, Providers, asset
from idcore.errors import InputError, WeightsError

FEATURES = ("feat0", "feat1", "feat2", "feat3", "feat4")


class DlibOutput(NamedTuple):
    """``embedding`` [N,128] float32, not unit-norm; ``feats``: float32 [N,32,35,35], [N,64,17,17],
    [N,128,8,8], [N,256,4,4], [N,256,2,2], the output of each stage (at least 0)."""

    embedding: np.ndarray
    feats: tuple[np.ndarray, ...]


class DlibResnet:
    """The recogniser. Threads may share one object.

    Attributes:
        provider: the ONNX Runtime provider that runs it.
        size: side of the chips that it wants, 150.
    """

    def __init__(
        self,
        providers: Providers = "auto",
        *,
        threads: int | None = None,
        path: str | Path | None = None,
        batch_size: int = 32,
    ):
        """Loads the shipped network (checked by hash), or the one at ``path`` (from idcore.tools.dlib_to_onnx).

        ``batch_size``: chips per run, so that thousands of faces do not need gigabytes.
        """
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}.")
        self._model = OnnxModel(path or asset("dlib_resnet.onnx"), providers, threads)
        self.provider, self.reason, self.batch_size = self._model.provider, self._model.reason, batch_size
        shape = self._model.shapes[0]
        if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3] or "embedding" not in self._model.outputs:
            raise WeightsError(
                f"{self._model.path} takes {shape} and gives {', '.join(self._model.outputs)}; wanted a model from "
                "idcore.tools.dlib_to_onnx ([N,3,150,150] -> embedding). Convert it again."
            )
        self.size = int(shape[2])

    def _run(self, chips: np.ndarray, names: list[str]) -> list[np.ndarray]:
        chips = np.asarray(chips)
        wanted = (self.size, self.size, 3)
        if chips.ndim != 4 or chips.shape[1:] != wanted or chips.dtype != np.uint8:
            raise InputError(
                f"Aligned chips must be uint8 RGB [N,{self.size},{self.size},3], got {chips.dtype} "
                f"{list(chips.shape)}. Cut them with idcore.encoders.align.align."
            )
        starts = range(0, max(1, len(chips)), self.batch_size)
        planes = chips.transpose(0, 3, 1, 2).astype(np.float32)
        parts = [
            self._model.run({self._model.inputs[0]: planes[start : start + self.batch_size]}, names) for start in starts
        ]
        return [np.concatenate(column) for column in zip(*parts, strict=True)]

    def embed(self, chips: np.ndarray) -> np.ndarray:
        """Embeddings [N,128] float32 of uint8 RGB chips [N,150,150,3]. Not unit-norm: compare them by L2."""
        return self._run(chips, ["embedding"])[0]

    def features(self, chips: np.ndarray) -> DlibOutput:
        """Embeddings and all stage outputs of uint8 RGB chips [N,150,150,3]."""
        embedding, *feats = self._run(chips, ["embedding", *FEATURES])
        return DlibOutput(embedding, tuple(feats))
