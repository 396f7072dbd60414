"""`align_face`: cut aligned face chips out of pictures and bring them into a network's form, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..backends import align_face as backends
from ..backends.align_face import ORDER, RESAMPLE, TYPES, Colour, Faces
from ..errors import InputError, NoBackendError

Picture = Tensor | np.ndarray
LAYOUTS = ("nchw", "nhwc")


def align_face(
    pictures: Picture | Sequence[Picture],
    matrices: Tensor | np.ndarray,
    size: int | tuple[int, int],
    *,
    picture_of: Sequence[int] | Tensor | None = None,
    resample: str = "bicubic",
    dtype: torch.dtype = torch.uint8,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    rounded: bool = True,
    fill: Sequence[float] = (0.0, 0.0, 0.0),
    bgr: bool = False,
    layout: str = "nchw",
    backend: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Chips of F faces: warp, resample, normalise and lay out.

    Args:
        pictures: One RGB picture, uint8 [H, W, 3] (any strides, so a permuted [3, H, W] will do), a batch
            [P, H, W, 3], or a sequence of pictures of any sizes. Tensors on one device, or numpy arrays.
        matrices: [F, 2, 3] or [2, 3], float: picture pixels to chip pixels, (0, 0) in the centre of the first pixel,
            as `encoders.align.similarity_transform` gives them. On the pictures' device.
        size: Side of the chips, or (height, width), in pixels.
        picture_of: Which picture each face is in, [F], whole numbers 0..P-1. Default: face f is in picture f where
            there are as many pictures as faces, else all are in the only one. In memory of a GPU it is clamped.
        resample: "bilinear" mixes 2 x 2 pixels without averaging, as the published ArcFace and PuLID chains do.
            "bicubic" (a = -1, as PIL's) averages first where the picture is much larger than the chip: blocks of
            k x k pixels, k = floor(1 / (2 scale)), and 2 x 2 samples a pixel, so that nothing aliases.
        dtype: Of the chips: uint8, float32, bfloat16 or float16.
        mean, std: Float chips are (pixel - mean) / std, in grey levels 0..255, a number or one for red, green and
            blue each. Defaults 0 and 1.
        rounded: Float chips come from whole grey levels, exactly as from uint8 chips; False skips that rounding.
        fill: Colour outside of the picture, red, green, blue, 0..255, before the normalisation.
        bgr: Channels of the chips in the order blue, green, red.
        layout: "nchw" or "nhwc".
        backend: "cuda", "cpu" or "reference". Default: the first that can run the call.
        out: Written and returned if given; shape, dtype and device of the result, any strides.

    Returns:
        [F, 3, height, width], or [F, height, width, 3] for "nhwc". A matrix without an inverse gives a chip of
        `fill` where it lies in a GPU's memory, and an error elsewhere. No gradients (`differentiable_chips`).

    Raises:
        InputError: shapes, dtypes, devices or numbers do not fit together.
        NoBackendError: the named backend cannot run this call; says why.
    """
    images = _pictures(pictures)
    device = images[0].device if isinstance(images[0], Tensor) else torch.device("cpu")
    matrix = _matrices(matrices, device)
    of = _picture_of(picture_of, len(images), len(matrix), device)
    _check_choices(resample, dtype, layout, mean, std)
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or any(not isinstance(n, int) or n < 1 for n in sides):
        raise InputError(f"align_face: size must be whole pixels, at least 1, or (height, width), got {size!r}")
    result = _out(out, (len(matrix), *sides), dtype, layout, device)
    view = result if layout == "nchw" else result.permute(0, 3, 1, 2)
    colours = (_colour("fill", fill, 0.0), _colour("mean", mean, 0.0), _colour("std", std, 1.0))
    if min(colours[0]) < 0 or max(colours[0]) > 255 or min(map(abs, colours[2])) == 0:
        raise InputError(f"align_face: fill must be 0..255 and std not 0, got {colours[0]} and {colours[2]}")
    name = _choose(backend, device.type, len(images))
    for group, rows in _groups(images, of, name):
        picked = None if of is None else (of if rows is None else of[rows] - group.start).contiguous()
        target = view if rows is None else view.new_empty(len(rows), *view.shape[1:])
        some = matrix if rows is None else matrix[rows].contiguous()
        backends.run(name, Faces(images[group], some, picked, target, resample, rounded, bgr, *colours))
        if rows is not None:
            view[rows] = target
    return result


