"""Draws procedural people: a head with a height field, Lambert shading, features in face coordinates.

Pictures are in the wide aligned frame: the recogniser's face chip with `PADDING` more on every side, so
the eyes of every picture are where an aligner would put them. numpy only; no state; the same arguments
give the same bytes.
"""

from __future__ import annotations

import numpy as np

from .features import draw_features
from .hair import draw_back, draw_front
from .shapes import blob, mouth_width, noise_at, ramp

PADDING = 0.6
SPAN = 1 + 2 * PADDING
_CX = 0.49


class _Canvas:
    """Straight RGB and coverage of everything drawn so far."""

    def __init__(self, size: int) -> None:
        self.rgb = np.zeros((size, size, 3), np.float32)
        self.alpha = np.zeros((size, size), np.float32)

    def over(self, mask: np.ndarray, colour: np.ndarray) -> None:
        m = mask[..., None]
        self.rgb = self.rgb * (1 - m) + m * colour
        self.alpha = self.alpha + mask * (1 - self.alpha)


class _Head:
    """Geometry of one person seen in one way: pixel -> face coordinates (u, v), silhouette, depth."""

    def __init__(self, p: dict, view: dict, size: int, pixel: float) -> None:
        self.p, self.view = p, view
        self.cy = 0.33
        self.aa = pixel
        a, d, yaw = p["width"], p["depth"], view["yaw"]
        self.m = float(np.hypot(a * np.cos(yaw), d * np.sin(yaw)))
        self.delta = float(np.arctan2(d * np.sin(yaw), a * np.cos(yaw)))
        self.scale, self.dx, self.dy = self._alignment()
        g = (np.arange(size, dtype=np.float32) + 0.5) / size * SPAN - PADDING
        self.X, self.Y = np.meshgrid((g - _CX - self.dx) / self.scale, (g - self.dy) / self.scale)
        self._project()

    def profile(self, v: np.ndarray) -> np.ndarray:
        """Half width of the head at height v over its largest half width, 0..1."""
        p = self.p
        up = np.sqrt(np.clip(1 - ((v - self.cy) / (p["skull"] + self.cy)) ** 2, 0, 1))
        s = np.clip((v - self.cy) / (p["chin_y"] - self.cy), 0, 1)
        low = np.sqrt(np.clip(1 - s ** p["jaw_power"] * 0.999, 0, 1)) * (1 - p["jaw"] * s**1.5)
        return np.where(v < self.cy, up, low)

    def depth_at(self, u: float, v: float) -> float:
        r = float(self.profile(np.float32(v)))
        return self.p["depth"] * np.sqrt(max(r * r - (u / self.p["width"]) ** 2, 0.0))

    def to_picture(self, u: float, v: float, extra: float = 0.0) -> tuple[float, float]:
        """Where a face point lands before the alignment; extra: how far it stands out of the head."""
        yaw, z = self.view["yaw"], self.depth_at(u, v) + extra
        return u * np.cos(yaw) + z * np.sin(yaw), v + self.view["pitch"] * z

    def points(self) -> np.ndarray:
        """The five landmarks (eyes, nose, mouth corners) before the alignment, [5, 2]."""
        p = self.p
        w = mouth_width(p, self.view)
        face = [
            (-p["eye_x"], p["eye_y"], 0.0),
            (p["eye_x"], p["eye_y"], 0.0),
            (0.0, p["nose_y"] + 0.02, p["nose_h"]),
            (-w, p["mouth_y"], 0.0),
            (w, p["mouth_y"], 0.0),
        ]
        return np.array([self.to_picture(*f) for f in face])

    def _alignment(self) -> tuple[float, float, float]:
        """Least-squares scale and shift of the landmarks onto the mean face (no rotation)."""
        mean = np.array([[-0.2646, 0.216], [0.2646, 0.216], [0.0, 0.572], [-0.236, 0.78], [0.236, 0.78]])
        pts = self.points()
        a, b = pts - pts.mean(0), mean - mean.mean(0)
        s = float((a * b).sum() / (a * a).sum())
        shift = mean.mean(0) - s * pts.mean(0)
        return s, float(shift[0]), float(shift[1])

    def _project(self) -> None:
        p, a = self.p, self.p["width"]
        v = self.Y - self.view["pitch"] * p["depth"] * 0.8
        r = self.profile(v)
        k = np.clip(self.X / np.maximum(r * self.m, 1e-4), -1, 1)
        phi = np.arcsin(k) - self.delta
        self.u = a * r * np.sin(phi)
        self.v = v
        self.z = p["depth"] * r * np.cos(phi)
        inside = (r * self.m - np.abs(self.X)) * (r > 0.02)
        self.mask = ramp(inside, 2.5 * self.aa) * (self.v < p["chin_y"]) * (self.v > -p["skull"])


