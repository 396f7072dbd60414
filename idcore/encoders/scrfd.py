"""SCRFD detection and ArcFace recognition from a folder of ONNX models, straight on ONNX Runtime.

Reads the folders in which InsightFace's models come (antelopev2: scrfd_10g_bnkps.onnx and glintr100.onnx;
buffalo_l: det_10g.onnx and w600k_r50.onnx), also where the folder lies once more inside itself, as the archives
often unpack. The models are told apart by the shapes of their inputs and outputs. They are not shipped; their
makers allow non-commercial research only.
SCRFD: Guo et al., "Sample and Computation Redistribution for Efficient Face Detection", ICLR 2022.
ArcFace: Deng et al., CVPR 2019.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from idcore.encoders.face import Face, largest_first
from idcore.encoders.mtcnn import suppress
from idcore.encoders.onnx_file import OnnxSignature, read_signature
from idcore.encoders.onnx_runtime import OnnxModel, Providers
from idcore.errors import InputError, WeightsError

STRIDES = (8, 16, 32)
_ANCHORS = 2
# Which file to take where a folder holds several of a kind, best first.
_KNOWN = {
    "detector": ("scrfd_10g_bnkps", "det_10g", "det_2.5g", "scrfd_2.5g_bnkps", "det_500m", "scrfd_500m_bnkps"),
    "recogniser": ("glintr100", "w600k_r50", "w600k_mbf"),
}
_WANTED = {
    "detector": "an SCRFD detector with landmarks (input [1,3,H,W], nine outputs: 3 x scores, boxes, landmarks)",
    "recogniser": "an ArcFace recogniser (input [N,3,112,112], one output [N,E] with E of at least 128)",
}


def kind_of(signature: OnnxSignature) -> str | None:
    """ "detector", "recogniser" or None, told from the shapes of a model's inputs and outputs."""
    if len(signature.inputs) != 1:
        return None
    (shape,) = signature.inputs.values()
    outputs = list(signature.outputs.values())
    if len(shape) != 4 or shape[1] not in (3, None):
        return None
    if len(outputs) == 9:
        widths = sorted(output[-1] or 0 for output in outputs if output)
        return "detector" if widths in ([1] * 3 + [4] * 3 + [10] * 3, [0] * 9) else None
    if shape[2:] == (112, 112) and len(outputs) == 1 and outputs[0]:
        return "recogniser" if len(outputs[0]) == 2 and (outputs[0][-1] or 512) >= 128 else None
    return None


