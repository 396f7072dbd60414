"""Pictures and a face setup for the tests of training data: a face is a red rectangle, found exactly."""

import os
import time
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from idcore.encoders.face import Face, largest_first
from idcore.errors import InputError

RED = (255, 0, 0)


class RedAnalyzer:
    """Finds red rectangles that touch no other."""

    name = "red"

    def detect(self, image):
        a = np.asarray(image).astype(int)
        red = (a[..., 0] > 150) & (a[..., 1] < 90) & (a[..., 2] < 90)
        faces = []
        while red.any():
            y0, x0 = np.argwhere(red)[0]
            w = int(np.argmin(np.append(red[y0, x0:], False)))
            h = int(np.argmin(np.append(red[y0:, x0], False)))
            red[y0 : y0 + h, max(0, x0 - 3) : x0 + w + 3] = False
            red[y0 + h : y0 + h + 2, x0 : x0 + w] = False
            if min(w, h) < 3:
                continue
            box = np.array([x0, y0, x0 + w - 1, y0 + h - 1], np.float32)
            unit = np.array([[0.3, 0.3], [0.7, 0.3], [0.5, 0.55], [0.35, 0.8], [0.65, 0.8]])
            points = (box[:2] + unit * (w - 1, h - 1)).astype(np.float32)
            faces.append(Face(box, 0.99, points, image.size))
        return largest_first(faces)


class CornerProvider:
    """Where the first eye is, and the colours beside the face's left edge: both change when a picture is mirrored."""

    name, hash = "corner", "1"

    def features(self, picture, face):
        x, y = int(face.box[0]), int(face.box[1])
        if picture.getpixel((0, 0)) == (7, 7, 7):
            raise InputError("corner: no features of this one")
        value = torch.tensor([[float("nan")]]) if picture.getpixel((0, 0)) == (9, 9, 9) else torch.tensor([[float(x)]])
        edge = np.asarray(picture)[y : y + 4, max(0, x - 4)].astype(np.float32)
        return {"eye": torch.from_numpy(face.points[:1]), "x": value, "edge": torch.from_numpy(edge)}


@dataclass(frozen=True)
class RedFaces:
    """`slow`: seconds a process waits when it starts. `marker`: a file that gets a line per analyzer built."""

    marker: str = ""
    slow: float = 0.0
    version: int = 1

    def build(self):
        if self.marker:
            with open(self.marker, "a") as f:
                f.write(f"{os.getpid()}\n")
        time.sleep(self.slow)
        return RedAnalyzer(), CornerProvider()

    def fingerprint(self):
        return {"red": self.version}


def picture(seed=0, size=(96, 96), faces=((20, 20, 60, 70),), low=90, high=200):
    """RGB noise in greens and blues with red rectangles (x0, y0, x1, y1)."""
    rng = np.random.default_rng(seed)
    a = rng.integers(low, high, (size[1] // 8 + 1, size[0] // 8 + 1, 3), np.uint8)
    a[..., 0] = 0
    a = a.repeat(8, 0).repeat(8, 1)[: size[1], : size[0]].copy()
    for x0, y0, x1, y1 in faces:
        a[y0:y1, x0:x1] = RED
    return Image.fromarray(a)


def folder(root, count=6, sizes=((96, 96),), suffix=".png"):
    """A folder of pictures, each with a caption beside it."""
    root.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        picture(i, sizes[i % len(sizes)]).save(root / f"p{i:03d}{suffix}")
        (root / f"p{i:03d}.txt").write_text(f"picture number {i}\n")
    return root
