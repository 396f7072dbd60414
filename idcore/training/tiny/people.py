"""The people of the embedded model's world: a person is a dictionary of drawn numbers.

Lengths are in units of the recogniser's unpadded face chip (the mean face is one unit wide; an eye is
about a quarter of a unit from the middle line). Every range is our choice, made wider than real faces
so that a network has to read the picture instead of remembering people.
"""

from __future__ import annotations

import numpy as np

EXPRESSIONS = ("neutral", "smiling", "surprised")
POSES = ("front", "left", "right")

_SKIN = (
    np.array(
        [
            [255, 224, 198],
            [243, 205, 172],
            [226, 178, 138],
            [196, 143, 104],
            [150, 102, 72],
            [104, 68, 48],
            [74, 50, 38],
        ],
        np.float32,
    )
    / 255.0
)
_HAIR = (
    np.array(
        [
            [25, 20, 18],
            [60, 38, 24],
            [110, 70, 38],
            [170, 125, 65],
            [225, 190, 120],
            [150, 60, 30],
            [150, 150, 150],
            [228, 226, 222],
        ],
        np.float32,
    )
    / 255.0
)
_IRIS = np.array([[70, 45, 25], [40, 25, 15], [70, 110, 150], [80, 120, 70], [110, 120, 125]], np.float32) / 255.0

BALD, SHORT, PARTED, LONG, CURLY, BOB, BUN, FRINGE = range(8)


def sample_person(rng: np.random.Generator, wildness: float = 0.3) -> dict:
    """Draw one person.

    Args:
        rng: source of all randomness; the same state gives the same person.
        wildness: share of people with unnatural colours (0..1).

    Returns:
        A dictionary of floats, ints and float32 RGB triples in 0..1, as `renderer.render` wants it.
    """
    u, n = rng.uniform, rng.normal
    wild = rng.random() < wildness
    return {**_colours(rng, wild), **_head(u), **_eyes(u, n), **_lower_face(u, n, rng), **_extras(u, rng)}


def _colours(rng: np.random.Generator, wild: bool) -> dict:
    t = rng.uniform(0, len(_SKIN) - 1.001)
    i = int(t)
    skin = _SKIN[i] * (1 - t + i) + _SKIN[i + 1] * (t - i) + rng.normal(0, 0.03, 3)
    hair = _HAIR[rng.choice(8, p=[0.22, 0.2, 0.15, 0.12, 0.1, 0.07, 0.07, 0.07])] * rng.uniform(0.7, 1.2)
    hair = hair + rng.normal(0, 0.02, 3)
    if wild:
        skin = rng.uniform(0.15, 0.95, 3) * 0.6 + skin * 0.4
        hair = rng.uniform(0.02, 0.95, 3)
    return {
        "skin": skin.clip(0.08, 1).astype(np.float32),
        "hair": hair.clip(0.01, 0.97).astype(np.float32),
        "iris": _IRIS[rng.integers(5)] * np.float32(rng.uniform(0.7, 1.3)),
        "lip": (np.array([0.95, 0.62, 0.6]) * rng.uniform(0.75, 1.1) + rng.normal(0, 0.05, 3)).astype(np.float32),
        "cloth": rng.uniform(0.03, 0.97, 3).astype(np.float32),
        "cloth2": rng.uniform(0.03, 0.97, 3).astype(np.float32),
        "glass_colour": rng.uniform(0.03, 0.4, 3).astype(np.float32),
        "light_tint": (1 + rng.normal(0, 0.05, 3)).astype(np.float32),
    }


def _head(u) -> dict:
    return {
        "width": u(0.60, 0.76),
        "skull": u(0.62, 0.78),
        "chin_y": u(1.13, 1.38),
        "jaw": u(0.15, 0.55),
        "jaw_power": u(1.6, 3.2),
        "depth": u(0.62, 0.85),
        "cheekbone": u(0, 0.08),
        "brow_ridge": u(0.0, 0.06),
        "socket": u(0.02, 0.10),
        "ear": u(0.5, 1.3),
        "chin_bump": u(0.0, 0.09),
        "asym": u(-0.015, 0.015),
        "fold": u(0, 0.05),
        "hollow": u(-0.02, 0.05),
    }


