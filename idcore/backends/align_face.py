"""The backends of `align_face`: the compiled kernels (csrc/align_face.h) and plain PyTorch, which is the truth."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
RESAMPLE = {"bilinear": 0, "bicubic": 1}
MAX_PICTURES = 16
ORDER = ("cuda", "cpu", "reference")

Colour = tuple[float, float, float]


class Faces(NamedTuple):
    """One checked call."""

    pictures: tuple[Tensor | np.ndarray, ...]  # uint8 RGB [H, W, 3], any strides, on one device
    matrices: Tensor  # float64 [F, 2, 3] contiguous, on that device
    picture_of: Tensor | None  # int32 [F] contiguous, on that device; None: the first for all
    out: Tensor  # [F, 3, height, width], any strides: the result is a view of it
    resample: str
    rounded: bool
    bgr: bool
    fill: Colour  # these three red, green, blue, 0..255
    mean: Colour
    std: Colour


def why_not(name: str, device: str, pictures: int) -> list[str]:
    """Reasons why a backend cannot run a call with pictures on `device`."""
    if name == "reference":
        return []
    reasons = [] if device == name else [f"device={device} (runs on {name})"]
    if pictures > MAX_PICTURES:
        reasons.append(f"{pictures} pictures (at most {MAX_PICTURES} a call)")
    module, problem = cpu._load()
    if module is None:
        reasons.append(problem)
    elif not hasattr(module, f"align_face_{name}"):
        reasons.append(f"the compiled module idcore._C holds no align_face for {name}")
    return reasons


@functools.lru_cache(maxsize=64)
def refusals(device: str, pictures: int) -> dict[str, tuple[str, ...]]:
    """Every backend's reasons, in ORDER."""
    return {name: tuple(why_not(name, device, pictures)) for name in ORDER}


def run(name: str, faces: Faces) -> None:
    """Write `faces.out` by the named backend, which has no reason against the call."""
    if name == "reference":
        return _reference(faces)
    module, _ = cpu._load()
    if name == "cpu":
        return module.align_face_cpu(*_tuples(faces))
    with torch.cuda.device(faces.out.device):
        stream = torch.cuda.current_stream(faces.out.device).cuda_stream
        return module.align_face_cuda(*_tuples(faces), stream)


def _picture(p: Tensor | np.ndarray) -> tuple[int, ...]:
    if isinstance(p, Tensor):
        return (p.data_ptr(), p.shape[0], p.shape[1], *p.stride())
    return (p.__array_interface__["data"][0], p.shape[0], p.shape[1], *p.strides)


def _tuples(f: Faces) -> tuple[tuple, ...]:
    """The four tuples of csrc/bind_tuples.h: chip_params."""
    count, _, height, width = f.out.shape
    of = 0 if f.picture_of is None else f.picture_of.data_ptr()
    numbers = (
        count, height, width, RESAMPLE[f.resample], TYPES[f.out.dtype], int(f.rounded), int(f.bgr), of,
        f.matrices.data_ptr(),
    )  # fmt: skip
    pictures = tuple(_picture(p) for p in f.pictures)
    return numbers, pictures, (f.out.data_ptr(), *f.out.stride()), (*f.fill, *f.mean, *f.std)


# -- PyTorch --------------------------------------------------------------------------------------------------


def _reference(f: Faces, real: torch.dtype = torch.float64) -> None:
    """As csrc/align_face.h says, in `real` arithmetic; only the positions are always float64."""
    of = [0] * len(f.out) if f.picture_of is None else f.picture_of.clamp(0, len(f.pictures) - 1).tolist()
    device = f.out.device
    fill, mean, std = (torch.tensor(c, dtype=real, device=device)[:, None, None] for c in (f.fill, f.mean, f.std))
    for chip, matrix, which in zip(f.out, f.matrices.tolist(), of, strict=True):
        source = f.pictures[which]
        source = source if isinstance(source, Tensor) else torch.from_numpy(np.array(source))
        pixels = chip_pixels(source.permute(2, 0, 1).to(real), matrix, chip.shape[1:], f.resample, fill)
        if f.rounded or chip.dtype == torch.uint8:
            pixels = pixels.round()
        if chip.dtype != torch.uint8:
            pixels = (pixels - mean) / std
        chip.copy_(pixels.flip(0) if f.bgr else pixels)


