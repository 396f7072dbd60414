"""What tiny-sd makes of people whom it knows by name: a picture, and the recogniser's distances."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ...encoders.dlib_torch import DlibRecogniser
from ...sampling.tiny_sd import NAMED_SEED, names
from ..contract import Validation
from ..tiny.losses import tight_chips
from ..tiny.people import sample_person, sample_view
from ..tiny.prompts import BACKGROUNDS
from ..tiny.renderer import render

PROMPTS = (
    "a photo of {}, blue background",
    "a photo of {} person, smiling, red background",
    "a photo of {}, surprised, looking left, green background",
    "a pencil drawing of {}, white background",
    "an oil painting of {}, yellow background",
    "a cartoon of {}, pink background",
)


def frame_of(seed: int, size: int = 64, expression: str = "neutral", pose: str = "front") -> Tensor:
    """[3, size, size] in 0..1: the drawn person of a seed before a blue wall."""
    rng = np.random.default_rng(seed)
    drawn = render(sample_person(rng), sample_view(rng, expression, pose), 96).astype(np.float32)
    cover = drawn[..., 3:] / 255
    wall = np.array(BACKGROUNDS["blue"], np.float32)
    picture = torch.from_numpy((drawn[..., :3] * cover + wall * (1 - cover)) / 255).permute(2, 0, 1)[None]
    return F.interpolate(picture, size=(size, size), mode="bilinear", antialias=True)[0]


@torch.no_grad()
def draw(pipe: Any, prompts: list[str], seed: int = 0) -> Tensor:
    """Pictures [N, 3, 64, 64] in 0..1, four steps, a seed each from `seed` on."""
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    return pipe(
        prompts, num_inference_steps=4, guidance_scale=1.0, height=size, width=size, output_type="pt",
        generator=[torch.Generator().manual_seed(seed + i) for i in range(len(prompts))],
    ).images.float()  # fmt: skip


@torch.no_grad()
def show_people(pipe: Any, count: int = 8) -> Validation:
    """Drawings of `count` named people by `PROMPTS` under what they look like, and by name-less prompts.

    Measures: median distance to the right person (drawn by the renderer, as the first prompt says), to the others, and
    the share of pictures that are nearest to the right one.
    """
    everybody = names()
    who = [i * 37 % len(everybody) for i in range(count)]
    truth = torch.stack([frame_of(NAMED_SEED + i) for i in who])
    recogniser = DlibRecogniser().eval()
    wanted = recogniser(tight_chips(truth)).embedding
    rows, right, others, hits = [truth], [], [], []
    for prompt in PROMPTS:
        made = draw(pipe, [prompt.format(everybody[i]) for i in who])
        distances = torch.cdist(recogniser(tight_chips(made)).embedding.float(), wanted.float())
        rows.append(made)
        right.append(distances.diag())
        others.append(distances[~torch.eye(count, dtype=torch.bool)])
        hits.append((distances.argmin(1) == torch.arange(count)).float())
    rows.append(draw(pipe, ["a photo of a person, blue background"] * count))
    grid = torch.stack(rows).clamp(0, 1).permute(0, 3, 1, 4, 2).reshape(len(rows) * 64, count * 64, 3)
    measures = {
        "distance": float(torch.cat(right).median()),
        "distance to others": float(torch.cat(others).median()),
        "right person": float(torch.cat(hits).mean()),
    }
    return Validation({"people": Image.fromarray((grid * 255).round().byte().numpy())}, measures)
