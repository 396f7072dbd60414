"""MTCNN face detection on ONNX Runtime, with numpy and PIL alone.

Zhang et al., "Joint Face Detection and Alignment using Multi-task Cascaded Convolutional Networks", 2016: a
small fully convolutional network (P) proposes boxes on a pyramid of scales, two further ones (R, O) refuse or
refine them, and the last also gives five landmarks. The weights were trained in a framework that stores
pictures column by column, so every network here takes its picture transposed (width before height).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from idcore.encoders.face import Face, largest_first
from idcore.encoders.onnx_runtime import OnnxModel, Providers, asset
from idcore.errors import InputError

# P-Net's receptive field and stride.
_CELL, _STRIDE = 12, 2
# Pyramid step of the paper's code: the area of each level is about half of the one before.
_STEP = 0.709
# Our choice: a bound on the work that a busy picture can cause.
_MAX_CANDIDATES = 600
_BATCH = 128


def _normalise(pixels: np.ndarray) -> np.ndarray:
    return (pixels.astype(np.float32) - 127.5) * (1 / 128)


def suppress(boxes: np.ndarray, scores: np.ndarray, threshold: float, over_smaller: bool = False) -> np.ndarray:
    """Indices of the boxes that stay after non-maximum suppression, best score first.

    Args:
        boxes: [N,4] x1 y1 x2 y2 in pixels, both ends inside.
        scores: [N].
        threshold: overlap above which the weaker of two boxes goes.
        over_smaller: measure the overlap against the smaller box instead of the union.
    """
    if len(boxes) == 0:
        return np.zeros(0, np.int64)
    low, high = boxes[:, :2], boxes[:, 2:]
    areas = np.prod(np.maximum(high - low + 1, 0), axis=1)
    order = np.argsort(-scores, kind="stable")
    kept = []
    while len(order):
        best, rest = order[0], order[1:]
        kept.append(best)
        sides = np.minimum(high[best], high[rest]) - np.maximum(low[best], low[rest]) + 1
        shared = np.prod(np.maximum(sides, 0), axis=1)
        base = np.minimum(areas[best], areas[rest]) if over_smaller else areas[best] + areas[rest] - shared
        order = rest[shared <= threshold * np.maximum(base, 1e-9)]
    return np.array(kept, np.int64)


def _square(boxes: np.ndarray) -> np.ndarray:
    """The squares around the centres of ``boxes`` with their longer sides."""
    side = np.maximum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])[:, None]
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    return np.hstack([middle - side / 2, middle + side / 2])


def _shift(boxes: np.ndarray, offsets: np.ndarray, extra: float) -> np.ndarray:
    """``boxes`` moved by the network's offsets, which count in box sides."""
    sides = boxes[:, 2:] - boxes[:, :2] + extra
    return boxes + offsets * np.hstack([sides, sides])


