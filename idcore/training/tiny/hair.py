"""Hair, ears, neck and clothes: what stands behind and in front of the face."""

from __future__ import annotations

import numpy as np

from . import people as P
from .shapes import noise_at, ramp


def _strands(h, x, y, light: float = 1.0) -> np.ndarray:
    """Hair colour with fine streaks, [S, S, 3]."""
    p = h.p
    grain = (
        1 + 0.13 * noise_at(x, y, 11 + p["texture_id"] % 17, 75, 14) + 0.10 * noise_at(x, y, p["texture_id"], 30, 30)
    )
    sheen = 0.18 * np.exp(-(((y + 0.35) / 0.12) ** 2)) * (1 + h.view["light_x"] * x)
    return (p["hair"] * light) * np.clip(grain, 0.3, 1.9)[..., None] + (0.5 * sheen * p["hair"].mean() ** 0.5)[
        ..., None
    ]


def draw_back(c, h) -> None:
    """Long hair, bun, shoulders, neck and ears."""
    p, yaw = h.p, h.view["yaw"]
    x, y = h.X, h.Y
    aa = 2.5 * h.aa
    xb = x + 0.30 * np.sin(yaw)  # what lies behind the head moves the other way
    style, vol, a = p["hair_style"], p["hair_volume"], h.m
    if style in (P.LONG, P.CURLY, P.BOB):
        length = {P.LONG: p["hair_length"], P.CURLY: 0.9 + 0.4 * p["curl"], P.BOB: 0.85}[style]
        w = a + vol + (0.16 if style == P.CURLY else 0.05) + 0.05 * np.clip(y, 0, 1.5)
        wave = (0.07 * p["curl"] if style == P.CURLY else 0.02) * noise_at(x, y, p["texture_id"] + 3, 45, 45)
        top = -p["skull"] - vol
        dome = np.sqrt(np.clip(1 - (np.minimum(y - 0.1, 0) / (top - 0.1)) ** 2, 0, 1))
        m = ramp(w * dome + wave - np.abs(xb), aa) * ramp(length + wave - y, 0.12) * (y > top)
        c.over(m, _strands(h, x, y, 0.7))
    if style == P.BUN:
        c.over(ramp(0.24 - np.hypot(xb, y + p["skull"] + 0.14), aa), _strands(h, x, y, 0.9))
    _body(c, h, aa)
    if style not in (P.LONG, P.CURLY, P.BOB):
        for s in (-1, 1):
            ex = s * a * 0.99 - 0.25 * np.sin(yaw)
            d = 1 - np.hypot((x - ex) / (0.09 * p["ear"]), (y - 0.33) / (0.19 * p["ear"]))
            inner = 1 - 0.3 * np.exp(-(((x - ex) / 0.04) ** 2 + ((y - 0.33) / 0.09) ** 2))
            c.over(ramp(d, 0.25), p["skin"] * 0.82 * inner[..., None])
            if p["earring"]:
                c.over(ramp(p["earring"] - np.hypot(x - ex, y - 0.33 - 0.2 * p["ear"]), aa), p["cloth2"])


def _body(c, h, aa) -> None:
    p, x, y = h.p, h.X, h.Y
    xn = x + 0.12 * np.sin(h.view["yaw"])
    t = np.clip(y - 1.0, 0, 1)
    slope = ramp(y - 1.18 - 0.35 * (np.abs(xn) / p["shoulder"]) ** 1.6, 2 * aa)
    body = slope * ramp(p["shoulder"] + 0.4 * t - np.abs(xn), aa)
    cloth = np.broadcast_to(p["cloth"], x.shape + (3,))
    if p["stripes"]:
        cloth = np.where((np.sin(xn * p["stripes"] + y * 3) > 0.2)[..., None], p["cloth"], p["cloth2"])
    fold = 1 + 0.15 * noise_at(x, y, p["texture_id"] + 29, 22, 22) - 0.25 * np.abs(xn) / p["shoulder"]
    c.over(body, cloth * fold[..., None])
    neck = ramp(p["neck"] + 0.05 * t - np.abs(xn), aa) * ramp(1.25 + p["collar"] - np.abs(xn) * 0.9 - y, aa) * (y > 0.6)
    shadow = 0.5 + 0.35 * np.clip((y - 1.1) / 0.4, 0, 1) + 0.12 * h.view["light_x"] * xn
    c.over(neck, p["skin"] * shadow[..., None])


def draw_front(c, h, lam) -> None:
    """Hair that falls on the forehead and around the skull."""
    p, yaw = h.p, h.view["yaw"]
    style = p["hair_style"]
    if style == P.BALD:
        return
    aa = 2.5 * h.aa
    x, y, u, v = h.X, h.Y, h.u, h.v
    vol = p["hair_volume"] * (0.5 if style == P.BUN else 1.0)
    top = -p["skull"] - vol
    wave = (0.05 * p["curl"] if style == P.CURLY else 0.012) * noise_at(x, y, p["texture_id"] + 5, 50, 50)
    r = np.sqrt(np.clip(1 - ((y - h.cy) / (top - h.cy)) ** 2, 0, 1))
    outer = ramp((h.m + vol * 0.8) * r + wave - np.abs(x + 0.08 * np.sin(yaw)), aa) * (y > top - 0.05)
    part = p["part"]
    line = (
        p["hairline"]
        + p["recede"] * -0.5 * np.exp(-(((np.abs(u) - 0.3) / 0.15) ** 2))
        + 0.55 * np.clip(np.abs(u) - 0.38, 0, 1)
    )
    if style in (P.PARTED, P.LONG, P.BOB):
        line = line + 0.35 * np.clip(np.abs(u - part * 0.5) - 0.08, 0, 0.5) ** 1.2
    if style == P.FRINGE:
        line = np.where(np.abs(u) < 0.5, -0.06 + 0.03 * np.sin(u * 40 + p["part"] * 9), line)
    side_end = {P.SHORT: 0.28, P.PARTED: 0.3, P.LONG: 1.6, P.CURLY: 0.9, P.BOB: 0.85, P.BUN: 0.2, P.FRINGE: 0.45}[style]
    cover = np.abs(u) / np.maximum(p["width"] * h.profile(v), 0.05)
    sides = ramp(cover - 0.88, 0.06) * ramp(side_end - y, 0.1) + (h.z < 0.12) * ramp(side_end - y, 0.1)
    over_face = np.clip(ramp(line + wave - v, 0.05) + sides, 0, 1)
    m = outer * np.where(h.mask > 0.5, over_face, ramp(side_end - y, 0.12))
    light = 0.55 + 0.5 * np.where(h.mask > 0.5, lam, 0.7)
    c.over(m, _strands(h, x, y) * light[..., None])
