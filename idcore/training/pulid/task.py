"""PuLID's losses in their three stages (arXiv 2404.16022, sections 3.3 to 3.5, equations 1 to 7)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import prompts
from ...encoders.pulid_features import PuLIDFeatures
from ...errors import InputError
from ...systems.pulid import PuLID
from ..contract import Base, Batch, Step, Text, Validation
from ..data.faces import pulid_features
from ..data.parts import NAME as PARTS
from ..data.parts import face_weights
from ..injection import Injection, Person, undressed
from ..losses.alignment import alignment_loss
from ..losses.diffusion import diffusion_loss
from ..losses.identity import IdentityLoss, IdentityTerm
from ..through_steps import Through, Walk, through_steps
from .config import STAGES, PuLIDTrainConfig


class PuLIDTask:
    """One stage of PuLID's training, as `loop.train` wants it. Trained are the encoder and id_to_k and id_to_v.

    Stage 1: L_diff. Stage 2: + L_id. Stage 3: + L_align.

    Args:
        system: what is trained, on the bases' device; its state dict is the published file's.
        stage: 1, 2 or 3.
        config: all settings.
        base: frozen model of L_diff; another one in each process is allowed.
        fast: frozen model of the 4-step passes; may be `base`.
        judge: L_id's recogniser; not needed in stage 1.
        validator: draws and measures in between; None: nothing is.
    """

    name = "pulid"
    uses_all = True

    def __init__(
        self,
        system: PuLID,
        stage: int,
        config: PuLIDTrainConfig,
        base: Base,
        fast: Base | None = None,
        judge: IdentityLoss | None = None,
        validator: Any = None,
    ) -> None:
        if stage not in STAGES:
            raise InputError(f"PuLID's training has the stages 1, 2 and 3, got {stage!r}")
        if stage > 1 and judge is None:
            raise InputError(f"PuLID stage {stage} has an identity loss: give a judge (IdentityLoss)")
        self.module, self.stage, self.config, self.judge = system.train(), stage, config, judge
        self.base, self.fast = base, fast or base
        self.validator = validator
        self.injection = Injection(self.base.unet, system)
        self.fast_injection = self.injection if self.fast is self.base else Injection(self.fast.unet, system)
        self.injection.checkpointing(config.loop.gradient_checkpointing)
        loss = config.loss
        self.through = Through(
            loss.steps, loss.gradient_steps, loss.checkpoint_steps, config.loop.gradient_checkpointing,
            loss.checkpoint_decode,
        )  # fmt: skip
        self.alignment_prompts = tuple(prompts.load(loss.alignment_prompts))
        self._logs: dict[str, float] = {}

    # -- losses -------------------------------------------------------------------------------------------

    def losses(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Weighted terms "diffusion", "identity", "semantic" and "layout", as the stage has them."""
        self._logs = {}
        tokens = self.module(features_of(batch))
        wanted = self._wanted(batch) if self.stage > 1 else None
        terms = self._diffusion(batch, step, tokens, wanted)
        if self.stage > 1 and self.config.loss.through == "steps":
            terms |= self._four_steps(batch, step, tokens, wanted)
        return terms

    def _diffusion(self, batch: Batch, step: Step, tokens: Tensor, wanted: Any) -> dict[str, Tensor]:
        """Equation 1, with text and identity dropped at random, each by itself."""
        c = self.config
        on_fast = self.stage > 1 and c.loss.diffusion_on == "fast"
        base, injection = (self.fast, self.fast_injection) if on_fast else (self.base, self.injection)
        latents = base.encode_pictures(batch.pixels) if batch.latents is None else batch.latents.to(base.device)
        keep = step.uniform("drop identity", batch.places) >= c.drop_identity
        silent = step.uniform("drop text", batch.places) < c.drop_text
        said = ["" if s else p for s, p in zip(silent.tolist(), batch.prompts)]
        noise = step.normal("noise", batch.places, latents.shape[1:]).to(base.device)
        x, t = base.noised(latents, noise, step.uniform("time", batch.places).to(base.device))
        text = base.text(said, *self._size(batch, base, latents), batch.sizes)
        seen = tokens if bool(keep.all()) else undressed(tokens, self._tokens_of_nobody(batch), keep)
        with injection.using(injection.person(seen)):
            prediction = base.predict(x, t, text)
        loss = diffusion_loss(
            prediction, base.target(latents, noise, t), norm=c.loss.diffusion_norm, min_snr=c.loss.min_snr,
            snr=None if c.loss.min_snr is None else base.snr(t), parametrisation=base.prediction,
            where=self._where(batch, latents),
        )  # fmt: skip
        self._logs["diffusion"] = float(loss.detach())
        terms = {"diffusion": c.loss.diffusion * loss}
        if self.stage > 1 and c.loss.through == "one":
            picture = base.decode(base.clean(x, t, prediction), checkpoint=c.loss.checkpoint_decode)
            terms["identity"] = c.loss.identity * self._identity(picture, wanted, keep)
        return terms

    def _where(self, batch: Batch, latents: Tensor) -> Tensor | None:
        """Weights of L_diff's places; None: all alike."""
        if self.config.loss.face_weight == 0:
            return None
        if PARTS not in batch.extra:
            raise InputError(
                "settings: loss.face_weight wants the parsing of the faces, which this data lacks; prepare it with "
                "--system pulid --parsing FILE, or set loss.face_weight=0"
            )
        return face_weights(batch.extra[PARTS].to(latents.device), latents.shape[-2:], self.config.loss.face_weight)

    def _size(self, batch: Batch, base: Base, latents: Tensor) -> tuple[int, int]:
        """Height and width of the batch's pictures in pixels."""
        if batch.pixels is not None:
            return tuple(batch.pixels.shape[-2:])
        edge = self.config.model.resolution
        _, h, w = base.latent_shape(edge, edge)
        return latents.shape[-2] * edge // h, latents.shape[-1] * edge // w

    def _tokens_of_nobody(self, batch: Batch) -> Tensor:
        """The encoder on zeros, [1, L, E], with gradient: what stands in the unconditional half at inference."""
        seen = features_of(batch)
        return self.module(
            PuLIDFeatures(torch.zeros_like(seen.id_cond[:1]), tuple(torch.zeros_like(h[:1]) for h in seen.hidden))
        )

    def _four_steps(self, batch: Batch, step: Step, tokens: Tensor, wanted: Any) -> dict[str, Tensor]:
        """Sections 3.4 and 3.5: from pure noise to a picture, without guidance."""
        c = self.config.loss
        person = self.fast_injection.person(tokens)
        if self.stage == 2:
            walk = self._walk(batch, step, person, "identity", c.identity_prompt, align=False)
            return {"identity": c.identity * self._identity(self._decoded(walk), wanted)}
        prompt = self.alignment_prompts[step.choice("alignment prompt", len(self.alignment_prompts))]
        if c.passes == "shared":
            walk = self._walk(batch, step, person, "identity", prompt, align=True)
            identity = c.identity * self._identity(self._decoded(walk), wanted)
            return {"identity": identity, **self._alignment(walk)}
        twice = 2.0 if c.passes == "alternate" else 1.0
        terms: dict[str, Tensor] = {}
        if c.passes == "both" or step.index % 2 == 0:
            walk = self._walk(batch, step, person, "identity", c.identity_prompt, align=False)
            terms["identity"] = twice * c.identity * self._identity(self._decoded(walk), wanted)
        if c.passes == "both" or step.index % 2 == 1:
            walk = self._walk(batch, step, person, "alignment", prompt, align=True)
            terms |= {k: twice * v for k, v in self._alignment(walk).items()}
        return terms

    def _walk(self, batch: Batch, step: Step, person: Person, tag: str, prompt: str, *, align: bool) -> Walk:
        edge = self.config.model.resolution
        noise = step.normal(f"{tag} noise", batch.places, self.fast.latent_shape(edge, edge))
        text: Text = self.fast.text([prompt], edge, edge).expand(len(batch))
        options = self.config.loss.alignment() if align else None
        return through_steps(self.fast, self.fast_injection, person, text, noise, self.through, align=options)

    def _decoded(self, walk: Walk) -> Tensor:
        return self.fast.decode(walk.latents, checkpoint=self.through.checkpoint_decode)

    def _identity(self, pictures: Tensor, wanted: tuple[Tensor, Tensor], keep: Tensor | None = None) -> Tensor:
        """Equation 6. Samples without a face in their own picture, or whose identity was dropped, count 0."""
        embeddings, known = wanted
        weight = known.float() if keep is None else known.float() * keep.to(known.device)
        term: IdentityTerm = self.judge(pictures, embeddings, weight)
        seen = term.found & (weight > 0).to(term.found.device)
        self._logs["faces_found"] = float(term.found.float().mean())
        if bool(seen.any()):
            self._logs["identity_distance"] = float(term.distance[seen].mean())
            self._logs["identity_similarity"] = float(term.similarity[seen].mean())
        return term.loss

    def _alignment(self, walk: Walk) -> dict[str, Tensor]:
        """Equations 3 to 5, as one term for each half."""
        self._logs |= {k: float(v.detach().mean()) for k, v in walk.alignment.items()}
        options = self.config.loss.alignment()
        return {name: alignment_loss({name: value}, options) for name, value in walk.alignment.items()}

    def _wanted(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """phi(C_id): the recogniser's embeddings of the samples' own pictures, and whether there is one."""
        if "embedding" in batch.face:
            known = batch.face["embedding"].reshape(len(batch), -1)
            return known, torch.ones(len(batch), dtype=torch.bool)
        return self.judge.reference(self._shown(batch), batch.extra.get("landmarks"))

    @torch.no_grad()
    def _shown(self, batch: Batch) -> Tensor:
        """The samples' own pictures [B, 3, H, W]; where latents alone are cached, decoded from them."""
        if batch.pixels is not None:
            return batch.pixels.to(self.base.device)
        return self.base.decode(batch.latents.to(self.base.device))

    # -- what the loop asks besides ------------------------------------------------------------------------

    def logs(self) -> Mapping[str, float]:
        return self._logs

    def validate(self, step: Step) -> Validation:
        if self.validator is None:
            return Validation()
        self.module.eval()
        try:
            return self.validator(self, step)
        finally:
            self.module.train()

    def state(self) -> dict[str, Any]:
        return {"stage": self.stage}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Raises InputError for a checkpoint of another stage."""
        if state.get("stage") != self.stage:
            raise InputError(f"the checkpoint is of stage {state.get('stage')}, this is stage {self.stage}")

    def export(self, folder: Path, facts: Mapping[str, Any]) -> list[Path]:
        """The weights as published, the result's settings, and the model card; see `result.export`."""
        from .result import export

        return export(self, folder, facts)

    def close(self) -> None:
        """Take the injections off the bases; they are as they were."""
        self.injection.remove()
        self.fast_injection.remove()


def features_of(batch: Batch) -> PuLIDFeatures:
    """What the encoder reads, of one photo of each sample, float32. Raises InputError where the data lacks it."""
    seen = pulid_features(batch.face)
    return PuLIDFeatures(seen.id_cond.float(), tuple(h.float() for h in seen.hidden))
