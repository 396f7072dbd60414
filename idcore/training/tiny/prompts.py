"""Prompts of the embedded model: the words that mean its styles, backgrounds, expressions and poses."""

from __future__ import annotations

import numpy as np

from .people import EXPRESSIONS, POSES

STYLES = ("photo", "pencil", "oil", "cartoon", "sepia", "night")
BACKGROUNDS = {
    "white": (238, 238, 235),
    "gray": (128, 130, 134),
    "black": (26, 26, 30),
    "blue": (60, 100, 190),
    "red": (180, 50, 48),
    "green": (66, 140, 76),
    "yellow": (225, 195, 70),
    "purple": (120, 70, 150),
    "orange": (228, 130, 50),
    "pink": (236, 160, 184),
}
COLOURS = tuple(BACKGROUNDS)

_STYLE = {
    "photo": (
        "a photo",
        "a photograph",
        "a portrait photo",
        "a picture",
        "a realistic photo",
        "a portrait",
        "a studio photo",
        "a headshot",
    ),
    "pencil": (
        "a pencil drawing",
        "a pencil sketch",
        "a drawing",
        "a sketch",
        "a graphite drawing",
        "a pencil portrait",
    ),
    "oil": ("an oil painting", "a painting", "an oil portrait", "an oil on canvas painting", "a painted portrait"),
    "cartoon": (
        "a cartoon",
        "a comic",
        "an illustration",
        "a cartoon drawing",
        "a comic style picture",
        "a cartoon portrait",
    ),
    "sepia": ("a sepia photo", "a vintage photo", "an old photo", "an antique photograph", "a sepia toned portrait"),
    "night": ("a photo at night", "a night photo", "a moonlight photo", "a night portrait", "a photo in the moonlight"),
}
_SUBJECT = ("a person", "a man", "a woman", "someone", "a face", "the person", "this person", "a head", "one person")
_EXPRESSION = {
    "neutral": ("with a neutral expression", "looking serious", "with a calm face", "neutral expression", "serious"),
    "smiling": ("smiling", "with a smile", "happy", "laughing", "with a happy smile", "looking happy"),
    "surprised": (
        "surprised",
        "looking surprised",
        "shocked",
        "astonished",
        "with a surprised expression",
        "with an open mouth",
    ),
}
_ADJECTIVE = {
    "neutral": ("serious", "calm", "neutral"),
    "smiling": ("smiling", "happy", "laughing"),
    "surprised": ("surprised", "shocked", "astonished"),
}
_POSE = {
    "front": ("facing the camera", "looking straight ahead", "front view", "seen from the front", "facing forward"),
    "left": ("looking left", "turned to the left", "facing left", "looking to the left", "turned left"),
    "right": ("looking right", "turned to the right", "facing right", "looking to the right", "turned right"),
}
_BACKGROUND = (
    "{} background",
    "on a {} background",
    "in front of a {} wall",
    "against a {} background",
    "with a {} background",
    "{} backdrop",
    "on {}",
)
_NOISE = ("detailed", "high quality", "simple", "studio light", "close up", "well lit", "plain")


def _pick(rng: np.random.Generator, options) -> str:
    return options[int(rng.integers(len(options)))]


def write_prompt(
    rng: np.random.Generator,
    style: str,
    background: str | None,
    expression: str | None,
    pose: str | None,
    subject: str | None = None,
) -> str:
    """One of many ways to say these attributes; None leaves an attribute unsaid (keep the reference's). `subject`: who
    is seen, always said; None: somebody."""
    said = []
    core = _pick(rng, _STYLE[style])
    named = subject is not None
    subject = subject or _pick(rng, _SUBJECT)
    if expression and rng.random() < 0.5:
        noun = subject if named else subject.split()[-1]
        core += f" of a {_pick(rng, _ADJECTIVE[expression])} {noun}"
    else:
        core += f" of {subject}" if named or rng.random() < 0.9 else ""
        if expression:
            said.append(_pick(rng, _EXPRESSION[expression]))
    if pose:
        said.append(_pick(rng, _POSE[pose]))
    if background:
        name = "grey" if background == "gray" and rng.random() < 0.5 else background
        said.append(_pick(rng, _BACKGROUND).format(name))
    if rng.random() < 0.15:
        said.append(_pick(rng, _NOISE))
    rng.shuffle(said)
    joint = ", " if rng.random() < 0.75 else " "
    words = [core] + said
    if rng.random() < 0.1:
        words = said + [core]
    return joint.join(words)


def labels_to_names(expression: int, pose: int) -> tuple[str, str]:
    return EXPRESSIONS[expression], POSES[pose]
