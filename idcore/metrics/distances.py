"""FID and KID from features, in float64: what is measured depends on the network that made them, so name it.

FID: Heusel et al. 2017 (arXiv 1706.08500), equation 6. KID: Binkowski et al. 2018 (arXiv 1801.01401), section 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from idcore.errors import InputError

DEGREE, COEF = 3, 1.0  # KID's kernel (x . y / D + 1)^3
SUBSETS, SUBSET_SIZE = 100, 1000  # of the paper's code


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """FID: |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)).

    The trace of the root is the sum of the singular values of X_a X_b^T, with X the centred features over
    sqrt(N - 1): exact also where there are fewer pictures than features, and no matrix root is taken.

    Args:
        a, b: features [N, D] and [M, D], any real dtype; N and M at least 2.

    Raises:
        InputError: other shapes, fewer than 2 rows, numbers that are not finite.
    """
    a, b = _features(a, b, least=2)
    mean = a.mean(0) - b.mean(0)
    x, y = (_root(f - f.mean(0), len(f)) for f in (a, b))
    cross = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return float(max(mean @ mean + (x**2).sum() + (y**2).sum() - 2 * cross, 0.0))


def _root(centred: np.ndarray, n: int) -> np.ndarray:
    """R [min(N, D), D] with R^T R the covariance: the triangle of a QR where there are more rows than features."""
    x = centred / np.sqrt(n - 1)
    return np.linalg.qr(x, mode="r") if len(x) > x.shape[1] else x


@dataclass(frozen=True)
class Kernel:
    """KID: mean and standard deviation over `subsets` drawings of `size` pictures of each side."""

    mean: float
    std: float
    subsets: int
    size: int


def kernel_distance(
    a: np.ndarray, b: np.ndarray, *, subsets: int = SUBSETS, size: int = SUBSET_SIZE, seed: int = 0
) -> Kernel:
    """KID: the unbiased squared MMD with the kernel (x . y / D + 1)^3, over random subsets without replacement.

    Args:
        a, b: features [N, D] and [M, D].
        subsets, size: of the drawings; where a side has fewer pictures than `size`, all of the smaller side count
            in each (one drawing suffices then where both are that small).
        seed: of the drawings.

    Raises:
        InputError: as in `frechet_distance`; fewer than 1 subset or a size below 2.
    """
    a, b = _features(a, b, least=2)
    if subsets < 1 or size < 2:
        raise InputError(f"KID: wanted at least 1 subset of at least 2 pictures, got {subsets} of {size}")
    m = min(size, len(a), len(b))
    drawings = 1 if m == len(a) == len(b) else subsets
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(drawings):
        x, y = (f[rng.choice(len(f), m, replace=False)] for f in (a, b))
        values.append(_mmd2(x, y))
    return Kernel(float(np.mean(values)), float(np.std(values)), drawings, m)


def _mmd2(x: np.ndarray, y: np.ndarray) -> float:
    m, d = x.shape

    def kernel(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        return (p @ q.T / d + COEF) ** DEGREE

    xx, yy = kernel(x, x), kernel(y, y)
    within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (m * (m - 1))
    return float(within - 2 * kernel(x, y).mean())


def _features(a: np.ndarray, b: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
    sides = []
    for f in (a, b):
        f = np.asarray(f, np.float64)
        if f.ndim != 2 or len(f) < least or f.shape[1] < 1:
            raise InputError(f"features must be [N, D] with N at least {least}, got {list(f.shape)}; add pictures")
        if not np.isfinite(f).all():
            raise InputError("features hold NaN or infinite numbers; look at the network and at the pictures")
        sides.append(f)
    if sides[0].shape[1] != sides[1].shape[1]:
        raise InputError(
            f"features of {sides[0].shape[1]} and {sides[1].shape[1]} numbers come from different networks; "
            "use one network for both sides"
        )
    return sides[0], sides[1]
