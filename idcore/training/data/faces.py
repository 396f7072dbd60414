"""Who looks at the faces: the detector, and the frozen networks whose features a system is trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor

from ...encoders.analyzer import FaceAnalyzer, analyzer_from
from ...encoders.face import Face
from ...encoders.onnx_runtime import ASSETS, sha256_of
from ...encoders.pulid_features import PuLIDFeatures
from ...errors import InputError
from .parts import NAME as PARTS
from .parts import parts_map

SYSTEMS = ("none", "tiny-pulid", "pulid")


@runtime_checkable
class FaceFeatureProvider(Protocol):
    """The frozen face networks of one system.

    Attributes:
        name: short name.
        hash: changes whenever the same face would give other features (weights, preprocessing).
    """

    name: str
    hash: str

    def features(self, picture: Image.Image, face: Face) -> Mapping[str, Tensor]:
        """Tensors by name, of the same shapes for every face: what `Batch.face` holds of a sample.

        Args:
            picture: RGB, long side at most 1024.
            face: of it, as the analyzer found it.

        Raises:
            InputError: this face gives none; the picture is dropped with the text.
        """
        ...


class FaceSetup(Protocol):
    """Makes the analyzer and the provider, in every process anew; must survive pickling."""

    def build(self) -> tuple[FaceAnalyzer, FaceFeatureProvider | None]: ...

    def fingerprint(self) -> dict[str, Any]:
        """What the result hangs on, as plain values."""
        ...


@dataclass(frozen=True)
class Faces:
    """The setups that `idcore prepare` knows by name.

    Attributes:
        system: "none" (boxes and landmarks alone), "tiny-pulid" (`DlibTokens`) or "pulid" (the published chain).
        faces: "embedded", or a folder with SCRFD and ArcFace (antelopev2).
        vision, parsing, retinaface: weights of the published chain, safetensors (`PuLIDPreprocess.from_weights`).
        providers: of ONNX Runtime. device: of the vision tower. threads: of each embedded network.
    """

    system: str = "tiny-pulid"
    faces: str = "embedded"
    vision: str | None = None
    parsing: str | None = None
    retinaface: str | None = None
    providers: str = "auto"
    device: str = "cpu"
    threads: int | None = 1

    def __post_init__(self) -> None:
        if self.system not in SYSTEMS:
            raise InputError(f"prepare: system must be one of {', '.join(SYSTEMS)}, got {self.system!r}")
        if self.system == "tiny-pulid" and self.faces != "embedded":
            raise InputError(f"prepare: tiny-pulid reads the embedded recogniser, got faces {self.faces!r}")
        if self.system == "pulid" and (self.faces == "embedded" or self.vision is None):
            raise InputError(
                "prepare: pulid reads ArcFace (a folder with SCRFD and glintr100: --faces FOLDER) and EVA02-CLIP "
                f"(--vision FILE); got faces {self.faces!r} and vision {self.vision!r}"
            )

    def build(self) -> tuple[FaceAnalyzer, FaceFeatureProvider | None]:
        from ...encoders.analyzer import EmbeddedAnalyzer

        if self.faces == "embedded":
            analyzer = EmbeddedAnalyzer(self.providers, threads=self.threads)
        else:
            analyzer = analyzer_from(self.faces, self.providers)
        if self.system == "none":
            return analyzer, None
        if self.system == "tiny-pulid":
            from ...encoders.dlib_tokens import DlibTokens

            return analyzer, DlibTokens(analyzer)
        return analyzer, self._published(analyzer)

    def _published(self, analyzer: FaceAnalyzer) -> FaceFeatureProvider:
        from ...encoders.pulid_preprocess import PuLIDPreprocess

        chain = PuLIDPreprocess.from_weights(analyzer, self.vision, self.parsing, self.retinaface)
        for net in (chain.tower, chain.parsing, chain.landmarks):
            if isinstance(net, torch.nn.Module):
                net.to(self.device)
        return PuLIDFaces(chain)

    def fingerprint(self) -> dict[str, Any]:
        from ...encoders.scrfd import find_models
        from ...files import file_hash

        found: dict[str, Any] = {"system": self.system, "faces": self.faces if self.faces == "embedded" else "folder"}
        if self.faces == "embedded":
            files = {name: ASSETS / f"{name}.onnx" for name in ("pnet", "rnet", "onet", "dlib_resnet")}
            found |= {f"{k} hash": f"sha256:{sha256_of(p)}" for k, p in files.items()}
        else:
            found |= {f"{k} hash": f"sha256:{sha256_of(p)}" for k, p in find_models(self.faces).items()}
        for key in ("vision", "parsing", "retinaface") if self.system == "pulid" else ():
            path = getattr(self, key)
            found[f"{key} hash"] = None if path is None else file_hash(path)
        if self.system == "tiny-pulid":
            from ...encoders.dlib_tokens import VERSION

            found["features"] = VERSION
        elif self.system == "pulid":
            from ...encoders.pulid_preprocess import VERSION as PULID

            found["features"] = PULID if self.parsing is None else f"{PULID}, parts"
        return found


class PuLIDFaces:
    """The published chain (`PuLIDPreprocess`) as a provider: `id_cond` [1, 1280], `hidden.0` to `.4` [1, T, W], and
    with a parsing network `parts` [128, 128], classes of the picture's pixels (`data/parts.py`)."""

    name = "pulid"

    def __init__(self, chain: Any) -> None:
        self.chain = chain

    @property
    def hash(self) -> str:
        return "|".join(f"{k}={v}" for k, v in sorted(self.chain.meta().items()))

    def features(self, picture: Image.Image, face: Face) -> dict[str, Tensor]:
        found, seen = self.chain.read(picture, face)
        parts = {} if seen is None else {PARTS: parts_map(*seen, picture.size)}
        return {"id_cond": found.id_cond[0], **{f"hidden.{i}": h[0] for i, h in enumerate(found.hidden)}, **parts}


def pulid_features(face: Mapping[str, Tensor]) -> PuLIDFeatures:
    """`Batch.face` of a batch as PuLID's encoder reads it: one photo of each of B people.

    Args:
        face: `id_cond` [B, 1, W] and `hidden.0`, `hidden.1`, ... [B, 1, T, W'].

    Raises:
        InputError: the data was prepared for another system.
    """
    count = sum(k.startswith("hidden.") for k in face)
    wanted = [f"hidden.{i}" for i in range(count)]
    if "id_cond" not in face or not count or any(k not in face for k in wanted):
        raise InputError(
            f"PuLID trains on id_cond and hidden.0 ..., the batch has {', '.join(sorted(face)) or 'no face features'}; "
            "prepare the data with --system pulid, or tiny-pulid for the embedded base"
        )
    return PuLIDFeatures(face["id_cond"], tuple(face[k] for k in wanted))
