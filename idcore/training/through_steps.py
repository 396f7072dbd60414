"""From pure noise through few steps to a picture, with gradients: where L_id and L_align come from.

PuLID's second branch (arXiv 2404.16022, 3.4): the whole denoising in 4 steps without guidance. The path with identity
carries gradients through its last n steps (table 3); the path without identity runs beside it, step by step, where the
alignment is wanted, and carries none: nothing in it is trained.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..errors import InputError
from .contract import Base, FewSteps, Text
from .injection import Injection, Person, Tap
from .losses.alignment import AlignmentOptions, Comparison, Reference


@dataclass(frozen=True)
class Through:
    """How the steps are run.

    Attributes:
        steps: of the few-step sampler (4: the paper).
        gradient_steps: the last n of them carry gradients; all by default, as the paper implies.
        checkpoint_steps: keep only each step's input, and run its UNet again in backward: the memory of one step in
            place of n, for a third more time. Our choice: on.
        checkpoint_unet: also recompute the UNet's blocks one by one (`Injection.checkpointing`): the memory of one
            block, for another third.
        checkpoint_decode: recompute the autoencoder's blocks.
    """

    steps: int = 4
    gradient_steps: int = 4
    checkpoint_steps: bool = True
    checkpoint_unet: bool = False
    checkpoint_decode: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= 100 or not 0 <= self.gradient_steps <= self.steps:
            raise InputError(
                f"through steps: wanted 1..100 steps and 0..steps of them with gradients, got {self.steps} and "
                f"{self.gradient_steps}"
            )


@dataclass(eq=False)
class Walk:
    """What came out.

    Attributes:
        latents: at the end, [B, C, h, w].
        alignment: "semantic" and "layout" [B], the means over the steps that carry gradients, not weighted; empty where
            it was not asked for.
        plain: latents of the path without identity, where it ran; no gradient.
    """

    latents: Tensor
    alignment: dict[str, Tensor] = field(default_factory=dict)
    plain: Tensor | None = None


def through_steps(
    base: Base,
    injection: Injection,
    person: Person,
    text: Text,
    noise: Tensor,
    options: Through | None = None,
    *,
    align: AlignmentOptions | None = None,
    few: FewSteps | None = None,
) -> Walk:
    """Run the few steps with an identity, and without it beside where `align` is given.

    Args:
        base: the frozen model; `injection` is on its UNet.
        person: the identities, of the batch's size (`Injection.person`).
        text: encoded prompt, one row per sample; the same for both paths.
        noise: standard normal [B, C, h, w]; both paths start from it.
        align: gather L_align's distances at every layer of the steps that carry gradients. Steps without gradients
            have no part in it: nothing could be learnt there.
        few: the sampler, where `base.few_steps(steps)` is not wanted.

    Raises:
        InputError: no step carries gradients and an alignment is wanted.
    """
    options = options or Through()
    if align is not None and options.gradient_steps == 0:
        raise InputError("through steps: an alignment was asked for, but gradient_steps is 0; set at least 1")
    walker = _Walker(base, injection, person, text, few or base.few_steps(options.steps), options, align)
    return walker.run(noise)


class _Walker:
    def __init__(
        self,
        base: Base,
        injection: Injection,
        person: Person,
        text: Text,
        few: FewSteps,
        options: Through,
        align: AlignmentOptions | None,
    ) -> None:
        self.base, self.injection, self.person, self.text = base, injection, person, text
        self.few, self.options, self.align = few, options, align

    def run(self, noise: Tensor) -> Walk:
        noise = noise.to(self.base.device)
        x = plain = self.few.start(noise)
        memory = plain_memory = None
        first = self.options.steps - self.options.gradient_steps
        found: list[dict[str, Tensor]] = []
        for i in range(self.options.steps):
            if i < first:
                with torch.no_grad():
                    x, memory, _ = self._step(i, x, memory, None)
                    if self.align is not None:
                        plain, plain_memory = self._move(i, plain, plain_memory, None, None)
                continue
            reference = None
            if self.align is not None:
                reference = Reference(self.align)
                with torch.no_grad():
                    plain, plain_memory = self._move(i, plain, plain_memory, None, reference)
            x, memory, terms = self._kept(i, x, memory, reference)
            found.append(terms)
        means = {name: torch.stack([f[name] for f in found]).mean(0) for name in (found[0] if found else ())}
        return Walk(x, means, plain if self.align is not None else None)

    def _kept(self, i: int, x: Tensor, memory: Any, reference: Reference | None) -> tuple[Tensor, Any, dict]:
        """A step with gradients: everything kept, or its input alone."""
        if not self.options.checkpoint_steps:
            return self._step(i, x, memory, reference)
        return checkpoint(self._step, i, x, memory, reference, use_reentrant=False, preserve_rng_state=False)

    def _step(self, i: int, x: Tensor, memory: Any, reference: Reference | None) -> tuple[Tensor, Any, dict]:
        # Distances are made in the step itself, so that a checkpointed one keeps no queries.
        tap = None if reference is None else Comparison(reference)
        # Set here, since a checkpointed step runs again in backward.
        with self.injection.checkpointed(self.options.checkpoint_unet):
            x, memory = self._move(i, x, memory, self.person, tap)
        return x, memory, {} if tap is None else tap.totals()

    def _move(self, i: int, x: Tensor, memory: Any, person: Person | None, tap: Tap | None) -> tuple[Tensor, Any]:
        t = self.few.times[i].to(x.device).expand(len(x))
        with self.injection.using(person, tap):
            prediction = self.base.predict(self.few.scaled(i, x), t, self.text)
        return self.few.advance(i, x, prediction, memory)
