"""Five-point alignment: the similarity transform from landmarks to a template, and the warp to a chip.

Points are in pixels with (0, 0) in the centre of the top left pixel, x before y, ordered: left eye, right
eye, nose tip, left mouth corner, right mouth corner (left as seen in the picture).
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from idcore.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

# Where the five points lie in the unit square around dlib's average face, from its 68-point average shape:
# the mean of each eye's six points, halfway between the nose's tip and base, the mouth corners as they are.
_DLIB_MEAN_FACE = (
    (0.22549183, 0.21599033),
    (0.75476133, 0.21599033),
    (0.49012700, 0.57186550),
    (0.25414900, 0.78023300),
    (0.72610400, 0.78023300),
)
# ArcFace's 112x112 reference points (Deng et al., CVPR 2019, and every InsightFace model since).
_ARCFACE_112 = (
    (38.2946, 51.6963),
    (73.5318, 51.5014),
    (56.0252, 71.7366),
    (41.5493, 92.3655),
    (70.7299, 92.2041),
)
# FFHQ-style 512x512 reference points (face restoration and parsing networks; PuLID's parsing branch).
_FFHQ_512 = (
    (192.98138, 239.94708),
    (318.90277, 240.19360),
    (256.63416, 314.01935),
    (201.26117, 371.41043),
    (313.08905, 371.15118),
)
TEMPLATES = {"dlib": 150, "arcface": 112, "ffhq": 512, "head": 96}
DLIB_PADDING = 0.25
HEAD_PADDING = 0.6  # dlib's average face with the whole head around it (our choice)


def template(name: str, size: int | None = None, padding: float = DLIB_PADDING) -> np.ndarray:
    """The five wanted points [5,2] float64 of a square chip.

    Args:
        name: "dlib" (average face and ``padding`` of its size on each side), "arcface", "ffhq", or "head" ("dlib" with
            0.6 of padding: hair and all).
        size: side of the chip in pixels; by default 150, 112, 512 and 96. The points scale with it.
        padding: for "dlib" only; 0.25 is what its recogniser was trained on, more shows more of the head.
    """
    if name not in TEMPLATES:
        raise InputError(f"Unknown alignment template {name!r}: wanted one of {', '.join(TEMPLATES)}.")
    size = TEMPLATES[name] if size is None else size
    if size < 1:
        raise InputError(f"The chip's size must be at least 1 pixel, got {size}.")
    if name in ("dlib", "head"):
        padding = HEAD_PADDING if name == "head" else padding
        if padding <= -0.5:
            raise InputError(f"padding must be above -0.5 (nothing is left of the chip there), got {padding}.")
        return (np.array(_DLIB_MEAN_FACE) + padding) / (1 + 2 * padding) * size
    points = np.array(_ARCFACE_112 if name == "arcface" else _FFHQ_512)
    return points * (size / TEMPLATES[name])


def similarity_transform(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The rotation, uniform scale and shift [2,3] that best takes ``source`` [P,2] to ``target`` [P,2].

    Least squares without reflection. With points as complex numbers this is one complex factor and one shift:
    t = a s + b, a = sum(conj(s - mean s) (t - mean t)) / sum |s - mean s|^2 (the same as Umeyama, PAMI 1991,
    where no reflection is called for). Raises ``InputError`` for wrong shapes or points that all coincide.
    """
    source, target = np.asarray(source, np.float64), np.asarray(target, np.float64)
    if source.shape != target.shape or source.ndim != 2 or source.shape[1] != 2 or len(source) < 2:
        raise InputError(f"Two sets of points [P,2] with P >= 2 are wanted, got {source.shape} and {target.shape}.")
    if not (np.isfinite(source).all() and np.isfinite(target).all()):
        raise InputError("Landmarks must be finite numbers; some are NaN or infinite.")
    s, t = source @ (1, 1j), target @ (1, 1j)
    spread = s - s.mean()
    power = float(np.vdot(spread, spread).real)
    if power < 1e-12:
        raise InputError("The landmarks all lie on one point, so no alignment follows from them.")
    a = np.vdot(spread, t - t.mean()) / power
    b = t.mean() - a * s.mean()
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def invert(matrix: np.ndarray) -> np.ndarray:
    """The inverse [2,3] of an affine transform [2,3]."""
    full = np.vstack([np.asarray(matrix, np.float64), [0, 0, 1]])
    return np.linalg.inv(full)[:2]


