"""Which expression and which pose a drawn face has: a small convolutional network, trained here.

It sees 64 px pictures in the frame in which the package's own models draw (`training.tiny.renderer`). Trained on people
drawn by the renderer in all six styles before plain walls, blurred, noisy and shifted a little, as generated pictures
are. `python -m idcore.metrics.drawn_judge --pool FOLDER` trains it anew and prints how often it is right on people that
it never saw. Architecture, sizes and augmentation are our choice.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..errors import WeightsError
from ..training.tiny.people import EXPRESSIONS, POSES

FILE = Path(__file__).resolve().parent.parent / "assets" / "tiny" / "drawn_judge.safetensors"
SIDE = 64
UNSEEN_SEED = 6_500_000  # of the people that it is tried on; below those that any training draws


class Network(nn.Module):
    """[N, 3, 64, 64] in 0..1 to logits [N, 3] of expressions and [N, 3] of poses."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 48, 3, 2, 1),
            nn.ReLU(), nn.Conv2d(48, 16, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * (SIDE // 8) ** 2, 48), nn.ReLU(),
        )  # fmt: skip
        self.expression, self.pose = nn.Linear(48, len(EXPRESSIONS)), nn.Linear(48, len(POSES))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x - x.mean((1, 2, 3), keepdim=True)  # without the light and the contrast of the whole picture
        found = self.body(x / x.std((1, 2, 3), keepdim=True).clamp_min(0.02))
        return self.expression(found), self.pose(found)


class DrawnJudge:
    """Pictures to names out of `EXPRESSIONS` and `POSES`.

    Attributes:
        right: share of right answers on pictures of unseen people when it was trained, by "expression" and "pose".
        key: hash of its weights.
    """

    def __init__(self, network: Network, right: dict[str, float], key: str = "") -> None:
        self.network, self.right, self.key = network.eval().requires_grad_(False), right, key

    @classmethod
    def from_package(cls) -> DrawnJudge:
        """The one that ships. Raises WeightsError where its file is missing or damaged."""
        from ..weights import fingerprint, read_safetensors, require_keys

        network = Network()
        tensors, told = read_safetensors(FILE, what="drawn judge")
        require_keys(tensors, {k: tuple(v.shape) for k, v in network.state_dict().items()}, "drawn judge")
        if not {"expression", "pose"} <= set(told):
            raise WeightsError(f"{FILE} does not say how often it is right; install idcore again")
        network.load_state_dict({k: v.float() for k, v in tensors.items()})
        right = {k: float(told[k]) for k in ("expression", "pose")}
        return cls(network, right, fingerprint(tensors).removeprefix("sha256:")[:16])

    def __call__(self, pictures: Sequence[Image.Image]) -> list[tuple[str, str]]:
        """(expression, pose) of each picture; other sizes are brought to 64 px."""
        if not pictures:
            return []
        x = torch.from_numpy(np.stack([_small(p) for p in pictures])).permute(0, 3, 1, 2).float() / 255
        expression, pose = (logits.argmax(1).tolist() for logits in self.network(x))
        return [(EXPRESSIONS[e], POSES[p]) for e, p in zip(expression, pose)]


def _small(picture: Image.Image) -> np.ndarray:
    picture = picture.convert("RGB")
    return np.asarray(picture if picture.size == (SIDE, SIDE) else picture.resize((SIDE, SIDE), Image.Resampling.BOX))


# -- training ---------------------------------------------------------------------------------------------------------


def train(pool: Path, out: Path = FILE, shards: int = 8, epochs: int = 16, unseen: int = 300) -> dict[str, float]:
    """Fit on the people of a pool (drawn where it lacks them), write; returns the shares of right answers."""
    from ..training.tiny.pool import Pool, make_pool, render_person
    from ..weights import write_safetensors

    make_pool(pool, shards)
    pictures, labels = Pool(pool).get(np.arange(shards * 500))
    torch.manual_seed(0)
    network = Network()
    _fit(network, _views(pictures), torch.from_numpy(labels.reshape(-1, 2)).long(), epochs)
    drawn = [render_person(UNSEEN_SEED + i) for i in range(unseen)]
    wanted = torch.from_numpy(np.concatenate([y for _, y in drawn])).long()
    right = accuracy(network.eval(), _views(np.stack([x for x, _ in drawn])), wanted)
    tensors = {k: v.half().contiguous() for k, v in network.state_dict().items()}
    told = {k: f"{v:.4f}" for k, v in right.items()} | {"people": str(shards * 500), "unseen": str(unseen)}
    write_safetensors(out, tensors, told)
    return right


def _views(pictures: np.ndarray) -> Tensor:
    """uint8 [N, 2, S, S, 4] to [2 N, 4, 64, 64] in 0..1: colour, premultiplied by its cover, and cover."""
    parts = []
    for some in np.array_split(pictures.reshape(-1, *pictures.shape[2:]), max(1, len(pictures) // 250)):
        x = torch.from_numpy(some).permute(0, 3, 1, 2).float() / 255
        x[:, :3] *= x[:, 3:]
        parts.append(F.interpolate(x, size=(SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False))
    return torch.cat(parts).clamp(0, 1)


def _fit(network: Network, x: Tensor, y: Tensor, epochs: int, batch: int = 128, lr: float = 2e-3) -> None:
    g = torch.Generator().manual_seed(0)
    steps = epochs * (len(x) // batch)
    optimiser = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.02)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (batch,), generator=g)
        expression, pose = network(dressed(x[rows], g))
        loss = F.cross_entropy(expression, y[rows, 0]) + F.cross_entropy(pose, y[rows, 1])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        rate.step()


def dressed(x: Tensor, g: torch.Generator, *, rough: bool = True) -> Tensor:
    """Views [N, 4, 64, 64] in a style each before a wall each, [N, 3, 64, 64]; `rough`: moved, blurred, noisy."""
    from ..training.tiny.prompts import BACKGROUNDS, STYLES
    from ..training.tiny.styles import stylise

    n = len(x)
    if rough:
        x = _moved(x, g)
    cover = x[:, 3:]
    bare = (x[:, :3] / cover.clamp_min(1e-3)).clamp(0.001, 1) ** torch.empty(n, 1, 1, 1).uniform_(0.7, 1.4, generator=g)
    styled = stylise(bare, [STYLES[i] for i in torch.randint(len(STYLES), (n,), generator=g).tolist()])
    walls = torch.tensor(list(BACKGROUNDS.values())).float() / 255
    wall = walls[torch.randint(len(walls), (n,), generator=g)].view(n, 3, 1, 1)
    made = styled * cover + wall * (1 - cover)
    if rough:
        soft = F.avg_pool2d(F.pad(made, (1,) * 4, mode="replicate"), 3, 1)
        made = made + torch.rand(n, 1, 1, 1, generator=g) * (soft - made)
        made = made + 0.03 * torch.rand(n, 1, 1, 1, generator=g) * torch.randn(made.shape, generator=g)
    return made.clamp(0, 1)


def _moved(x: Tensor, g: torch.Generator) -> Tensor:
    """A little shift, turn and zoom of each."""
    n = len(x)
    angle, zoom = torch.randn(n, generator=g) * 0.04, 1 + torch.randn(n, generator=g) * 0.04
    shift = torch.randn(n, 2, generator=g) * 0.03
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    theta = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).view(n, 2, 3)
    return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)


@torch.no_grad()
def accuracy(network: Network, x: Tensor, y: Tensor) -> dict[str, float]:
    """Shares of right answers on views [N, 4, 64, 64] with labels [N, 2], each dressed once, seeded."""
    seen = dressed(x, torch.Generator().manual_seed(1), rough=False)
    found = torch.stack([logits.argmax(1) for logits in network(seen)], 1)
    return dict(zip(("expression", "pose"), (found == y).double().mean(0).tolist()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pool", type=Path, required=True, help="folder of drawn people; made where it is missing")
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--shards", type=int, default=8, help="of 500 people")
    asked = parser.parse_args()
    print(f"{asked.out}: right on unseen people: {train(asked.pool, asked.out, asked.shards)}")