def chip_pixels(picture: Tensor, matrix: list[list[float]], size: torch.Size, resample: str, fill: Tensor) -> Tensor:
    """Pixels [3, height, width] of one chip, 0..255, of a picture [3, H, W]."""
    (a, b, c), (d, e, g) = matrix
    det, squared = a * e - b * d, a * a + d * d
    # comparisons with NaN are false
    if not (0 < det * det < 1e300 and 0 < squared < 1e300 and c - c == 0 and g - g == 0):
        return fill.expand(3, *size)
    back = (e / det, -b / det, (b * g - e * c) / det), (-d / det, a / det, (d * c - a * g) / det)
    over = 2 if resample == "bicubic" and squared < 1 else 1
    shrink = max(1, int(min(0.5 / squared**0.5, 65536))) if over == 2 else 1
    ys, xs = (
        (torch.arange(n * over, dtype=torch.float64, device=picture.device) + 0.5) / over - 0.5 for n in size
    )  # fmt: skip
    # not a number (overflow of a far shift) lies outside
    x, y = ((r[0] * xs[None] + r[1] * ys[:, None] + r[2]).nan_to_num(-1e9) for r in back)
    if resample == "bilinear":
        return _linear(picture, x, y, fill)
    if shrink > 1:
        # a last row or column that is not whole is averaged over what is there
        kernel = [min(shrink, n) for n in picture.shape[1:]]
        picture = F.avg_pool2d(picture[None], kernel, shrink, ceil_mode=True, count_include_pad=False)[0]
        x, y = (x + 0.5) / shrink - 0.5, (y + 0.5) / shrink - 0.5
    return F.avg_pool2d(_cubic(picture, x, y, fill)[None], over)[0]


def _cubic(picture: Tensor, x: Tensor, y: Tensor, fill: Tensor) -> Tensor:
    height, width = picture.shape[1:]
    inside = (x >= -0.5) & (x < width - 0.5) & (y >= -0.5) & (y < height - 0.5)
    ix, iy = x.floor(), y.floor()
    wx, wy = (_cubic_weights((at - low).to(picture.dtype)) for at, low in ((x, ix), (y, iy)))
    total, flat = torch.zeros(3, *x.shape, dtype=picture.dtype, device=picture.device), picture.flatten(1)
    for r in range(4):
        row = (iy + (r - 1)).clamp(0, height - 1).long()
        for t in range(4):
            column = (ix + (t - 1)).clamp(0, width - 1).long()
            total += wy[r] * wx[t] * _at(flat, row * width + column)
    return torch.where(inside, total.clamp(0, 255), fill)


def _at(flat: Tensor, index: Tensor) -> Tensor:
    """Pixels [3, *index.shape] of a flat picture [3, n].

    Unlike indexing's, gather's gradient adds up in one order on a CPU: training resumes bit for bit with many threads.
    """
    return flat.gather(1, index.flatten().expand(len(flat), -1)).unflatten(1, index.shape)


def _cubic_weights(d: Tensor) -> tuple[Tensor, ...]:
    """Cubic convolution (Keys 1981, equation 4) with a = -1, as PIL's transforms have it, at -1, 0, 1, 2."""
    e = 1 - d
    return -d * e * e, 1 + d * d * (d - 2), 1 + e * e * (e - 2), -e * d * d


def _linear(picture: Tensor, x: Tensor, y: Tensor, fill: Tensor) -> Tensor:
    height, width = picture.shape[1:]
    x, y = x.clamp(-1, width), y.clamp(-1, height)  # one pixel around the picture is all that blends
    ix, iy = x.floor(), y.floor()
    fx, fy = (x - ix).to(picture.dtype), (y - iy).to(picture.dtype)
    flat = picture.flatten(1)

    def at(row: Tensor, column: Tensor) -> Tensor:
        there = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        return torch.where(
            there, _at(flat, row.clamp(0, height - 1).long() * width + column.clamp(0, width - 1).long()), fill
        )

    top = at(iy, ix) * (1 - fx) + at(iy, ix + 1) * fx
    bottom = at(iy + 1, ix) * (1 - fx) + at(iy + 1, ix + 1) * fx
    return (top * (1 - fy) + bottom * fy).clamp(0, 255)
