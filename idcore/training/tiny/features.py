"""Eyes, brows, nose holes, mouth, beard and glasses, drawn in face coordinates."""

from __future__ import annotations

import numpy as np

from .shapes import blob, mouth_width, noise_at, ramp


def _almond(du, dv, w, up, low):
    """Signed distance (positive inside) to an eye of half width w, upper and lower opening."""
    k = np.clip(1 - (du / w) ** 2, 0, 1)
    return np.minimum(dv + up * k**0.7, low * k**0.9 - dv) * (np.abs(du) < w) - (np.abs(du) >= w) * 0.05


def draw_features(c, h, lam) -> None:
    """Draw every feature of the face onto the canvas; lam is the face's shading."""
    near = h.mask * (h.z > 0.02)
    for s in (-1, 1):
        _eye(c, h, near, lam, s)
        _brow(c, h, near, lam, s)
    _nose(c, h, near)
    _beard(c, h, near, lam)
    _mouth(c, h, near, lam)
    if h.p["glasses"]:
        _glasses(c, h, near)


def _eye(c, h, near, lam, s) -> None:
    p, view = h.p, h.view
    aa = 2.0 * h.aa
    sur = view["strength"] if view["expression"] == "surprised" else 0.0
    smi = view["strength"] if view["expression"] == "smiling" else 0.0
    u0, v0 = h.u - s * p["eye_x"], h.v - p["eye_y"] - s * p["asym"]
    tilt = s * p["eye_tilt"]
    du, dv = u0 + tilt * v0, v0 - tilt * u0
    w = p["eye_w"]
    opening = w * p["eye_open"] * (1 + 0.35 * sur - 0.3 * smi)
    if p["eye_shadow"]:
        m = near * p["eye_shadow"] * blob(du, dv, 0, -0.05, w * 1.1, 0.05)
        c.over(m, p["cloth2"] * 0.7)
    d = _almond(du, dv, w, opening, opening * (0.75 - 0.15 * smi))
    inside = near * ramp(d, aa)
    shade = (0.55 + 0.45 * lam)[..., None]
    white = np.array([0.94, 0.92, 0.9], np.float32) * (1 - 0.35 * np.exp(-(((dv + opening) / 0.03) ** 2)))[..., None]
    c.over(inside, white * shade)
    gx = view["yaw"] * 0.04 + p["gaze"] * w * 0.5
    r = np.hypot(du - gx, dv + 0.1 * opening)
    ir = min(w * 0.5, 0.062) * p["iris_size"]
    c.over(inside * ramp(ir - r, aa), p["iris"] * (0.75 + 0.4 * (r / ir < 0.75))[..., None] * shade)
    c.over(inside * ramp(ir * 0.48 - r, aa), np.float32(0.03))
    c.over(inside * ramp(0.016 - np.hypot(du - gx - 0.02, dv + 0.03), aa), np.float32(0.97))
    k = np.clip(1 - (du / (w * 1.08)) ** 2, 0, 1)
    lid = np.exp(-(((dv + opening * k**0.7) / (0.012 + 0.012 * p["lash"])) ** 2)) * (np.abs(du) < w * 1.08)
    c.over(near * lid * (0.45 + 0.5 * p["lash"]), p["skin"] * 0.12)
    low = np.exp(-(((dv - opening * 0.75 * k**0.9) / 0.012) ** 2)) * (np.abs(du) < w)
    c.over(near * low * 0.35, p["skin"] * 0.4)
    crease = np.exp(-(((dv + opening * k**0.7 + 0.045) / 0.014) ** 2)) * (np.abs(du) < w * 1.05)
    c.over(near * crease * 0.4 * p["lid"], p["skin"] * 0.45)


def _brow(c, h, near, lam, s) -> None:
    p, view = h.p, h.view
    sur = view["strength"] if view["expression"] == "surprised" else 0.0
    u = (h.u * s - p["eye_x"] - 0.01) / (0.165 * p["brow_len"])
    line = (
        p["eye_y"]
        - 0.155
        + p["brow_y"]
        - 0.06 * sur
        - (p["brow_arch"] + 0.02 * sur) * (1 - u * u)
        + 0.09 * p["brow_tilt"] * u
    )
    thick = p["brow_thick"] * np.clip(1.05 - 0.55 * np.clip(u, 0, 1) ** 2, 0, 1)
    m = np.exp(-((np.abs(h.v - line) / np.maximum(thick, 1e-3)) ** 3)) * ramp(1 - np.abs(u), 0.25)
    m = m * np.clip(0.85 + 0.2 * noise_at(h.u, h.v, 5, 70, 120), 0.3, 1)
    colour = p["hair"] * (0.75 if p["hair"].mean() < 0.6 else 0.55)
    c.over(near * m * p["brow_dark"], colour * (0.4 + 0.6 * lam)[..., None])


