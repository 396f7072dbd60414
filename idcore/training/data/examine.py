"""One picture: read, judged, its face found and its features taken."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...encoders.analyzer import FaceAnalyzer
from ...encoders.face import Face
from ...encoders.images import load_image
from ...encoders.pulid_preprocess import shrink
from ...errors import InputError
from .buckets import bucket_of, bucket_sizes
from .faces import FaceFeatureProvider
from .options import Drop, PrepareConfig, Record
from .reading import Entry, read_bytes

FACE_SIDE = 1024  # pixels; faces are looked for in pictures no larger than this, as PuLID's chain does
_MIRRORED = [1, 0, 2, 4, 3]


class Rejected(Exception):
    """Carries (reason, in full)."""


class Examiner:
    """Judges pictures. The result for one picture hangs on that picture and the settings alone.

    Args:
        root: folder that the entries' files are in.
        config: the settings.
        analyzer, provider: who finds and who reads the faces.
    """

    def __init__(
        self, root: Path, config: PrepareConfig, analyzer: FaceAnalyzer, provider: FaceFeatureProvider | None
    ) -> None:
        self.root, self.config, self.analyzer, self.provider = Path(root), config, analyzer, provider
        self.sizes = bucket_sizes(config.resolution, config.multiple, config.max_aspect)

    def chunk(self, entries: list[Entry]) -> tuple[list[Record], list[Drop], dict[str, Tensor]]:
        """Records, drops, and the records' features [n, ...] by name."""
        records, drops, found = [], [], []
        for entry in entries:
            try:
                record, features = self.one(entry)
            except Rejected as e:
                drops.append(Drop(entry.id, *e.args))
                continue
            record.row = len(records)
            records.append(record)
            found.append(features)
        stacked = {k: torch.stack([f[k] for f in found]) for k in (found[0] if found else ())}
        return records, drops, stacked

    def one(self, entry: Entry) -> tuple[Record, dict[str, Tensor]]:
        """Raises Rejected."""
        if entry.problem is not None:
            raise Rejected(*entry.problem)
        if entry.caption is None and self.config.captions == "refuse":
            raise Rejected("no caption", "there is no text for it, or an empty one; write one, or --set captions=empty")
        try:
            content = read_bytes(self.root, entry.file, entry.offset, entry.length)
            picture = load_image(content, max_pixels=self.config.max_pixels)
        except InputError as e:
            raise Rejected("unreadable", str(e)) from e
        bucket = self._bucket(picture)
        small = shrink(picture, FACE_SIDE)
        face = self._face(picture, small)
        features = self._features(small, face)
        scale = picture.width / small.width
        box, points = ((np.asarray(v, np.float64) + 0.5) * scale - 0.5 for v in (face.box, face.points))
        record = Record(
            entry.id, entry.file, f"sha256:{hashlib.sha256(content).hexdigest()}", pixel_hash(picture), looks(picture),
            list(picture.size), entry.caption or "", _rounded(box), [_rounded(p) for p in points],
            round(float(face.score), 5), list(bucket), offset=entry.offset, length=entry.length,
        )  # fmt: skip
        return record, features

    def _bucket(self, picture: Image.Image) -> tuple[int, int]:
        bucket = bucket_of(*picture.size, self.sizes)
        scale = max(bucket[0] / picture.width, bucket[1] / picture.height)
        if scale > self.config.max_upscale:
            raise Rejected(
                "picture too small",
                f"{picture.width}x{picture.height} would be enlarged {scale:.2f} times to {bucket[0]}x{bucket[1]}; "
                f"at most {self.config.max_upscale:g} (max_upscale)",
            )
        return bucket

    def _face(self, picture: Image.Image, small: Image.Image) -> Face:
        c = self.config
        faces = [f for f in self.analyzer.detect(small) if f.score >= c.min_score]
        if not faces:
            raise Rejected("no face", f"{self.analyzer.name} found none in {picture.width}x{picture.height}")
        face = faces[0]
        if len(faces) > 1 and c.several != "largest":
            times = face.area / max(faces[1].area, 1e-9)
            if c.several == "refuse" or times < c.dominance:
                listed = "; ".join(str(f) for f in faces[:4])
                raise Rejected("several faces", f"{len(faces)}, the largest {times:.1f} times the next: {listed}")
        sides = (face.box[2:] - face.box[:2]) * (picture.width / small.width)
        share = face.area / (small.width * small.height)
        if min(sides) < c.min_face or share < c.min_face_share:
            raise Rejected(
                "face too small",
                f"{sides[0]:.0f}x{sides[1]:.0f} pixels, {share:.1%} of the picture; wanted {c.min_face} (min_face) and "
                f"{c.min_face_share:.1%} (min_face_share)",
            )
        self._look(small, face)
        return face

    def _look(self, small: Image.Image, face: Face) -> None:
        """The optional filters of light and sharpness, on the face at 128 pixels."""
        c = self.config
        if not c.min_light and not c.min_sharpness:
            return
        area = small.crop(tuple(int(round(float(v))) for v in face.box)).convert("L")
        grey = np.asarray(area.resize((128, 128), Image.Resampling.BILINEAR), np.float64)
        if grey.mean() < c.min_light:
            raise Rejected(
                "dark", f"the face's mean grey level is {grey.mean():.1f}; wanted {c.min_light:g} (min_light)"
            )
        inner = grey[1:-1, 1:-1]
        laplace = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * inner
        if laplace.std() < c.min_sharpness:
            raise Rejected(
                "blurred",
                f"the deviation of the face's Laplacian is {laplace.std():.2f}; wanted {c.min_sharpness:g} "
                "(min_sharpness)",
            )

    def _features(self, small: Image.Image, face: Face) -> dict[str, Tensor]:
        if self.provider is None:
            return {}
        try:
            found = dict(self.provider.features(small, face))
            if self.config.flip:
                other = self.provider.features(small.transpose(Image.Transpose.FLIP_LEFT_RIGHT), mirrored(face, small))
                found |= {f"flipped.{k}": v for k, v in other.items()}
        except InputError as e:
            raise Rejected("no features", str(e)) from e
        bad = [k for k, v in found.items() if not bool(torch.isfinite(v).all())]
        if bad:
            raise Rejected("no features", f"{self.provider.name} gave NaN or infinity in {', '.join(bad)}")
        dtype = torch.float16 if self.config.half else torch.float32
        found = {k: v.detach().cpu().to(dtype).contiguous() for k, v in found.items()}
        if not all(bool(torch.isfinite(v).all()) for v in found.values()):
            raise Rejected("no features", "they do not fit into float16; prepare with half = false")
        return found


def mirrored(face: Face, picture: Image.Image) -> Face:
    """The same face in the mirrored picture."""
    x = picture.width - 1
    box = np.array([x - face.box[2], face.box[1], x - face.box[0], face.box[3]], np.float32)
    points = face.points[_MIRRORED] * (-1, 1) + (x, 0)
    return Face(box, face.score, points.astype(np.float32), face.image_size)


def pixel_hash(picture: Image.Image) -> str:
    """Of the decoded picture: the same for a copy that was stored losslessly otherwise. 128 bits."""
    digest = hashlib.blake2b(f"{picture.size}".encode(), digest_size=16)
    digest.update(picture.tobytes())
    return digest.hexdigest()


def looks(picture: Image.Image) -> str:
    """256 bits: whether the grey picture, at 17x16 pixels, gets lighter to the right."""
    grey = np.asarray(picture.convert("L").resize((17, 16), Image.Resampling.BOX), np.int16)
    return np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes().hex()


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(v), 3) for v in values]
