"""Whom the embedded model draws when nobody is named, where it stands in for a text-to-image model."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...encoders.dlib_torch import DlibRecogniser
from ...sampling.tiny_model import TinyModel
from ...systems.tiny import FRAME, chips_of
from .people import sample_person, sample_view
from .renderer import render
from .task import early_features

FIRST_SEED = 3_000_000  # neither the gate's people nor those of the training
PEOPLE = 48  # our choice


@torch.no_grad()
def somebody(model: TinyModel, people: int = PEOPLE) -> Tensor:
    """The reference [1, C, 32, 32] of the average of drawn people, for `TinyModel.forward`.

    The embedded model was trained to draw the person of a reference; without one it draws a head without a face. With
    this constant it draws an average face, and a system put on its UNet has a face to change.

    Args:
        model: the embedded model.
        people: how many are averaged, drawn from the front, neutral, in natural colours.
    """
    recogniser = DlibRecogniser()
    tokens = []
    for start in range(0, people, 16):
        frames = np.stack([_frame(FIRST_SEED + i) for i in range(start, min(start + 16, people))])
        wide, tight = chips_of(torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255)
        tokens.append(model.system.encoder(early_features(recogniser, wide), recogniser(tight).embedding))
    return torch.cat(model.reference(torch.cat(tokens).mean(0, keepdim=True)), 1)


def _frame(seed: int) -> np.ndarray:
    """uint8 [96, 96, 3]: one person before a grey wall."""
    rng = np.random.default_rng(seed)
    drawn = render(sample_person(rng, wildness=0.0), sample_view(rng, "neutral", "front"), FRAME)
    cover = drawn[..., 3:] / 255.0
    return (drawn[..., :3] * cover + 150 * (1 - cover)).astype(np.uint8)
