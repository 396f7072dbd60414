"""Which of the six styles of the embedded model's world a picture has: a small linear classifier, trained here.

Trained on people drawn by the renderer, with the filters of `training.tiny.styles` on the person and plain coloured
walls behind, as the model's own targets. `python -m idcore.metrics.tiny_style OUT` trains it anew and prints how often
it is right on people that it never saw. Features and sizes are our choice.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..errors import WeightsError
from ..training.tiny.prompts import BACKGROUNDS, STYLES

FILE = Path(__file__).resolve().parent.parent / "assets" / "tiny" / "style_judge.safetensors"
SIDE = 64
FIRST_SEED = 7_000_000  # of the people drawn for it; the gate's and the training's lie elsewhere
_CENTRE = (slice(14, 60), slice(18, 46))  # rows and columns where the person is, whatever the wall


class StyleJudge:
    """Pictures to names out of `STYLES`.

    Attributes:
        weight [6, D], bias [6]: of the features as they are.
        right: share of right answers on pictures of unseen people when it was trained.
    """

    def __init__(self, weight: Tensor, bias: Tensor, right: float) -> None:
        from ..weights import fingerprint

        self.weight, self.bias, self.right = weight.double(), bias.double(), right
        self.key = fingerprint({"weight": weight, "bias": bias}).removeprefix("sha256:")[:16]

    @classmethod
    def from_package(cls) -> StyleJudge:
        """The one that ships. Raises WeightsError where its file is missing or damaged."""
        from ..weights import read_safetensors, require_keys

        tensors, told = read_safetensors(FILE, what="style judge")
        d = features(torch.zeros(1, 3, SIDE, SIDE)).shape[1]
        require_keys(tensors, {"weight": (len(STYLES), d), "bias": (len(STYLES),)}, "style judge")
        if "right" not in told:
            raise WeightsError(f"{FILE} does not say how often it is right; install idcore again")
        return cls(tensors["weight"].clone(), tensors["bias"].clone(), float(told["right"]))

    def scores(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Log-odds up to a constant [N, 6], float64, in the order of `STYLES`."""
        x = np.stack([_small(p) for p in pictures])
        return features(torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255) @ self.weight.T + self.bias

    def __call__(self, pictures: Sequence[Image.Image]) -> list[str]:
        return [STYLES[i] for i in self.scores(pictures).argmax(1).tolist()]


def _small(picture: Image.Image) -> np.ndarray:
    picture = picture.convert("RGB")
    return np.asarray(picture if picture.size == (SIDE, SIDE) else picture.resize((SIDE, SIDE), Image.Resampling.BOX))


def features(x: Tensor) -> Tensor:
    """Colour and texture of the person's part: [N, 3, 64, 64] in 0..1 -> float64 [N, D]; the second half is the first,
    squared."""
    found = looks(x, _CENTRE)
    return torch.cat([found, found.square()], 1)


def looks(x: Tensor, part: tuple[slice, slice] = (slice(None), slice(None))) -> Tensor:
    """Colour and texture of a part (rows, columns) of pictures [N, 3, H, W] in 0..1: float64 [N, D]."""
    x = x.double()
    grey = (x * x.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    shades = grey.clamp_min(0.02)
    chroma = torch.cat([(x[:, :1] - grey) / shades, (x[:, 2:] - grey) / shades], 1)
    dx, dy = F.pad(grey.diff(dim=-1), (0, 1)), F.pad(grey.diff(dim=-2), (0, 0, 0, 1))
    edge = (dx.square() + dy.square()).sqrt()
    blurred = F.avg_pool2d(F.pad(grey, (2,) * 4, mode="replicate"), 5, 1)
    near = F.avg_pool2d(F.pad(grey, (1,) * 4, mode="replicate"), 3, 1)
    calm = (F.avg_pool2d(F.pad(grey.square(), (1,) * 4, mode="replicate"), 3, 1) - near.square()).clamp_min(0).sqrt()
    saturation = x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
    maps = [grey, chroma, edge, grey - blurred, grey - near, calm, saturation, saturation / shades]
    flat = torch.cat(maps, 1)[..., part[0], part[1]].flatten(2)
    levels = flat.new_tensor([0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98])
    quantiles = torch.quantile(flat, levels, dim=-1).permute(1, 2, 0).flatten(1)
    small = edge[..., part[0], part[1]].flatten(1)
    shares = torch.stack([(small < t).double().mean(1) for t in (0.004, 0.01, 0.03, 0.08)], 1)
    return torch.cat([quantiles, flat.std(-1), flat.mean(-1), shares], 1)


def drawn(people: int, first_seed: int) -> tuple[Tensor, Tensor]:
    """Pictures [6 * people, 3, 64, 64] in 0..1 and styles [6 * people]: each person once in every style."""
    from ..training.tiny.people import sample_person, sample_view
    from ..training.tiny.renderer import render
    from ..training.tiny.styles import stylise

    pictures, covers, walls = [], [], []
    names = list(BACKGROUNDS)
    for seed in range(first_seed, first_seed + people):
        rng = np.random.default_rng(seed)
        a = torch.from_numpy(render(sample_person(rng), sample_view(rng), 96)).permute(2, 0, 1).float() / 255
        a = F.interpolate(a[None], size=(SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
        light = torch.from_numpy(rng.uniform(0.75, 1.2, (1, 3, 1, 1)) ** 0.5 * rng.uniform(0.8, 1.15)).float()
        pictures.append((a[:, :3].clamp(0.001, 1) ** float(rng.uniform(0.8, 1.25)) * light).clamp(0, 1))
        covers.append(a[:, 3:].clamp(0, 1))
        walls.append(torch.tensor(BACKGROUNDS[names[int(rng.integers(len(names)))]]).view(1, 3, 1, 1) / 255.0)
    x, cover, wall = (torch.cat(v).repeat_interleave(len(STYLES), 0) for v in (pictures, covers, walls))
    x = stylise(x, list(STYLES) * people)
    return x * cover + wall * (1 - cover), torch.arange(len(STYLES)).repeat(people)


def fit(x: Tensor, y: Tensor, shrink: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Linear discriminant analysis of features [N, D] with classes [N] of K kinds: weight [K, D], bias [K], float64.

    `shrink` times the mean variance is added to the within-class covariance of the standardised features (our choice).
    """
    centre, spread = x.mean(0), x.std(0).clamp_min(1e-6)
    z = (x - centre) / spread
    means = torch.stack([z[y == k].mean(0) for k in range(int(y.max()) + 1)])
    within = z - means[y]
    covariance = within.T @ within / len(z) + shrink * torch.eye(z.shape[1], dtype=z.dtype)
    weight = torch.linalg.solve(covariance, means.T).T
    bias = -0.5 * (weight * means).sum(1)
    weight = weight / spread
    return weight, bias - weight @ centre


def train(out: Path = FILE, people: int = 1500, unseen: int = 200) -> float:
    """Draw, fit, write; returns the share of right answers on unseen people."""
    from ..weights import write_safetensors

    x, y = drawn(people, FIRST_SEED)
    weight, bias = fit(features(x), y)
    x, y = drawn(unseen, FIRST_SEED + people)
    right = float(((features(x) @ weight.T + bias).argmax(1) == y).double().mean())
    write_safetensors(out, {"weight": weight, "bias": bias}, {"right": f"{right:.4f}", "people": str(people)})
    return right


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else FILE
    print(f"{target}: right for {train(target):.1%} of pictures of unseen people")