class Mtcnn:
    """Finds upright faces and their five landmarks. Threads may share one object.

    Attributes:
        provider: the ONNX Runtime provider that runs the networks.
    """

    def __init__(
        self,
        providers: Providers = "auto",
        *,
        min_size: int = 24,
        thresholds: tuple[float, float, float] = (0.6, 0.7, 0.9),
        max_side: int = 1000,
        threads: int | None = None,
        folder: str | Path | None = None,
    ):
        """Loads the three networks.

        Args:
            providers: see ``OnnxModel``.
            min_size: smallest face side in pixels to look for (at least 12, what P-Net sees; 24 is our choice).
            thresholds: confidences that P, R and O want (0.6 and 0.7 as in the paper's code; 0.9 is our choice:
                averaged over a patch and its mirror image, faces reach 0.99 and chance patches stay below 0.88;
                drawn faces want 0.8).
            max_side: longest side in pixels of the finest pyramid level (our choice). It bounds the work: on a
                picture with a longer side L, faces below ``12 * L / max_side`` pixels are not looked for.
            threads: threads within an operator.
            folder: where pnet.onnx, rnet.onnx and onet.onnx are; by default the shipped ones, checked by hash.
        """
        if min_size < _CELL:
            raise InputError(f"min_size must be at least {_CELL} pixels (what the network sees), got {min_size}.")
        if max_side < _CELL:
            raise InputError(f"max_side must be at least {_CELL} pixels, got {max_side}.")
        if len(thresholds) != 3 or not all(0 < value < 1 for value in thresholds):
            raise InputError(f"Three thresholds between 0 and 1 are wanted, got {thresholds}.")
        self.min_size, self.thresholds, self.max_side = min_size, tuple(thresholds), max_side
        names = ("pnet.onnx", "rnet.onnx", "onet.onnx")
        paths = [Path(folder) / name if folder else asset(name) for name in names]
        self._p, self._r, self._o = (OnnxModel(path, providers, threads) for path in paths)
        self.provider, self.reason = self._p.provider, self._p.reason

    def scales(self, width: int, height: int) -> list[float]:
        """The pyramid's scales, finest first; empty where no face of ``min_size`` fits into the picture."""
        scale = min(_CELL / self.min_size, self.max_side / max(width, height))
        found = []
        while min(width, height) * scale >= _CELL:
            found.append(scale)
            scale *= _STEP
        return found

    def detect(self, image: Image.Image) -> list[Face]:
        """The faces in an RGB picture, largest first. A picture too small for a face gives none."""
        boxes, scores = self._propose(image)
        if not len(boxes):
            return []
        offsets, scores_r = self._refine(self._r, image, boxes, 24)
        stays = scores_r > self.thresholds[1]
        boxes, offsets, scores = boxes[stays], offsets[stays], scores_r[stays]
        kept = suppress(boxes, scores, 0.7)
        boxes = _square(_shift(boxes[kept], offsets[kept], 1))
        if not len(boxes):
            return []
        offsets, points, scores = self._confirm(image, boxes)
        stays = scores > self.thresholds[2]
        boxes, offsets, points, scores = boxes[stays], offsets[stays], points[stays], scores[stays]
        # Landmarks are fractions of the box, whose first pixel begins half a pixel before its centre.
        sides = (boxes[:, 2:] - boxes[:, :2] + 1)[:, None]
        points = boxes[:, None, :2] + points * sides - 0.5
        boxes = _shift(boxes, offsets, 1)
        faces = [
            Face(boxes[i].astype(np.float32), float(scores[i]), points[i].astype(np.float32), image.size)
            for i in suppress(boxes, scores, 0.7, over_smaller=True)
        ]
        return largest_first(faces)

    def _propose(self, image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
        """Square candidate boxes [N,4] and their scores from P-Net over all scales."""
        boxes, offsets, scores = [], [], []
        for scale in self.scales(*image.size):
            size = tuple(int(np.ceil(side * scale)) for side in image.size)
            # A gap of 3 averages whole pixels first where much is shrunk: faster, and no difference to the eye.
            level = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=3.0)
            pixels = _normalise(np.asarray(level))
            moves, faceness = self._p.run({self._p.inputs[0]: pixels.transpose(1, 0, 2)[None]})
            column, row = np.nonzero(faceness[0, :, :, 1] >= self.thresholds[0])
            corner = np.stack([column, row], 1) * _STRIDE
            found = np.hstack([corner + 1, corner + _CELL]) / scale
            score = faceness[0, column, row, 1]
            kept = suppress(found, score, 0.5)
            boxes.append(found[kept])
            offsets.append(moves[0, column, row][kept])
            scores.append(score[kept])
        if not boxes:
            return np.zeros((0, 4)), np.zeros(0)
        all_boxes, all_scores = np.vstack(boxes), np.concatenate(scores)
        kept = suppress(all_boxes, all_scores, 0.7)[:_MAX_CANDIDATES]
        return _square(_shift(all_boxes[kept], np.vstack(offsets)[kept], 0)), all_scores[kept]

    def _confirm(self, image: Image.Image, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """O-Net's offsets [N,4], landmarks [N,5,2] (fractions of the box) and confidences [N].

        Each box is read as it is and mirrored, and the two answers are averaged (our choice). A face looks like
        a face both ways; patches that only chance to pass do not, and the landmarks get steadier.
        """
        both = []
        for mirror in (False, True):
            offsets, raw, scores = self._refine(self._o, image, boxes, 48, mirror)
            points = raw.reshape(-1, 2, 5).transpose(0, 2, 1)  # five x first, then five y
            if mirror:
                points = points[:, [1, 0, 2, 4, 3]] * (-1, 1) + (1, 0)
                offsets = offsets[:, [2, 1, 0, 3]] * (-1, 1, -1, 1)
            both.append((offsets, points, scores))
        offsets, points, scores = (np.mean(pair, axis=0) for pair in zip(*both, strict=True))
        return offsets, points, scores

    def _refine(
        self, model: OnnxModel, image: Image.Image, boxes: np.ndarray, size: int, mirror: bool = False
    ) -> list[np.ndarray]:
        """A refining network's outputs for the boxes: offsets, landmarks (O-Net only), confidences."""
        parts = []
        for start in range(0, len(boxes), _BATCH):
            chips = [self._crop(image, box, size) for box in boxes[start : start + _BATCH]]
            batch = _normalise(np.stack(chips)).transpose(0, 2, 1, 3)
            batch = batch[:, ::-1] if mirror else batch
            parts.append(model.run({model.inputs[0]: np.ascontiguousarray(batch)}))
        *rest, faceness = (np.concatenate(column) for column in zip(*parts, strict=True))
        return [*rest, faceness[:, 1]]

    @staticmethod
    def _crop(image: Image.Image, box: np.ndarray, size: int) -> np.ndarray:
        """The box as size x size pixels; what lies outside of the picture is black, not cut away."""
        left, top, right, bottom = (int(value) for value in np.round(box))
        # Both ends are inside, and a degenerate box still gives one pixel.
        area = (left, top, max(left, right) + 1, max(top, bottom) + 1)
        return np.asarray(image.crop(area).resize((size, size), Image.Resampling.BILINEAR))