def find_models(folder: str | Path) -> dict[str, Path]:
    """The detector's and the recogniser's file in ``folder`` or up to two folders below it.

    Raises ``WeightsError`` where the folder is missing or lacks one of the two (the message lists what it
    holds), ``InputError`` where there are several of a kind and none has a known name.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise WeightsError(
            f"{folder} is {'a file' if folder.exists() else 'not there'}; wanted a folder with SCRFD and ArcFace "
            "models, such as antelopev2 or buffalo_l from InsightFace's model zoo. Check the path."
        )
    files = sorted(path for pattern in ("*.onnx", "*/*.onnx", "*/*/*.onnx") for path in folder.glob(pattern))
    kinds: dict[str, list[Path]] = {kind: [] for kind in _KNOWN}
    seen = []
    for path in files:
        signature = read_signature(path)
        kind = kind_of(signature)
        seen.append(f"{path.relative_to(folder)} ({kind or 'neither'})")
        if kind:
            kinds[kind].append(path)
    found = {}
    for kind, candidates in kinds.items():
        if not candidates:
            raise WeightsError(
                f"{folder} holds no {kind}: wanted {_WANTED[kind]}. It holds: {', '.join(seen) or 'no .onnx file'}. "
                "Unpack the whole antelopev2 or buffalo_l archive there."
            )
        found[kind] = _preferred(kind, candidates)
    return found


def _preferred(kind: str, candidates: list[Path]) -> Path:
    if len(candidates) == 1:
        return candidates[0]
    for name in _KNOWN[kind]:
        named = [path for path in candidates if path.stem == name]
        if named:  # a folder nested in itself may hold the file twice; the outer one comes first
            return named[0]
    raise InputError(
        f"There are several files that could be the {kind}: {', '.join(map(str, candidates))}. Keep one in the "
        "folder, or name it as InsightFace does."
    )


class Scrfd:
    """SCRFD with landmarks: finds faces on a square letterbox of the picture.

    Attributes:
        provider: the ONNX Runtime provider that runs it.
        size: side of the letterbox in pixels.
    """

    def __init__(
        self,
        path: str | Path,
        providers: Providers = "auto",
        *,
        size: int = 640,
        threshold: float = 0.5,
        overlap: float = 0.4,
        threads: int | None = None,
    ):
        """Loads the model at ``path``.

        Args:
            path: model with nine outputs.
            providers: see ``OnnxModel``.
            size: side of the letterbox, a multiple of 32; 640 is what the models were made for. A model with a
                fixed input size overrules it.
            threshold: confidence that a face needs (0.5 as in InsightFace).
            overlap: overlap from which the weaker of two boxes goes (0.4 as in InsightFace).
            threads: threads within an operator.
        """
        self._model = OnnxModel(path, providers, threads)
        self.provider, self.reason = self._model.provider, self._model.reason
        if len(self._model.outputs) != 9:
            raise WeightsError(f"{path} has {len(self._model.outputs)} outputs; wanted {_WANTED['detector']}.")
        height, width = self._model.shapes[0][2:]
        if isinstance(height, int) and isinstance(width, int) and height > 0:
            if height != width:
                raise WeightsError(f"{path} wants {width}x{height} pixels; only square inputs are supported.")
            size = height
        if size < 32 or size % 32:
            raise InputError(f"size must be a positive multiple of 32 pixels, got {size}.")
        if not 0 < threshold < 1 or not 0 < overlap < 1:
            raise InputError(f"threshold and overlap lie between 0 and 1, got {threshold} and {overlap}.")
        self.size, self.threshold, self.overlap = size, threshold, overlap

    def letterbox(self, image: Image.Image) -> tuple[np.ndarray, float, float]:
        """Pixels [1,3,size,size] float32 of the picture in the top left corner, and its two scales (x, y)."""
        width, height = image.size
        scale = self.size / max(width, height)
        fitted = (max(1, int(width * scale)), max(1, int(height * scale)))
        canvas = Image.new("RGB", (self.size, self.size))
        canvas.paste(image.resize(fitted, Image.Resampling.BILINEAR))
        pixels = (np.asarray(canvas, np.float32) - 127.5) / 128.0
        planes = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])
        return planes, fitted[0] / width, fitted[1] / height

    def detect(self, image: Image.Image) -> list[Face]:
        """The faces in an RGB picture, largest first."""
        planes, scale_x, scale_y = self.letterbox(image)
        outputs = self._model.run({self._model.inputs[0]: planes})
        boxes, points, scores = self._decode(outputs)
        scales = np.array([scale_x, scale_y])
        boxes = (boxes.reshape(-1, 2, 2) / scales).reshape(-1, 4)
        points = points / scales
        faces = [
            Face(boxes[i].astype(np.float32), float(scores[i]), points[i].astype(np.float32), image.size)
            for i in suppress(boxes, scores, self.overlap)
        ]
        return largest_first(faces)

    def _decode(self, outputs: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Boxes [N,4], landmarks [N,5,2] and scores [N] above the threshold, in letterbox pixels.

        Each output is a table with one row per anchor, two anchors per cell; its width says what it is (1 score,
        4 box, 10 landmarks) and its length which stride. Distances count in strides from the cell's corner.
        """
        tables: dict[int, dict[int, np.ndarray]] = {1: {}, 4: {}, 10: {}}
        for output in outputs:
            table = output.reshape(-1, output.shape[-1])
            tables.get(table.shape[1], {})[len(table)] = table
        boxes, points, scores = [], [], []
        for stride in STRIDES:
            cells = self.size // stride
            rows = cells * cells * _ANCHORS
            if any(rows not in kind for kind in tables.values()):
                shapes = [list(output.shape) for output in outputs]
                raise WeightsError(
                    f"{self._model.path.name} gave outputs {shapes} for a {self.size} px input; SCRFD with landmarks "
                    f"gives {rows} rows of 1, 4 and 10 numbers at stride {stride}. Use another detector."
                )
            score = tables[1][rows][:, 0]
            stays = np.flatnonzero(score >= self.threshold)
            cell = stays // _ANCHORS
            corner = np.stack([cell % cells, cell // cells], 1) * float(stride)
            reach = tables[4][rows][stays] * stride
            boxes.append(np.hstack([corner - reach[:, :2], corner + reach[:, 2:]]))
            points.append(corner[:, None] + tables[10][rows][stays].reshape(-1, 5, 2) * stride)
            scores.append(score[stays])
        return np.concatenate(boxes), np.concatenate(points), np.concatenate(scores)


class ArcFace:
    """An ArcFace recogniser: aligned 112x112 chips in, embeddings out. Threads may share one object.

    Attributes:
        provider: the ONNX Runtime provider that runs it.
        size: side of the chips, 112.
        length: numbers per embedding (512 in InsightFace's models), None where the model does not say.
    """

    def __init__(self, path: str | Path, providers: Providers = "auto", *, threads: int | None = None):
        signature = read_signature(path)
        if kind_of(signature) != "recogniser":
            raise WeightsError(
                f"{path} takes {list(signature.inputs.values())} and gives {list(signature.outputs.values())}; "
                f"wanted {_WANTED['recogniser']}."
            )
        self._model = OnnxModel(path, providers, threads)
        self.provider, self.reason, self.size = self._model.provider, self._model.reason, 112
        (output,) = signature.outputs.values()
        self.length = output[-1]
        batch = next(iter(signature.inputs.values()))[0]
        self._one_by_one = batch == 1
        # Models exported from MXNet bring their own (x - 127.5) / 127.5 as the first two operators.
        self._inside = {"Sub", "Mul"} <= set(signature.operators)

    def embed(self, chips: np.ndarray) -> np.ndarray:
        """Embeddings [N,E] float32 (not unit-norm) of uint8 RGB chips [N,112,112,3]."""
        chips = np.asarray(chips)
        if chips.ndim != 4 or chips.shape[1:] != (112, 112, 3) or chips.dtype != np.uint8 or not len(chips):
            raise InputError(
                f"Aligned chips must be uint8 RGB [N,112,112,3] with N >= 1, got {chips.dtype} {list(chips.shape)}. "
                "Cut them with idcore.encoders.align.align(image, points, 'arcface')."
            )
        planes = chips.transpose(0, 3, 1, 2).astype(np.float32)
        if not self._inside:
            planes = (planes - 127.5) / 127.5
        step = 1 if self._one_by_one else 32
        name = self._model.inputs[0]
        parts = [self._model.run({name: planes[i : i + step]})[0] for i in range(0, len(planes), step)]
        return np.concatenate(parts)
