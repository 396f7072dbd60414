"""Face identification with ArcFace's head (arXiv 1801.07698), after which DreamIdentity's encoder begins."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...encoders.face_vit import FaceViT
from ...results import Result
from ...weights import write_safetensors
from ..card import Card, write_card
from ..contract import Batch, Step, Validation
from .config import FaceViTTrainConfig

SYSTEM, WEIGHTS = "face-vit", "face_vit.safetensors"


class FaceClassifier(nn.Module):
    """The ViT and a direction per person; the directions are left behind."""

    def __init__(self, vit: FaceViT, people: int) -> None:
        super().__init__()
        self.vit = vit
        self.people = nn.Parameter(torch.randn(people, vit.config.id_width) * 0.01)

    def forward(self, chips: Tensor) -> Tensor:
        """Cosines [B, people] between faces [B, 3, S, S] and the people's directions."""
        identity, _ = self.vit(chips)
        return F.linear(F.normalize(identity.float(), dim=-1), F.normalize(self.people, dim=-1))


def arcface_loss(cosines: Tensor, person: Tensor, scale: float = 64.0, margin: float = 0.5) -> Tensor:
    """ArcFace's equation 3: the own person's angle is made larger by a margin before the cross entropy.

    Beyond pi - margin, where cos(theta + margin) would rise again, the cosine itself is lowered by
    margin * sin(margin), as ArcFace's published training does.

    Args:
        cosines: [B, people], -1..1.
        person: [B] int64.
        scale, margin: s, and m in radians.
    """
    own = cosines.gather(1, person[:, None]).clamp(-1 + 1e-6, 1 - 1e-6)
    wider = own * math.cos(margin) - (1 - own.square()).sqrt() * math.sin(margin)
    wider = torch.where(own > math.cos(math.pi - margin), wider, own - margin * math.sin(margin))
    return F.cross_entropy(scale * cosines.scatter(1, person[:, None], wider), person)


class FaceViTTask:
    """See `contract.Task`.

    Args:
        module: what is trained, on its device.
        config: all settings.
        exam: batches of people whom the training does not have, with `face["crop"]` and `extra["person"]`.
    """

    name = SYSTEM

    def __init__(self, module: FaceClassifier, config: FaceViTTrainConfig, exam: Sequence[Batch] = ()) -> None:
        self.module, self.config, self.exam = module.train(), config, exam
        self._logs: dict[str, float] = {}

    def losses(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        a, place = self.config.arcface, self.module.people.device
        person = batch.extra["person"].to(place)
        cosines = self.module(batch.face["crop"].to(place))
        self._logs = {"accuracy": float((cosines.argmax(1) == person).float().mean())}
        return {"arcface": arcface_loss(cosines, person, a.scale, a.margin)}

    def logs(self) -> Mapping[str, float]:
        return self._logs

    @torch.no_grad()
    def validate(self, step: Step) -> Validation:
        if not self.exam:
            return Validation()
        self.module.eval()
        try:
            place = self.module.people.device
            seen = [self.module.vit(b.face["crop"].to(place))[0].float().cpu() for b in self.exam]
        finally:
            self.module.train()
        return Validation(measures=identification(torch.cat(seen), torch.cat([b.extra["person"] for b in self.exam])))

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Nothing besides the module."""

    def export(self, folder: Path, facts: Mapping[str, Any]) -> list[Path]:
        """face_vit.safetensors in timm's key names, for `idcore train dreamidentity --vit`; card; result.json."""
        folder.mkdir(parents=True, exist_ok=True)
        vit, c = self.module.vit, self.config.vit
        state = {k: v.detach().float().cpu().contiguous() for k, v in vit.state_dict().items()}
        about = {"format": "pt", "heads": str(vit.config.heads), "template": c.template}
        weights = write_safetensors(folder / WEIGHTS, state, about)
        card = Card(
            title="Face ViT",
            summary="A vision transformer trained by `idcore train face-vit` for face identification (ArcFace, "
            f"{len(self.module.people)} people), as DreamIdentity's encoder (arXiv 2307.00300) wants one.",
            base="", tags=("face-recognition", "vit"),
            rows={"network": str(vit.config), "faces cut out as": c.template},
            use=(f"idcore train dreamidentity --vit {WEIGHTS} --data PHOTOS --base FOLDER --out run",),
            limits="Identification is measured on people of the same data set whom the training did not see.",
        )  # fmt: skip
        return [
            weights,
            *write_card(card, self.config, folder, facts),
            Result(SYSTEM, WEIGHTS, "").write(folder, {"template": c.template}),
        ]


def identification(vectors: Tensor, person: Tensor) -> dict[str, float]:
    """How well vectors [N, E] tell people [N] apart: is the nearest other one (cosine) of the same person?

    Returns:
        `rank1`, over those that have another picture; `same`, `different`: mean cosines. What there is no pair for is
        left out.
    """
    near = F.normalize(vectors, dim=-1) @ F.normalize(vectors, dim=-1).T
    same = person[:, None] == person[None]
    alone = torch.eye(len(person), dtype=torch.bool)
    known = (same & ~alone).any(1)
    first = near.masked_fill(alone, -2).argmax(1)
    right = person[first] == person
    values = {"rank1": right[known].float(), "same": near[same & ~alone], "different": near[~same]}
    return {name: float(v.mean()) for name, v in values.items() if len(v)}
