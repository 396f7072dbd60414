"""Random pictures with the statistics of natural ones, for backgrounds, clothes and appearance mixing.

Dead leaves (random overlapping shapes: Lee, Mumford, Huang 2001) and 1/f noise, coloured and shaded.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFilter


def _cloud(rng: np.random.Generator, size: int, slope: float) -> np.ndarray:
    f = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]) + 1.0 / size
    x = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(size, size))) * f**-slope, s=(size, size))
    return (x - x.mean()) / (x.std() + 1e-6)


def _leaves(rng: np.random.Generator, size: int) -> np.ndarray:
    im = Image.new("RGB", (size, size), tuple(rng.integers(0, 256, 3).tolist()))
    draw = ImageDraw.Draw(im)
    base = rng.uniform(0, 255, 3)
    spread = rng.uniform(10, 90)
    for _ in range(int(rng.integers(8, 90))):
        r = size * 0.02 / max(rng.random(), 0.04) ** 0.9
        x, y = rng.uniform(-0.1, 1.1, 2) * size
        colour = tuple(int(c) for c in (base + rng.normal(0, spread, 3)).clip(0, 255))
        a, b = r * rng.uniform(0.4, 1.6, 2)
        if rng.random() < 0.5:
            draw.ellipse((x - a, y - b, x + a, y + b), fill=colour)
        else:
            k = int(rng.integers(3, 6))
            w = np.sort(rng.uniform(0, 2 * np.pi, k))
            draw.polygon([(x + a * np.cos(t), y + b * np.sin(t)) for t in w], fill=colour)
    return np.asarray(im, np.float32)


def texture(seed: int, size: int = 96) -> np.ndarray:
    """One texture, uint8 [size, size, 3]; the seed decides everything."""
    rng = np.random.default_rng(seed)
    kind = rng.random()
    if kind < 0.55:
        a = _leaves(rng, size)
        a = a + rng.uniform(0, 18) * _cloud(rng, size, rng.uniform(0.3, 1.2))[..., None]
    elif kind < 0.8:
        mix = rng.normal(size=(3, 3)) * rng.uniform(10, 55)
        fields = np.stack([_cloud(rng, size, rng.uniform(0.7, 1.8)) for _ in range(3)], -1)
        a = rng.uniform(20, 235, 3) + fields @ mix
    else:
        g = np.linspace(-1, 1, size)
        t = rng.uniform(0, 2 * np.pi)
        ramp = (np.cos(t) * g[None] + np.sin(t) * g[:, None])[..., None] * 0.5 + 0.5
        a = (
            rng.uniform(0, 255, 3) * ramp
            + rng.uniform(0, 255, 3) * (1 - ramp)
            + rng.uniform(0, 8) * rng.normal(size=(size, size, 1))
        )
    light = 1 + rng.uniform(0, 0.3) * _cloud(rng, size, 2.0)[..., None]
    im = Image.fromarray((a * light).clip(0, 255).astype(np.uint8))
    if rng.random() < 0.4:
        im = im.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.4, 3.0))))
    return np.asarray(im)


def texture_bank(count: int, size: int = 96, seed: int = 0) -> np.ndarray:
    """uint8 [count, size, size, 3]."""
    return np.stack([texture(seed * 1_000_003 + k, size) for k in range(count)])
