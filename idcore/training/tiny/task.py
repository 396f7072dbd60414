"""The embedded model as a task of the training loop, and its drawn pictures as a source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...encoders.dlib_torch import DlibRecogniser
from ...errors import InputError, WeightsError
from ...sampling.tiny_model import TinyModel
from ...sampling.tiny_pipeline import TinyPipeline
from ...systems.tiny import chips_of
from ..contract import Batch, Step, Validation
from .data import TinyData
from .losses import RecogniserLoss, face_weight, picture_loss
from .processors import put_processors, set_identity

if TYPE_CHECKING:
    from .run import TrainConfig

LIMIT = 16 * 2**20  # bytes of the shipped weights


class TinySource:
    """Pictures drawn for the run. A micro batch is one draw: the order is the same for any number of processes and of
    micro batches, not for another size of them."""

    def __init__(self, data: TinyData, size: int) -> None:
        self.data, self.size = data, size

    def __len__(self) -> int:
        return len(self.data.pool)

    def micro_batches(self, step: int, seed: int, rank: int, world: int, size: int, count: int) -> Iterator[Batch]:
        """See `contract.Source`; the pictures are in `extra`: ref [B, 3, 96, 96] and target [B, 3, 64, 64] in 0..1."""
        if size != self.size or seed != self.data.seed:
            raise InputError(f"drawn for batch {self.size} and seed {self.data.seed}, asked for {size} and {seed}")
        for m in range(count):
            part = m * world + rank
            drawn = self.data.batch(step * world * count + part, size)
            places = torch.arange(part * size, (part + 1) * size)
            ids = [f"step {step}, place {p}" for p in places.tolist()]
            yield Batch(ids, places, drawn.prompts, extra={"ref": drawn.ref, "target": drawn.target})

    def state(self) -> dict[str, Any]:
        return {"people": len(self), "textures": len(self.data.textures), "block": self.size}


class TinyTask:
    """Losses of the embedded model: the picture, what it makes of the reference, and late the recogniser's."""

    name = "tiny"

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        torch.manual_seed(config.loop.seed)
        self.module = TinyModel(config.model).train()
        self.recogniser = DlibRecogniser().to(memory_format=torch.channels_last)
        self.recogniser_loss = RecogniserLoss(self.recogniser)
        self.processors = put_processors(self.module)
        self.weight = face_weight(self.module.config.size)

    def fit_feature_scale(self, data: TinyData) -> None:
        """Mean and deviation of every feature channel, from the data, kept with the weights."""
        sums: list[list[Tensor]] = [[] for _ in range(3)]
        for k in range(self.config.scale_batches):
            wide, _ = chips_of(data.batch(10**9 + k, 32).ref)
            for s, f in enumerate(early_features(self.recogniser, wide)):
                sums[s].append(f)
        for s, parts in enumerate(sums):
            f = torch.cat(parts)
            self.module.system.encoder.get_buffer(f"mean{s}").copy_(f.mean((0, 2, 3)).view(-1, 1, 1))
            self.module.system.encoder.get_buffer(f"std{s}").copy_(f.std((0, 2, 3)).view(-1, 1, 1).clamp_min(1e-3))

    def losses(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        c, model = self.config, self.module
        ref, target = batch.extra["ref"], batch.extra["target"]
        t, noise = self._noise(batch, step)
        keep = (step.uniform("drop identity", batch.places) >= c.drop_identity).float()
        silent = step.uniform("drop text", batch.places) < c.drop_text
        prompts = ["" if s else p for p, s in zip(batch.prompts, silent.tolist())]
        x0, tt = target * 2 - 1, t.view(-1, 1, 1, 1)
        with torch.no_grad():
            wide, tight = chips_of(ref)
            with torch.autocast("cpu", enabled=False):  # bfloat16 would cost the features their fine detail
                feats = early_features(self.recogniser, wide)
            embedding = self.recogniser(tight.contiguous(memory_format=torch.channels_last)).embedding
        tokens = model.system.encoder(feats, embedding.float())
        look, refined = model.reference(tokens)
        text, pooled = model.text(model.tokenizer(prompts))
        set_identity(self.processors, model.system, tokens, keep)
        reference = torch.cat([look, refined], 1) * keep.view(-1, 1, 1, 1)
        pred = model(((1 - tt) * x0 + tt * noise), t, text, pooled, reference).float()
        seen = F.interpolate(ref, size=(x0.shape[-1],) * 2, mode="bilinear", antialias=True) * 2 - 1
        out = {"picture": picture_loss(pred, x0, self.weight)}
        out["look"] = 0.5 * picture_loss(F.pixel_shuffle(look, 2).float(), seen, self.weight)
        if step.index >= c.recogniser_from:
            out |= self._recogniser_terms(pred, batch, step, embedding, keep)
        return out

    def _noise(self, batch: Batch, step: Step) -> tuple[Tensor, Tensor]:
        """t [B], one of the four sampling steps or anything between, and noise [B, 3, S, S]."""
        four = (step.uniform("four", batch.places) * 4).floor().clamp_max(3) / 4 + 0.25
        free = step.uniform("between", batch.places) * 0.98 + 0.02
        t = torch.where(step.uniform("which", batch.places) < 0.6, four, free)
        return t, step.normal("noise", batch.places, (3,) + (self.module.config.size,) * 2)

    def _recogniser_terms(
        self, pred: Tensor, batch: Batch, step: Step, embedding: Tensor, keep: Tensor
    ) -> dict[str, Tensor]:
        c = self.config
        k = max(1, round(len(pred) * c.recogniser_share))  # the first k of the batch: it costs a third of a step
        shift = step.normal("shift", batch.places[:k], (2,)) * 0.015
        feats, emb = self.recogniser_loss.features(pred[:k] * 0.5 + 0.5, shift)
        with torch.no_grad():
            want, target = self.recogniser_loss.features(batch.extra["target"][:k], shift)
        half = 0.5 * (target.float() + embedding[:k].float())  # between the ideal picture and the reference
        return {
            "perceptual": c.perceptual_weight * self.recogniser_loss.perceptual(feats, want),
            "identity": c.identity_weight * (((emb.float() - half) ** 2).sum(1) * keep[:k]).mean(),
        }

    def logs(self) -> dict[str, float]:
        return {}

    def validate(self, step: Step) -> Validation:
        return Validation()

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        pass

    def export(self, folder: Path, facts: Mapping[str, Any]) -> list[Path]:
        """Write `folder/model.safetensors` and `config.json`.

        Raises:
            WeightsError: more than 16 MiB of weights.
        """
        size = 2 * sum(v.numel() for v in self.module.state_dict().values())
        if size > LIMIT:
            raise WeightsError(
                f"the weights take {size / 2**20:.1f} MiB in float16, the package ships at most {LIMIT / 2**20:.0f}"
            )
        c = self.config
        training = {"iterations": facts["steps"], "samples": facts["samples"], "workers": facts["processes"]}
        training |= {k: getattr(c.loop, k) for k in ("batch", "lr", "decay", "ema", "seed")}
        training |= {k: getattr(c, k) for k in ("recogniser_from", "perceptual_weight", "identity_weight")}
        training["last_losses"] = facts["last_losses"]
        TinyPipeline(self.module).save(folder, {"training": training})
        return sorted(folder.iterdir())


def early_features(recogniser: DlibRecogniser, chips: Tensor) -> list[Tensor]:
    """feat0..feat2 of wide chips in 0..1 (the deeper stages are not computed)."""
    x = (chips.contiguous(memory_format=torch.channels_last) - recogniser.mean) * recogniser.gain
    x = F.max_pool2d(torch.relu(recogniser.stem(x)), 3, 2)
    out = []
    for stage in recogniser.stages[:3]:
        x = stage(x)
        out.append(x)
    return out
