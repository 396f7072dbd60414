"""What the drawing is made of: ramps, blobs, tiles of noise, the width of a mouth."""

from __future__ import annotations

import functools

import numpy as np

_NOISE = 160  # edge of a tile of noise


@functools.lru_cache(maxsize=1)
def noise_bank() -> np.ndarray:
    """48 tiles of 1/f noise, float32 [48, 160, 160], mean 0, deviation 1."""
    rng = np.random.default_rng(20231)
    f = np.hypot(np.fft.fftfreq(_NOISE)[:, None], np.fft.rfftfreq(_NOISE)[None]) + 1e-3
    out = []
    for k in range(48):
        spectrum = np.fft.rfft2(rng.normal(size=(_NOISE, _NOISE))) * f ** (-(0.5 + 1.2 * k / 47))
        tile = np.fft.irfft2(spectrum, s=(_NOISE, _NOISE))
        out.append((tile - tile.mean()) / tile.std())
    return np.stack(out).astype(np.float32)


def noise_at(u: np.ndarray, v: np.ndarray, seed: int, sx: float = 50.0, sy: float = 50.0) -> np.ndarray:
    tile = noise_bank()[seed % 48]
    iu = (u * sx + 37 * (seed % 101)).astype(np.int32) % _NOISE
    iv = (v * sy + 53 * (seed % 89)).astype(np.int32) % _NOISE
    return tile[iv, iu]


def ramp(d: np.ndarray, width: float) -> np.ndarray:
    """0 below -width/2, 1 above width/2, straight in between."""
    return np.clip(d / width + 0.5, 0, 1)


def blob(u, v, x, y, sx, sy):
    return np.exp(-(((u - x) / sx) ** 2 + ((v - y) / sy) ** 2))


def mouth_width(p: dict, view: dict) -> float:
    e, s = view["expression"], view["strength"]
    return p["mouth_w"] * (1 + 0.2 * s if e == "smiling" else 1 - 0.25 * s if e == "surprised" else 1.0)