def _eyes(u, n) -> dict:
    return {
        "eye_x": u(0.235, 0.295),
        "eye_y": 0.216 + u(-0.03, 0.03),
        "eye_w": u(0.098, 0.138),
        "eye_open": u(0.30, 0.56),
        "eye_tilt": u(-0.22, 0.22),
        "iris_size": u(0.85, 1.1),
        "lid": u(0.3, 1.0),
        "lash": u(0.2, 1.0),
        "bag": u(0, 0.05),
        "brow_y": u(-0.035, 0.04),
        "brow_thick": u(0.018, 0.05),
        "brow_arch": u(-0.02, 0.07),
        "brow_tilt": u(-0.25, 0.25),
        "brow_len": u(0.85, 1.25),
        "brow_dark": u(0.4, 1.0),
        "eye_shadow": u(0, 0.5) if u() < 0.35 else 0.0,
        "gaze": float(n(0, 0.12)),
    }


def _lower_face(u, n, rng) -> dict:
    return {
        "nose_y": 0.545 + u(-0.045, 0.045),
        "nose_w": u(0.085, 0.150),
        "nose_h": u(0.10, 0.22),
        "nose_ridge": u(0.03, 0.075),
        "nose_tip": u(0.07, 0.11),
        "nostril": u(0.3, 1.0),
        "mouth_y": 0.79 + u(-0.035, 0.035),
        "mouth_w": u(0.195, 0.275),
        "lip_up": u(0.022, 0.055),
        "lip_low": u(0.035, 0.08),
        "mouth_curve": float(n(0, 0.012)),
        "lip_bow": u(0, 0.6),
        "beard": int(rng.choice(5, p=[0.58, 0.14, 0.12, 0.1, 0.06])),
        "beard_low": u(0.62, 0.8),
        "stubble": u(0.15, 0.6),
        "cheek_red": u(0, 0.3),
        "teeth": u(0.8, 1.0),
        "gap": u(0, 0.4),
    }


def _extras(u, rng) -> dict:
    return {
        "hair_style": int(rng.choice(8, p=[0.08, 0.2, 0.17, 0.15, 0.13, 0.1, 0.07, 0.10])),
        "hairline": u(-0.38, -0.2),
        "hair_volume": u(0.03, 0.16),
        "part": u(-0.4, 0.4),
        "recede": u(0, 0.22),
        "hair_length": u(0.8, 1.6),
        "curl": u(0.3, 1.0),
        "glasses": int(rng.choice(4, p=[0.76, 0.11, 0.09, 0.04])),
        "glass_r": u(0.15, 0.2),
        "freckles": u(0.15, 0.5) if rng.random() < 0.15 else 0.0,
        "moles": [
            (u(-0.45, 0.45), u(0.3, 1.0), u(0.012, 0.03)) for _ in range(int(rng.choice(4, p=[0.6, 0.2, 0.12, 0.08])))
        ],
        "texture": u(0.0, 0.10),
        "texture_id": int(rng.integers(1 << 20)),
        "neck": u(0.30, 0.45),
        "shoulder": u(0.9, 1.35),
        "collar": u(0.05, 0.35),
        "stripes": u(5, 30) if rng.random() < 0.25 else 0.0,
        "wrinkle": u(0, 1) if rng.random() < 0.3 else 0.0,
        "earring": u(0.02, 0.05) if rng.random() < 0.12 else 0.0,
        "spec": u(0.0, 0.35),
    }


def sample_view(rng: np.random.Generator, expression: str | None = None, pose: str | None = None) -> dict:
    """Draw how a person is seen: expression, yaw and pitch (radians), light direction and mouth opening.

    Left and right are the viewer's: "left" turns the nose to the left side of the picture.
    """
    expression = expression or EXPRESSIONS[rng.choice(3, p=[0.45, 0.37, 0.18])]
    pose = pose or POSES[rng.choice(3, p=[0.56, 0.22, 0.22])]
    yaw = {"front": rng.normal(0, 0.05), "left": -rng.uniform(0.2, 0.42), "right": rng.uniform(0.2, 0.42)}[pose]
    strength = {"neutral": 0.0, "smiling": rng.uniform(0.5, 1.0), "surprised": rng.uniform(0.6, 1.0)}[expression]
    return {
        "expression": expression,
        "pose": pose,
        "yaw": float(yaw),
        "pitch": float(rng.normal(0, 0.04)),
        "strength": float(strength),
        "open": float(rng.uniform(0, 1) if rng.random() < 0.75 else 0.0),
        "light_x": float(rng.normal(0, 0.45)),
        "light_y": float(rng.uniform(-0.7, 0.1)),
        "ambient": float(rng.uniform(0.35, 0.75)),
    }