def _nose(c, h, near) -> None:
    p = h.p
    au = np.abs(h.u)
    hole = blob(au, h.v, p["nose_w"] * 0.45, p["nose_y"] + 0.075, 0.032, 0.016)
    c.over(near * hole * (0.45 + 0.5 * p["nostril"]), p["skin"] * 0.22)
    under = blob(h.u, h.v, 0, p["nose_y"] + 0.09, p["nose_w"] * 0.9, 0.022)
    c.over(near * under * 0.35, p["skin"] * 0.45)
    wing = np.exp(-(((np.hypot((au - p["nose_w"] * 0.8), (h.v - p["nose_y"] - 0.03) * 0.9) - 0.045) / 0.012) ** 2))
    wing = wing * (au > p["nose_w"] * 0.8) * (np.abs(h.v - p["nose_y"] - 0.03) < 0.06)
    c.over(near * wing * 0.4, p["skin"] * 0.5)


def _beard(c, h, near, lam) -> None:
    p = h.p
    if p["beard"] < 2:
        return
    u, v = np.abs(h.u), h.v
    m = np.zeros_like(u)
    if p["beard"] in (2, 3):  # full beard, moustache
        m = blob(u, v, 0.1, p["mouth_y"] - 0.085, 0.13, 0.035) * 1.6
    if p["beard"] == 2:
        jaw = ramp(v - p["beard_low"] - 0.25 * np.clip(0.25 - u, 0, 1) + 0.45 * np.clip(u - 0.38, 0, 1), 0.12)
        m = np.maximum(m, jaw)
    if p["beard"] == 4:  # goatee
        m = blob(u, v, 0, p["chin_y"] - 0.12, 0.16, 0.13) * 1.5
    m = np.clip(m, 0, 1) * np.clip(0.85 + 0.2 * noise_at(h.u, h.v, 9, 80, 50), 0, 1)
    grain = (1 + 0.18 * noise_at(h.u, h.v, 12, 90, 45))[..., None]
    c.over(near * m * 0.92, p["hair"] * 0.9 * grain * (0.35 + 0.65 * lam)[..., None])


def _mouth(c, h, near, lam) -> None:
    p, view = h.p, h.view
    s, e = view["strength"], view["expression"]
    aa = 2.0 * h.aa
    w = mouth_width(p, view)
    x = h.u / w
    k = np.clip(1 - x * x, 0, 1)
    curve = p["mouth_curve"] - (0.085 * s if e == "smiling" else 0.0)
    mid = p["mouth_y"] + curve * x * x + (0.03 * s if e == "smiling" else 0.0)
    gap = {"neutral": 0.0, "smiling": 0.10 * s * view["open"], "surprised": (0.10 + 0.10 * view["open"]) * s}[e]
    up = p["lip_up"] * k * (1 - p["lip_bow"] * 0.5 * np.exp(-((x / 0.22) ** 2))) + 0.1 * gap * k
    shape = k**0.6 if e == "surprised" else k
    low = p["lip_low"] * k + gap * shape
    top = mid - (0.35 * gap * shape if e == "surprised" else 0.0)
    inside = np.abs(h.u) < w
    lips = near * ramp(np.minimum(h.v - (top - up), mid + low - h.v), aa) * inside
    tint = p["lip"] * p["skin"] * (1.0 - 0.18 * (h.v < mid))[..., None]
    c.over(lips, tint * (0.35 + 0.7 * lam)[..., None])
    if gap > 0.015:
        hole = near * ramp(np.minimum(h.v - top, mid + gap * shape - h.v), aa) * inside
        c.over(hole, np.array([0.2, 0.07, 0.07], np.float32))
        edge = mid + gap * shape * (0.75 if e == "smiling" else 0.18)
        teeth = hole * ramp(edge - h.v, aa)
        lines = 1 - 0.15 * p["gap"] * (np.cos(h.u * 110) > 0.8)
        c.over(
            teeth,
            np.float32(0.93)
            * p["teeth"]
            * (lines * (1 - 0.3 * x * x))[..., None]
            * np.array([1, 0.98, 0.94], np.float32),
        )
    else:
        line = np.exp(-(((h.v - mid) / 0.012) ** 2)) * inside * ramp(1 - np.abs(x), 0.2)
        c.over(near * line * 0.8, p["skin"] * np.array([0.3, 0.16, 0.16], np.float32))
    shadow = blob(h.u, h.v, 0, p["mouth_y"] + p["lip_low"] + gap + 0.04, w * 0.6, 0.022)
    c.over(near * shadow * 0.22, p["skin"] * 0.4)


def _glasses(c, h, near) -> None:
    p = h.p
    aa = 2.0 * h.aa
    line = 0.024 if p["glasses"] == 2 else 0.014
    r = p["glass_r"]
    for s in (-1, 1):
        du, dv = np.abs(h.u - s * p["eye_x"]), np.abs(h.v - p["eye_y"] - 0.02)
        d = np.hypot(du, dv * 1.12) if p["glasses"] != 2 else np.maximum(du, dv * 1.25)
        if p["glasses"] == 3:
            c.over(near * 0.75 * ramp(r - d, aa), np.float32(0.06))
        c.over(near * ramp(line - np.abs(d - r), aa), p["glass_colour"])
    bridge = ramp(line - np.abs(h.v - p["eye_y"] + 0.01), aa) * (np.abs(h.u) < p["eye_x"] - r)
    temple = ramp(line - np.abs(h.v - p["eye_y"] + 0.02), aa) * (np.abs(h.u) > p["eye_x"] + r)
    c.over(near * np.maximum(bridge, temple), p["glass_colour"])
