"""tiny-sd as a task of the training loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...encoders.dlib_torch import DlibRecogniser
from ...sampling.tiny_sd import (
    FOLD,
    NAMED_SEED,
    TinySDConfig,
    make_pipeline,
    make_text_encoder,
    make_unet,
    names,
    save_tiny_sd,
)
from ..bases.tiny_sd import timesteps
from ..contract import Batch, Step, Validation
from ..settings import setting
from ..tiny.losses import RecogniserLoss, face_weight, picture_loss
from ..tiny.people import sample_person
from .codes import codes
from .data import ONE, TWO
from .showing import show_people


@dataclass(frozen=True)
class RecogniserPhase:
    """The face recogniser's losses, late in the training: of its features and of its embedding (all our choice)."""

    begin: int = setting(4_000, "Step from which they count", low=0)
    share: float = setting(0.2, "Share of each batch that they see: they are dear", above=0, high=1)
    perceptual: float = setting(0.1, "Weight of the features", low=0)
    identity: float = setting(0.5, "Weight of the embedding", low=0)


class TinySDTask:
    """Clean-picture prediction at the noise levels of Stable Diffusion's schedule; UNet and text encoder learn."""

    name = "tiny-sd"

    def __init__(
        self, config: TinySDConfig, seed: int = 0, drop_text: float = 0.05, late: RecogniserPhase | None = None
    ) -> None:
        self.config, self.drop_text, self.late = config, drop_text, late or RecogniserPhase()
        self.recogniser = RecogniserLoss(DlibRecogniser().eval().to(memory_format=torch.channels_last))
        torch.manual_seed(seed)
        unet, text = make_unet(config), make_text_encoder(config)
        nn.init.normal_(text.get_input_embeddings().weight, std=0.3)
        self.module = nn.ModuleDict({"unet": unet, "text_encoder": text}).train()
        self.pipe = make_pipeline(unet, text, config)
        self.ids = torch.tensor(self.pipe.tokenizer.convert_tokens_to_ids([ONE, TWO]))
        self._words: tuple[Tensor, Tensor] | None = None  # ids and vectors of the prompts that are read now
        text.get_input_embeddings().register_forward_hook(self._put)
        self.products = self.pipe.scheduler.alphas_cumprod.float()
        self.weight = face_weight(config.size)

    def _put(self, module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        """A person's vectors where `ONE` and `TWO` stand."""
        if self._words is None:
            return out
        ids, words = self._words
        for i in range(2):
            out = torch.where((ids == self.ids[i])[..., None], words[:, i : i + 1].to(out), out)
        return out

    def losses(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        silent = (step.uniform("drop text", batch.places) < self.drop_text).tolist()
        prompts = ["" if s else p for p, s in zip(batch.prompts, silent)]
        ids = self.pipe.tokenizer(
            prompts, padding="max_length", max_length=self.config.text_length, truncation=True, return_tensors="pt"
        ).input_ids
        self._words = ids, batch.extra["words"]
        try:
            text = self.module["text_encoder"](ids)[0]
        finally:
            self._words = None
        x0 = F.pixel_unshuffle(batch.pixels, FOLD).contiguous(memory_format=torch.channels_last)
        t = timesteps(step.uniform("level", batch.places))
        product = self.products[t].view(-1, 1, 1, 1)
        noise = step.normal("noise", batch.places, x0.shape[1:])
        noisy = product.sqrt() * x0 + (1 - product).sqrt() * noise
        made = self.module["unet"](noisy, t, encoder_hidden_states=text).sample
        picture = F.pixel_shuffle(made.float(), FOLD)
        terms = {"picture": picture_loss(picture, batch.pixels, self.weight)}
        return terms if step.index < self.late.begin else terms | self._recognised(picture, batch, step)

    def _recognised(self, made: Tensor, batch: Batch, step: Step) -> dict[str, Tensor]:
        k = max(1, round(len(made) * self.late.share))
        shift = step.normal("shift", batch.places[:k], (2,)) * 0.015
        look = self.recogniser.features
        feats, embedding = look((made[:k] * 0.5 + 0.5), shift)
        with torch.no_grad():
            wanted, person = look(batch.pixels[:k] * 0.5 + 0.5, shift)
        present = batch.extra["present"][:k]
        identity = ((embedding.float() - person.float()) ** 2).sum(1) * present
        return {
            "perceptual": self.late.perceptual * self.recogniser.perceptual(feats, wanted),
            "identity": self.late.identity * identity.sum() / present.sum().clamp_min(1),
        }

    def logs(self) -> dict[str, float]:
        return {}

    def validate(self, step: Step) -> Validation:
        """Named people as they are and as they are drawn; distances of the embedded recogniser."""
        kept = self.module["text_encoder"].get_input_embeddings().weight.detach().clone()
        self.write_names()
        try:
            return show_people(self.pipe)
        finally:
            with torch.no_grad():
                self.module["text_encoder"].get_input_embeddings().weight.copy_(kept)

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        pass

    @torch.no_grad()
    def write_names(self) -> None:
        """The named people's vectors into the table of word embeddings."""
        people = [sample_person(np.random.default_rng(NAMED_SEED + i)) for i in range(len(names()))]
        rows = torch.tensor(self.pipe.tokenizer.convert_tokens_to_ids(list(names())))
        table = self.module["text_encoder"].get_input_embeddings().weight
        table[rows] = torch.from_numpy(codes(people, self.config.width)).to(table)

    def export(self, folder: Path, facts: Mapping[str, Any]) -> list[Path]:
        """`model.safetensors` and `config.json` as `sampling.tiny_sd.tiny_sd` reads them."""
        self.write_names()
        kept = ("steps", "samples", "processes", "last_losses")
        training = {k: facts[k] for k in kept if k in facts}
        return save_tiny_sd(
            self.module["unet"], self.module["text_encoder"], self.config, folder, {"training": training}
        )