def differentiable_chips(images: Tensor, matrices: Tensor | np.ndarray, size: int, resample: str = "bicubic") -> Tensor:
    """What `align_face` cuts out of float pictures, one face each, not rounded, with gradients to the pictures.

    Args:
        images: [N, 3, H, W] float, RGB, grey levels 0..255.
        matrices: [N, 2, 3], as for `align_face`.
        size: side of the chips, pixels.
        resample: "bilinear" or "bicubic".

    Returns:
        [N, 3, size, size] in the dtype of the pictures, black outside of them.

    Raises:
        InputError: shapes, dtypes or numbers do not fit together.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.dtype.is_floating_point or 0 in images.shape:
        raise InputError(f"align_face: images must be float [N, 3, H, W], got {list(images.shape)} {images.dtype}")
    if resample not in RESAMPLE:
        raise InputError(f"align_face: resample must be one of {', '.join(RESAMPLE)}, got {resample!r}")
    rows = _matrices(matrices, torch.device("cpu"))
    if len(rows) != len(images):
        raise InputError(f"align_face: wanted a matrix for each of {len(images)} images, got {len(rows)}")
    fill, sides = images.new_zeros(3, 1, 1), torch.Size((size, size))
    chips = [backends.chip_pixels(x, m, sides, resample, fill) for x, m in zip(images, rows.tolist(), strict=True)]
    return torch.stack(chips)


def _pictures(given: Picture | Sequence[Picture]) -> tuple[Picture, ...]:
    if isinstance(given, (Tensor, np.ndarray)):
        given = (given,) if given.ndim == 3 else tuple(given)
    for i, p in enumerate(given):
        good = isinstance(p, (Tensor, np.ndarray)) and p.ndim == 3 and p.shape[2] == 3 and 0 not in p.shape
        if not good or p.dtype not in (torch.uint8, np.uint8):
            got = f"{list(p.shape)} {p.dtype}" if hasattr(p, "shape") else type(p).__name__
            raise InputError(f"align_face: picture {i} must be uint8 RGB [H, W, 3] with at least one pixel, got {got}")
        if getattr(p, "device", "cpu") != getattr(given[0], "device", "cpu") or type(p) is not type(given[0]):
            raise InputError(
                f"align_face: all pictures must lie on one device, picture {i} lies elsewhere than the first"
            )
    if len(given) == 0:
        raise InputError("align_face: wanted at least one picture, got none")
    return tuple(given)


def _matrices(given: Tensor | np.ndarray, device: torch.device) -> Tensor:
    m = given if isinstance(given, Tensor) else torch.as_tensor(np.asarray(given, np.float64))
    m = m[None] if m.ndim == 2 else m
    if m.ndim != 3 or m.shape[1:] != (2, 3) or not m.dtype.is_floating_point:
        raise InputError(f"align_face: matrices must be floats [F, 2, 3] or [2, 3], got {list(m.shape)} {m.dtype}")
    m = m.detach().to(device, torch.float64).contiguous()
    if m.device.type == "cpu":
        for f, rows in enumerate(m.tolist()):
            _check_matrix(f, rows)
    return m


def _check_matrix(f: int, rows: list[list[float]]) -> None:
    (a, b, c), (d, e, g) = rows
    det = a * e - b * d
    # comparisons with NaN are false
    if not (0 < det * det < 1e300 and 0 < a * a + d * d < 1e300 and c - c == 0 and g - g == 0):
        raise InputError(
            f"align_face: matrix {f} has no usable scale or no inverse, got {rows}; the landmarks are degenerate"
        )


def _picture_of(given, pictures: int, faces: int, device: torch.device) -> Tensor | None:
    if given is None:
        if pictures == 1:
            return None
        if pictures != faces:
            raise InputError(
                f"align_face: {faces} faces in {pictures} pictures need picture_of, the picture of each face"
            )
        return torch.arange(faces, dtype=torch.int32, device=device)
    of = torch.as_tensor(given)
    if of.shape != (faces,) or of.dtype.is_floating_point or of.dtype == torch.bool:
        raise InputError(f"align_face: picture_of must be {faces} whole numbers, got {list(of.shape)} {of.dtype}")
    if of.device.type == "cpu" and faces and not 0 <= int(of.min()) <= int(of.max()) < pictures:
        raise InputError(f"align_face: picture_of must be in 0..{pictures - 1}, got {of.tolist()}")
    return of.to(device, torch.int32).contiguous()


def _check_choices(resample: str, dtype: torch.dtype, layout: str, mean, std) -> None:
    if resample not in RESAMPLE:
        raise InputError(f"align_face: resample must be one of {', '.join(RESAMPLE)}, got {resample!r}")
    if dtype not in TYPES:
        raise InputError(f"align_face: dtype must be uint8, float32, bfloat16 or float16, got {dtype}")
    if layout not in LAYOUTS:
        raise InputError(f"align_face: layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if dtype == torch.uint8 and not (mean is None and std is None):
        raise InputError("align_face: uint8 chips hold grey levels; give a float dtype with mean and std")


def _colour(name: str, given, default: float) -> Colour:
    given = default if given is None else given
    values = (given,) * 3 if isinstance(given, (int, float)) else tuple(float(x) for x in given)
    if len(values) != 3 or not all(np.isfinite(values)):
        raise InputError(f"align_face: {name} must be a finite number or three of them, got {given!r}")
    return tuple(float(x) for x in values)


def _out(out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: torch.device) -> Tensor:
    count, height, width = shape
    wanted = (count, 3, height, width) if layout == "nchw" else (count, height, width, 3)
    if out is None:
        return torch.empty(wanted, dtype=dtype, device=device)
    if tuple(out.shape) != wanted or out.dtype != dtype or out.device != device:
        raise InputError(
            f"align_face: out must be {list(wanted)} {dtype} on {device}, got {list(out.shape)} {out.dtype} on "
            f"{out.device}"
        )
    return out


def _choose(backend: str | None, device: str, pictures: int) -> str:
    if backend is not None and backend not in ORDER:
        raise InputError(f"backend must be one of {', '.join(ORDER)} or None, got {backend!r}")
    reasons = backends.refusals(device, min(pictures, backends.MAX_PICTURES))
    for name in (backend,) if backend else ORDER:
        if not reasons[name]:
            return name
    raise NoBackendError(f"align_face: backend {backend!r} cannot run this call: {'; '.join(reasons[backend])}")


def _groups(images: tuple, of: Tensor | None, name: str) -> list[tuple[slice, Tensor | None]]:
    """Runs of pictures that one kernel call can hold, each with the indices of its faces (None: all)."""
    most = backends.MAX_PICTURES
    if name == "reference" or len(images) <= most:
        return [(slice(0, len(images)), None)]
    starts = range(0, len(images), most)
    found = [(slice(s, min(s + most, len(images))), ((of >= s) & (of < s + most)).nonzero()[:, 0]) for s in starts]
    return [(group, rows) for group, rows in found if len(rows)]