def _height(h: _Head) -> np.ndarray:
    """Height of the face's relief above the head's ellipsoid."""
    p, u, v = h.p, h.u, h.v
    ny, ey = p["nose_y"], p["eye_y"]
    t = np.clip((v - ey) / (ny - ey), 0, 1)
    ridge = (
        np.exp(-((u / (p["nose_ridge"] + 0.035 * t)) ** 2)) * t * (v < ny + 0.12) * np.clip((ny + 0.12 - v) / 0.1, 0, 1)
    )
    out = p["nose_h"] * 0.75 * ridge + p["nose_h"] * 0.45 * blob(u, v, 0, ny, p["nose_tip"], 0.06)
    au = np.abs(u)
    out += p["nose_h"] * 0.3 * blob(au, v, p["nose_w"] * 0.75, ny + 0.04, 0.04, 0.045)
    out -= p["socket"] * blob(au, v, p["eye_x"] - 0.02, ey - 0.01, 0.17, 0.10)
    out += p["brow_ridge"] * blob(au, v, 0.22, ey - 0.17, 0.2, 0.07) + 0.05 * blob(
        au, v, p["eye_x"], ey + 0.01, 0.1, 0.06
    )
    smile = h.view["strength"] if h.view["expression"] == "smiling" else 0.0
    out += (p["cheekbone"] + 0.06 * smile) * blob(au, v, 0.36, 0.52 - 0.04 * smile, 0.14, 0.13)
    out -= p["hollow"] * blob(au, v, 0.42, 0.78, 0.12, 0.18)
    out += 0.04 * blob(u, v, 0, p["mouth_y"], 0.25, 0.12) + p["chin_bump"] * blob(
        u, v, 0, p["chin_y"] - 0.13, 0.12, 0.09
    )
    out -= 0.025 * blob(u, v, 0, p["mouth_y"] + 0.16, 0.12, 0.035) + p["bag"] * blob(
        au, v, p["eye_x"] - 0.03, ey + 0.1, 0.11, 0.03
    )
    crease = (
        np.exp(-(((au - 0.17 - 0.42 * (v - ny - 0.0)) / 0.03) ** 2))
        * ramp(v - ny, 0.1)
        * ramp(p["mouth_y"] + 0.05 - v, 0.1)
    )
    return out - (p["fold"] * 0.6 + 0.03 * smile) * crease


def _shade(h: _Head) -> tuple[np.ndarray, np.ndarray]:
    """Lambert term and highlight of the face under the view's light."""
    z = (h.z + _height(h)) * 0.75
    step = h.aa / h.scale
    gy, gx = np.gradient(z, step)
    gx, gy = np.clip(gx, -3, 3), np.clip(gy, -3, 3)
    inv = 1 / np.sqrt(1 + gx * gx + gy * gy)
    light = np.array([h.view["light_x"], h.view["light_y"], 1.0])
    light = light / np.linalg.norm(light)
    lam = np.clip((-gx * light[0] - gy * light[1] + light[2]) * inv, 0, 1)
    amb = h.view["ambient"]
    return (amb + (1.15 - amb) * lam).astype(np.float32), (lam**24 * h.p["spec"]).astype(np.float32)


def _skin(h: _Head) -> np.ndarray:
    p, u, v = h.p, h.u, h.v
    skin = np.broadcast_to(p["skin"], u.shape + (3,)).astype(np.float32)
    tone = 1 + p["texture"] * noise_at(u, v, p["texture_id"]) + 0.03 * noise_at(u, v, p["texture_id"] + 7, 20, 20)
    red = p["cheek_red"] * blob(np.abs(u), v, 0.36, 0.58, 0.14, 0.12)
    if p["freckles"]:
        spots = ramp(noise_at(u, v, 3 + p["texture_id"] % 5, 60, 60) - 1.2, 0.4) * blob(u, v, 0, 0.42, 0.45, 0.2)
        tone = tone - p["freckles"] * spots
    for x, y, r in p["moles"]:
        tone = tone - 0.55 * ramp(r - np.hypot(u - x, v - y), 2 * h.aa)
    for k in range(3 if p["wrinkle"] > 0.3 else 0):
        tone = tone - 0.12 * p["wrinkle"] * np.exp(-(((v + 0.06 + 0.06 * k + 0.1 * u * u) / 0.012) ** 2)) * (
            np.abs(u) < 0.32
        )
    out = skin * tone[..., None]
    out[..., 1:] *= (1 - 0.4 * red)[..., None]
    if p["beard"] == 1:  # stubble
        area = ramp(v - 0.62 - 0.35 * np.clip(0.42 - np.abs(u), 0, 1) ** 1.0 * 0.3, 0.2)
        m = area * p["stubble"] * (0.8 + 0.2 * noise_at(u, v, 2, 90, 90))
        out = out * (1 - m[..., None] * 0.7) + m[..., None] * 0.7 * p["hair"]
    return out


def render(person: dict, view: dict, size: int = 96) -> np.ndarray:
    """Draw a person.

    Args:
        person: from `people.sample_person`.
        view: from `people.sample_view`.
        size: edge in pixels (the picture spans `SPAN` face units).

    Returns:
        uint8 [size, size, 4]: RGB and coverage (255 where person, 0 where background). RGB is not
        premultiplied.
    """
    c = _Canvas(size)
    h = _Head(person, view, size, SPAN / size)
    draw_back(c, h)
    lam, spec = _shade(h)
    face = _skin(h) * lam[..., None] * person["light_tint"] + spec[..., None]
    c.over(h.mask, face)
    draw_features(c, h, lam)
    draw_front(c, h, lam)
    out = np.empty((size, size, 4), np.uint8)
    straight = c.rgb / np.maximum(c.alpha, 1e-3)[..., None]
    out[..., :3] = (straight.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    out[..., 3] = (c.alpha.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    return out