def transform_points(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Points [P,2] moved by an affine transform [2,3]."""
    matrix = np.asarray(matrix, np.float64)
    return np.asarray(points, np.float64) @ matrix[:, :2].T + matrix[:, 2]


def warp(
    image: np.ndarray | Image.Image, matrix: np.ndarray, size: int, fill: tuple[int, int, int] = (0, 0, 0)
) -> np.ndarray:
    """The chip [size,size,3] uint8 that ``matrix`` [2,3] (image pixels to chip pixels) cuts out of ``image``.

    Bicubic, and averaged first where the image is much larger than the chip, so that nothing aliases. What
    lies outside of the image gets the colour ``fill``.
    """
    return _cut(image, matrix, size, fill, "bicubic")


def warp_bilinear(
    image: np.ndarray | Image.Image, matrix: np.ndarray, size: int, fill: tuple[int, int, int] = (0, 0, 0)
) -> np.ndarray:
    """Chip [size,size,3] uint8, bilinear without averaging, ``fill`` outside and blended in at the edge.

    What InsightFace and facexlib cut chips with, so networks trained behind them expect it; `warp`, which does not
    alias, would be another input to them.

    Args:
        image: [H,W,3] uint8, or a picture.
        matrix: [2,3], image pixels to chip pixels, (0, 0) in the centre of the first pixel.
        size: Side of the chip in pixels.
        fill: Colour outside of the image, 0..255.
    """
    return _cut(image, matrix, size, fill, "bilinear")


def _cut(
    image: np.ndarray | Image.Image, matrix: np.ndarray, size: int, fill: tuple[int, int, int], resample: str
) -> np.ndarray:
    """One chip by `idcore.ops.align_face`."""
    from idcore.ops import align_face

    matrix = np.asarray(matrix, np.float64)
    if isinstance(image, Image.Image):
        image, matrix = _around(image, matrix, size)
    return align_face(image, matrix, size, resample=resample, fill=fill, layout="nhwc")[0].numpy()


def _around(image: Image.Image, matrix: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The part of a picture that a chip is made of, and the matrix for it: the same chip, fewer pixels unpacked."""
    if image.mode != "RGB":
        image = image.convert("RGB")
    scale = float(np.hypot(matrix[0, 0], matrix[1, 0]))
    if not np.isfinite(matrix).all() or scale <= 0 or abs(np.linalg.det(matrix[:, :2])) < 1e-100:
        return np.asarray(image), matrix  # the op says what is wrong
    # In blocks that `align_face` averages over, so that the crop begins with a whole one; it reads two more around.
    block = max(1, int(min(0.5 / scale, max(image.size))))
    corners = transform_points([(-1, -1), (size, -1), (-1, size), (size, size)], invert(matrix))
    low = np.floor((corners.min(0) - 1) / block - 3).clip(0, 1e9) * block
    high = np.minimum(np.ceil((corners.max(0) + 1) / block + 4).clip(0, 1e9) * block, image.size)
    if (low >= high).any():
        return np.asarray(image), matrix  # the chip lies outside of the picture
    (x0, y0), (x1, y1) = low.astype(int).tolist(), high.astype(int).tolist()
    matrix = np.column_stack([matrix[:, :2], matrix[:, 2] + matrix[:, :2] @ (x0, y0)])
    return _unpacked(image, x0, y0, x1, y1), matrix


_memory = threading.local()
_KEPT = 1 << 25  # bytes that a thread keeps from face to face: fresh pages cost more than the copy (our choice)
_BAND = 1 << 18  # bytes that PIL hands out at once


def _unpacked(image: Image.Image, x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    """Pixels [y1-y0,x1-x0,3] of a part of an RGB picture, a view that is valid until this thread's next call."""
    height, width = y1 - y0, x1 - x0
    pixels = getattr(_memory, "pixels", None)
    if pixels is None or pixels.size < height * width * 4:
        pixels = np.empty(height * width * 4, np.uint8)
        _memory.pixels = pixels if pixels.size <= _KEPT else None
    # PIL keeps four bytes a pixel and hands them out as they are faster than it packs three.
    part = pixels[: height * width * 4].reshape(height, width, 4)
    rows = max(1, _BAND // (width * 4))
    for y in range(0, height, rows):
        band = image.crop((x0, y0 + y, x1, min(y0 + y + rows, y1))).tobytes("raw", "RGBX")
        part[y : y + rows].reshape(-1)[:] = np.frombuffer(band, np.uint8)
    return part[..., :3]


def align(
    image: np.ndarray | Image.Image,
    points: np.ndarray,
    name: str = "dlib",
    size: int | None = None,
    padding: float = DLIB_PADDING,
    fill: tuple[int, int, int] = (0, 0, 0),
    plain: bool = False,
) -> np.ndarray:
    """The aligned chip [S,S,3] uint8 of the face with landmarks ``points`` [5,2] in an RGB ``image``.

    ``plain``: sample with `warp_bilinear`, as the published ArcFace chain does, in place of `warp`.
    """
    wanted = template(name, size, padding)
    matrix = similarity_transform(points, wanted)
    side = TEMPLATES[name] if size is None else size
    return (warp_bilinear if plain else warp)(image, matrix, side, fill)


def warp_batch(images: Tensor, matrices: Tensor | np.ndarray, size: int, resample: str = "bilinear") -> Tensor:
    """Differentiable ``warp`` ("bicubic") or ``warp_bilinear`` of one face per picture, for training.

    The same function as theirs, but for the rounding to whole grey levels.

    Args:
        images: [N,3,H,W] float, grey levels 0..255.
        matrices: [N,2,3] float, image pixels to chip pixels as ``similarity_transform`` gives them.
        size: side S of the chips.
        resample: "bilinear" or "bicubic".

    Returns:
        [N,3,S,S], 0..255, in the dtype of ``images``; black outside of the picture.
    """
    from idcore.ops.align_face import differentiable_chips

    return differentiable_chips(images, matrices, size, resample)
