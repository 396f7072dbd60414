"""A base that paints: a name is a colour, noise is a little of it, words change the corner; and who looks at it."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from idcore.encoders.face import Face
from idcore.metrics.similarity import Similarity
from idcore.training.augment.judge import FaceJudge
from idcore.training.contract import Text

SIZE = 32
COLOURS = {"ada": (0.8, -0.6, -0.6), "bea": (-0.6, 0.8, -0.6), "cy": (-0.6, -0.6, 0.8), "dot": (0.7, 0.7, -0.6)}
CORNERS = {"left": 0.9, "right": -0.9}


class PaintBase:
    """`contract.Base` as far as drawing needs it. "ghost" is of a colour of its noise, "blank" has no face, "fading" is
    another person under any other prompt than the first; "stubborn" never shows a corner."""

    name = "paint"
    device = torch.device("cpu")
    cell = 1
    unet = SimpleNamespace(config=SimpleNamespace(sample_size=SIZE))

    def __init__(self):
        self.batches, self.nan = [], False

    def latent_shape(self, height, width):
        return 3, height, width

    def text(self, prompts, height, width, sizes=None):
        self.batches.append(len(prompts))
        return Text(torch.tensor([[hash_of(p)] for p in prompts]), extra={"said": list(prompts)})

    def few_steps(self, count):
        return OneStep()

    def predict(self, x, t, text):
        return torch.stack([self._paint(x[i], p) for i, p in enumerate(text.extra["said"])])

    def decode(self, latents):
        return latents * float("nan") if self.nan else latents

    def _paint(self, noise, prompt):
        words = prompt.split()
        name = next((w for w in words if w in COLOURS), None)
        tint = noise.mean((1, 2)) * SIZE if "ghost" in words else torch.tensor(COLOURS.get(name, (0.0, 0.0, 0.0)))
        if "fading" in words:
            tint = torch.tensor((0.5, -0.5, 0.5) if "photo" in words else (-0.9, 0.9, 0.1))
        picture = tint.clamp(-1, 1).view(3, 1, 1).expand(3, SIZE, SIZE) + 0.01 * noise
        side = next((w for w in words if w in CORNERS), None)
        if "blank" in words:
            return torch.full((3, SIZE, SIZE), -1.0)
        picture = picture.clone()
        picture[:, :4, :4] = CORNERS[side] if side and "stubborn" not in words else 0.0
        return picture


class OneStep:
    times = torch.tensor([999.0])

    def start(self, noise):
        return noise

    def scaled(self, i, x):
        return x

    def advance(self, i, x, prediction, memory):
        return prediction, None


def hash_of(text):
    return float(sum(map(ord, text)))


class ColourAnalyzer:
    """A face is anything that is not black; whose it is, its mean colour says."""

    name = "colour"
    measure = Similarity("l2", 0.1, "colour", "this test")

    def detect(self, image):
        a = np.asarray(image)[image.height // 2 :, image.width // 2 :]
        if a.mean() < 5:
            return []
        w, h = image.size
        unit = np.array([[0.3, 0.4], [0.7, 0.4], [0.5, 0.6], [0.35, 0.8], [0.65, 0.8]])
        return [Face(np.array([0, 0, w - 1, h - 1], np.float32), 0.99, (unit * (w - 1)).astype(np.float32), (w, h))]

    def embed(self, image, face):
        a = np.asarray(image, np.float32)[image.height // 2 :, image.width // 2 :]
        return a.reshape(-1, 3).mean(0) / 255


class CornerJudge:
    """Whether the corner is as the prompt's label says."""

    words, key, least = "corner", "corner", 1.0

    def scores(self, pictures, prompts):
        found = []
        for picture, p in zip(pictures, prompts):
            light = np.asarray(picture)[:4, :4].mean()
            side = "left" if light > 200 else "right" if light < 50 else None
            found.append(float(side == p.labels["side"]) if "side" in p.labels else None)
        return found


@dataclass(frozen=True)
class Painted:
    """Models by `setup.Models`. `dies`: a folder; a worker that makes the name `kill` kills itself there, `deaths`
    times. `log`: a file that gets a line for each name that is begun."""

    dies: str = ""
    kill: str = ""
    deaths: int = 1
    version: int = 1

    def build(self, config):
        base = PaintBase()
        if self.dies:
            base.text = self._mortal(base)
        return base, FaceJudge(ColourAnalyzer(), config), CornerJudge()

    def _mortal(self, base):
        real = base.text

        def text(prompts, *args, **kwargs):
            first = any(self.kill in p.split() for p in prompts)
            marks = [Path(self.dies) / f"death-{i}" for i in range(self.deaths)]
            left = [m for m in marks if not m.exists()]
            if first and left:
                left[0].touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return real(prompts, *args, **kwargs)

        return text

    def fingerprint(self):
        return {"painted": self.version}
