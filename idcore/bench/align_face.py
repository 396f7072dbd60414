"""Times `align_face` against what it stands for: PIL's or numpy's warp, and the definition in PyTorch."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..backends import align_face as backends
from ..ops import align_face
from .rows import figures

_AS_NETWORKS_WANT = {"mean": 127.5, "std": 127.5}


@dataclass(frozen=True)
class _Case:
    name: str
    size: int  # of the chip, pixels
    face: int  # the chip's side in the photo, pixels
    resample: str
    faces: int = 1
    photo: tuple[int, int] = (4000, 3000)

    def matrices(self) -> np.ndarray:
        """[F, 2, 3]: a turned face in the middle of the photo."""
        scale = self.size / self.face
        c, s = scale * np.cos(0.2), scale * np.sin(0.2)
        linear = np.array([[c, -s], [s, c]])
        one = np.column_stack([linear, np.full(2, self.size / 2) - linear @ (np.array(self.photo) / 2)])
        return np.stack([one] * self.faces)

    @property
    def flops(self) -> int:
        """Multiply-adds of the samples, times 2: three channels of 16 and 4 (bicubic) or of 6 (bilinear) products."""
        samples = self.size**2 * self.faces * (4 if self.face > self.size and self.resample == "bicubic" else 1)
        return samples * 3 * 2 * (20 if self.resample == "bicubic" else 6)


CASES = (
    _Case("arcface-112-of-600", 112, 600, "bilinear"),
    _Case("pulid-512-of-600", 512, 600, "bilinear", photo=(1024, 768)),
    _Case("dlib-150-of-600", 150, 600, "bicubic"),
    _Case("dlib-150-of-1500", 150, 1500, "bicubic"),
    _Case("dlib-150-of-600-x16", 150, 600, "bicubic", faces=16),
)


def _pil(photo: Any, matrix: np.ndarray, size: int) -> np.ndarray:
    """Reduce, warp to twice the size, reduce, normalise: with PIL alone."""
    from PIL import Image

    scale = float(np.hypot(matrix[0, 0], matrix[1, 0]))
    over = 2 if scale < 1 else 1
    shrink = max(1, int(1 / (scale * over)))
    corner = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    back = np.linalg.inv(corner @ np.vstack([matrix, [0, 0, 1]]) @ np.linalg.inv(corner))
    back = np.diag([1 / shrink, 1 / shrink, 1]) @ back @ np.diag([1 / over, 1 / over, 1])
    small = photo.reduce(shrink) if shrink > 1 else photo
    chip = small.transform(
        (size * over,) * 2, Image.Transform.AFFINE, tuple(back[:2].ravel()), Image.Resampling.BICUBIC
    )
    return (np.asarray(chip.reduce(over)).transpose(2, 0, 1).astype(np.float32) - 127.5) / 127.5


def _numpy(photo: np.ndarray, matrix: np.ndarray, size: int) -> np.ndarray:
    """Four gathers and their mixture, pixels beyond the edge clamped."""
    height, width, _ = photo.shape
    a, shift = np.linalg.inv(matrix[:, :2]), matrix[:, 2]
    x, y = np.meshgrid(np.arange(size) - shift[0], np.arange(size) - shift[1])
    u, v = a[0, 0] * x + a[0, 1] * y, a[1, 0] * x + a[1, 1] * y
    i, j = np.clip(np.floor(v).astype(int), 0, height - 2), np.clip(np.floor(u).astype(int), 0, width - 2)
    fx, fy = (u - j)[..., None].astype(np.float32), (v - i)[..., None].astype(np.float32)
    top = photo[i, j] * (1 - fx) + photo[i, j + 1] * fx
    bottom = photo[i + 1, j] * (1 - fx) + photo[i + 1, j + 1] * fx
    chip = np.rint(top * (1 - fy) + bottom * fy)
    return (chip.transpose(2, 0, 1).astype(np.float32) - 127.5) / 127.5


def _definition(case: _Case, photo: Tensor, real: torch.dtype, rounded: bool = True) -> Tensor:
    out = torch.empty(case.faces, 3, case.size, case.size, dtype=torch.promote_types(real, torch.float32))
    middle = ((127.5,) * 3, (127.5,) * 3)
    matrices = torch.from_numpy(case.matrices())
    faces = backends.Faces((photo,), matrices, None, out, case.resample, rounded, False, (0.0,) * 3, *middle)
    backends._reference(faces, real)
    return out


def _calls(case: _Case, photo: Tensor, backend: str, against: tuple[str, ...]) -> dict[str, Callable[[], object]]:
    matrices, array = case.matrices(), photo.numpy()
    given = {"resample": case.resample, "dtype": torch.float32, "backend": backend, **_AS_NETWORKS_WANT}
    calls: dict[str, Callable[[], object]] = {"ours": lambda: align_face(photo, matrices, case.size, **given)}
    if case.resample == "bicubic":
        from PIL import Image

        picture = Image.fromarray(array)
        calls["pil"] = lambda: [_pil(picture, m, case.size) for m in matrices]
    else:
        calls["numpy"] = lambda: [_numpy(array, m, case.size) for m in matrices]
    if "eager" in against:
        calls["eager"] = lambda: _definition(case, photo, torch.float32)
    return calls


def _row(case: _Case, options: argparse.Namespace, gflops: float | None) -> dict[str, Any]:
    gen = torch.Generator().manual_seed(0)
    photo = torch.randint(0, 256, (*case.photo[::-1], 3), dtype=torch.uint8, generator=gen)
    given = {"resample": case.resample, "dtype": torch.float32, "rounded": False, **_AS_NETWORKS_WANT}
    ours = align_face(photo, case.matrices(), case.size, backend="cpu", **given)
    truth = _definition(case, photo, torch.float64, rounded=False)
    error = (ours - truth).abs().max().item()
    limit = 2 * (_definition(case, photo, torch.float32, rounded=False) - truth).abs().max().item() + 1e-6
    head = {
        "op": "align_face", "case": case.name, "backend": "cpu", "dtype": "fp32", "merge": None, "batch": case.faces,
        "pass": "fwd",
    }  # fmt: skip
    floor = case.flops / gflops * 1e-6 if gflops else 0.0
    return figures(head, error, limit, _calls(case, photo, "cpu", options.against), floor, options)


def rows(
    options: argparse.Namespace, device: str, peaks: dict[str, float | None], gb_per_s: float
) -> list[dict[str, Any]]:
    """One row per shape: float32 chips of uint8 photos, (pixel - 127.5) / 127.5, on the CPU."""
    if options.backend != "cpu" or "fwd" not in options.passes or "fp32" not in options.dtype:
        return []
    return [_row(case, options, peaks["fp32"]) for case in CASES]
