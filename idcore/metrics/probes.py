"""One look at a picture each: faces, networks, the attributes of the embedded model's world. All go into a `Store`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ..encoders.analyzer import FaceAnalyzer
from ..encoders.images import load_image
from ..encoders.onnx_runtime import sha256_of
from ..errors import InputError
from .networks import Looker
from .store import Result, Store

SMALL = 256  # pictures below are enlarged to this side before faces are looked for, as by the gate
BATCH = 16
Progress = Callable[[int, int, str], None]


class Probe(Protocol):
    """A measure of single pictures. `key` changes with everything that changes its answer."""

    key: str
    words: str

    def look(self, pictures: Sequence[Image.Image]) -> list[Result]: ...


class FaceProbe:
    """The largest face and its embedding: {"faces": count, "score", "box"} and [E], or {"faces": 0} and None."""

    def __init__(self, analyzer: FaceAnalyzer) -> None:
        self.analyzer = analyzer
        self.key = f"face-v1:{analyzer_key(analyzer)}"
        self.words = f"faces ({analyzer.name})"

    def look(self, pictures: Sequence[Image.Image]) -> list[Result]:
        return [self._one(p) for p in pictures]

    def _one(self, picture: Image.Image) -> Result:
        scale = SMALL / max(picture.size)
        if scale > 1:
            size = tuple(max(1, round(s * scale)) for s in picture.size)
            picture = picture.resize(size, Image.Resampling.BICUBIC)
        faces = self.analyzer.detect(picture)
        if not faces:
            return {"faces": 0}, None
        box = [round(float(v) / max(scale, 1), 1) for v in faces[0].box]
        said = {"faces": len(faces), "score": round(float(faces[0].score), 4), "box": box}
        return said, np.asarray(self.analyzer.embed(picture, faces[0]), np.float32).reshape(-1)


def recogniser_key(analyzer: FaceAnalyzer) -> str:
    """Which recogniser: the hash of its weights where they are a file, else its class."""
    model = getattr(getattr(analyzer, "recogniser", None), "_model", None)
    path = getattr(model, "path", None)
    return sha256_of(path)[:16] if path is not None else f"{type(analyzer).__name__}:{analyzer.name}"


def analyzer_key(analyzer: FaceAnalyzer) -> str:
    """Recogniser and detector with the detector's settings."""
    detector = getattr(analyzer, "detector", None)
    names = ("thresholds", "min_size", "size", "threshold", "overlap")
    settings = {n: getattr(detector, n) for n in names if hasattr(detector, n)}
    return f"{recogniser_key(analyzer)}:{type(detector).__name__}:{sorted(settings.items())}"


@dataclass(frozen=True)
class NetworkProbe:
    """The vector of a `Looker`."""

    network: Looker

    @property
    def key(self) -> str:
        return f"network-v1:{self.network.key}"

    @property
    def words(self) -> str:
        return self.network.words

    def look(self, pictures: Sequence[Image.Image]) -> list[Result]:
        return [({}, v) for v in self.network(pictures)]


class TinyProbe:
    """Background and style of a picture of the embedded model's world, by name."""

    words = "attributes"

    def __init__(self) -> None:
        from .tiny_style import StyleJudge

        self.judge = StyleJudge.from_package()
        self.key = f"tiny-attributes-v1:{self.judge.key}"

    def look(self, pictures: Sequence[Image.Image]) -> list[Result]:
        from .gate import background_of

        styles = self.judge(pictures)
        return [({"background": background_of(p), "style": s}, None) for p, s in zip(pictures, styles)]


def run_probe(
    store: Store, probe: Probe, files: Sequence[Path], progress: Progress | None = None
) -> list[Result | None]:
    """Results for files in order; only what the store lacks is measured, and each batch is kept at once.

    A file that is no readable picture gives ({"unreadable": why}, None); a file that is missing gives None.
    """
    hashes = [store.hash_of(f) if f.is_file() else None for f in files]
    done = store.get([h for h in hashes if h], probe.key)
    todo = {h: f for h, f in zip(hashes, files) if h and h not in done}
    waiting = list(todo.items())
    for i in range(0, len(waiting), BATCH):
        fresh = _measure(probe, waiting[i : i + BATCH])
        store.put(probe.key, fresh)
        done |= fresh
        if progress:
            progress(min(i + BATCH, len(waiting)), len(waiting), probe.words)
    return [done[h] if h else None for h in hashes]


def _measure(probe: Probe, batch: Sequence[tuple[str, Path]]) -> dict[str, Result]:
    pictures: dict[str, Any] = {}
    results: dict[str, Result] = {}
    for name, path in batch:
        try:
            pictures[name] = load_image(path)
        except InputError as e:
            results[name] = ({"unreadable": str(e)}, None)
    if pictures:
        results |= dict(zip(pictures, probe.look(list(pictures.values()))))
    return results
