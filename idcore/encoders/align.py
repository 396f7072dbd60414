"""Five-point alignment: the similarity transform from landmarks to a template, and the warp to a chip.

Points are in pixels with (0, 0) in the centre of the top left pixel, x before y, ordered: left eye, right
eye, nose tip, left mouth corner, right mouth corner (left as seen in the picture).
"""

from __future__ import annotations

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
TEMPLATES = {"dlib": 150, "arcface": 112, "ffhq": 512}
DLIB_PADDING = 0.25


def template(name: str, size: int | None = None, padding: float = DLIB_PADDING) -> np.ndarray:
    """The five wanted points [5,2] float64 of a square chip.

    Args:
        name: "dlib" (average face and ``padding`` of its size on each side), "arcface" or "ffhq".
        size: side of the chip in pixels; by default 150, 112 and 512. The points scale with it.
        padding: for "dlib" only; 0.25 is what its recogniser was trained on, more shows more of the head.
    """
    if name not in TEMPLATES:
        raise InputError(f"Unknown alignment template {name!r}: wanted one of {', '.join(TEMPLATES)}.")
    size = TEMPLATES[name] if size is None else size
    if size < 1:
        raise InputError(f"The chip's size must be at least 1 pixel, got {size}.")
    if name == "dlib":
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
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    matrix = np.asarray(matrix, np.float64)
    scale = float(np.hypot(matrix[0, 0], matrix[1, 0]))
    if not np.isfinite(scale) or scale <= 0:
        raise InputError(f"The alignment has no usable scale ({scale}); the landmarks are degenerate.")
    # Averaging k x k pixels and sampling 2 points per chip pixel keeps both steps within what they resolve.
    oversample = 2 if scale < 1 else 1
    shrink = max(1, int(1 / (scale * oversample)))
    # PIL counts from the corner of the first pixel, the points here from its centre: half a pixel apart.
    to_corner = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    chip_to_image = np.linalg.inv(to_corner @ np.vstack([matrix, [0, 0, 1]]) @ np.linalg.inv(to_corner))
    chip_to_image = chip_to_image @ np.diag([1 / oversample, 1 / oversample, 1])
    if shrink > 1:
        # reduce() gives the last row and column the average of what is there, so the corner stays in place.
        picture = picture.reduce(shrink)
        chip_to_image = np.diag([1 / shrink, 1 / shrink, 1]) @ chip_to_image
    side = size * oversample
    chip = picture.transform(
        (side, side), Image.Transform.AFFINE, tuple(chip_to_image[:2].ravel()), Image.Resampling.BICUBIC,
        fillcolor=fill,
    )  # fmt: skip
    return np.asarray(chip if oversample == 1 else chip.reduce(oversample))


def warp_bilinear(
    image: np.ndarray, matrix: np.ndarray, size: int, fill: tuple[int, int, int] = (0, 0, 0)
) -> np.ndarray:
    """Chip [size,size,3] uint8, bilinear without averaging, ``fill`` outside and blended in at the edge.

    What InsightFace and facexlib cut chips with, so networks trained behind them expect it; `warp`, which does not
    alias, would be another input to them.

    Args:
        image: [H,W,3] uint8.
        matrix: [2,3], image pixels to chip pixels, (0, 0) in the centre of the first pixel.
        size: Side of the chip in pixels.
        fill: Colour outside of the image, 0..255.
    """
    h, w, _ = image.shape
    back = invert(matrix)
    xs, ys = np.meshgrid(np.arange(size, dtype=np.float64), np.arange(size, dtype=np.float64))
    x = back[0, 0] * xs + back[0, 1] * ys + back[0, 2]
    y = back[1, 0] * xs + back[1, 1] * ys + back[1, 2]
    x, y = np.clip(x, -1, w), np.clip(y, -1, h)  # one pixel of border is all that blends
    x0, y0 = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    fx, fy = (x - x0)[..., None], (y - y0)[..., None]
    # two pixels of border on the far side: where x lies exactly on w, its neighbour w + 1 is read with weight 0
    pad = np.empty((h + 3, w + 3, 3), np.float64)
    pad[:] = fill
    pad[1 : h + 1, 1 : w + 1] = image
    top = pad[y0 + 1, x0 + 1] * (1 - fx) + pad[y0 + 1, x0 + 2] * fx
    bottom = pad[y0 + 2, x0 + 1] * (1 - fx) + pad[y0 + 2, x0 + 2] * fx
    return np.rint(top * (1 - fy) + bottom * fy).clip(0, 255).astype(np.uint8)


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
    return warp_bilinear(np.asarray(image), matrix, side, fill) if plain else warp(image, matrix, side, fill)


def warp_batch(images: Tensor, matrices: Tensor, size: int) -> Tensor:
    """Differentiable ``warp`` for training: bilinear, zeros outside.

    Args:
        images: [N,3,H,W] float.
        matrices: [N,2,3] float, image pixels to chip pixels as ``similarity_transform`` gives them.
        size: side S of the chips.

    Returns:
        [N,3,S,S] in the dtype of ``images``. There is no averaging, so keep chips no smaller than the face.
    """
    import torch
    import torch.nn.functional as F

    count, _, height, width = images.shape
    matrices = matrices.to(images.device, torch.float64)
    linear, shift = matrices[:, :, :2], matrices[:, :, 2]
    back = torch.linalg.inv(linear)
    axis = torch.arange(size, device=images.device, dtype=torch.float64)
    ys, xs = torch.meshgrid(axis, axis, indexing="ij")
    grid = torch.stack([xs, ys], -1).reshape(1, -1, 2) - shift[:, None]
    grid = (grid @ back.mT).reshape(count, size, size, 2)
    # grid_sample with align_corners=False: -1 and 1 are the outer edges of the first and last pixels.
    extent = torch.tensor([width, height], device=images.device, dtype=torch.float64)
    grid = (2 * grid + 1) / extent - 1
    return F.grid_sample(images, grid.to(images.dtype), mode="bilinear", padding_mode="zeros", align_corners=False)
