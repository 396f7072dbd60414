"""What the parts of training hand to each other: a batch, a step's random numbers, a frozen base model, a task.

data      gives Batches              (training/data/)
base      a frozen text-to-image model (training/bases/)
task      one system's losses        (training/pulid.py, ...)
loop      optimises any task         (training/loop.py); knows no system and no diffusion
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(eq=False)
class Batch:
    """One micro batch of one process.

    Attributes:
        ids: names of the records in the prepared data, B of them.
        places: [B] int64: place of each sample in the step's global batch. Random numbers hang on it, so that one
            process with batch 2 n and two with batch n see the same noise.
        prompts: captions, before any is dropped.
        pixels: [B, 3, H, W] float32 in -1..1, or None where `latents` are cached.
        latents: [B, C, h, w] float32, scaled as the UNet wants them, or None.
        sizes: [B, 6] float32: original height, width; crop top, left; target height, width (SDXL's time ids).
        face: what the system's frozen face networks saw of each sample's face, tensors [B, ...] by name.
        extra: anything else that a data source adds, by name (face boxes, landmarks [B, 5, 2] in pixels, and
            "parts", uint8 [B, H, W], classes of face parsing where it was prepared).
    """

    ids: list[str]
    places: Tensor
    prompts: list[str]
    pixels: Tensor | None = None
    latents: Tensor | None = None
    sizes: Tensor | None = None
    face: dict[str, Tensor] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Step:
    """One optimiser step, and the only source of random numbers in a task: all hang on (seed, index, place, tag).

    Attributes:
        seed: of the run.
        index: number of the optimiser step, from 0.
        total: steps of the run.
        rank, world: this process, and how many there are.
    """

    seed: int
    index: int
    total: int
    rank: int = 0
    world: int = 1

    def generator(self, tag: str, place: int = -1) -> torch.Generator:
        """A generator on the CPU of its own for each tag and place; place -1: the same in all processes."""
        words = np.random.SeedSequence([self.seed, self.index, place + 1, zlib.crc32(tag.encode())])
        return torch.Generator().manual_seed(int(words.generate_state(1, np.uint64)[0] >> np.uint64(1)))

    def normal(self, tag: str, places: Tensor, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers [B, *shape], float32 on the CPU, a row per place."""
        return torch.stack([torch.randn(tuple(shape), generator=self.generator(tag, p)) for p in places.tolist()])

    def uniform(self, tag: str, places: Tensor) -> Tensor:
        """Numbers in 0..1 [B], float32 on the CPU."""
        return torch.stack([torch.rand((), generator=self.generator(tag, p)) for p in places.tolist()])

    def choice(self, tag: str, count: int) -> int:
        """A number below `count`, the same in all processes."""
        return int(torch.randint(count, (), generator=self.generator(tag)))


@dataclass(eq=False)
class Text:
    """Encoded prompts: `embeds` [B, L, E], `pooled` [B, P] or None, and further conditions [B, ...] of the UNet by
    name (`time_ids` for SDXL)."""

    embeds: Tensor
    pooled: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)

    def map(self, fn: Any) -> Text:
        """The same with `fn` applied to every tensor."""
        pooled = None if self.pooled is None else fn(self.pooled)
        return Text(fn(self.embeds), pooled, {k: fn(v) for k, v in self.extra.items()})

    def expand(self, rows: int) -> Text:
        """One prompt for `rows` samples."""
        return self.map(lambda t: t.expand(rows, *t.shape[1:]))


@runtime_checkable
class Base(Protocol):
    """A frozen text-to-image model. Nothing of it is trained; gradients pass through `predict` and `decode`.

    The identity acts through what is put on `unet` (`training/injection.py`), not through an argument.
    """

    name: str  # for checkpoints and the model card
    unet: nn.Module
    prediction: str  # what `predict` gives: "epsilon", "v_prediction" or "sample" (the clean picture)

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a picture."""
        ...

    def encode_pictures(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in -1..1 to latents [B, C, h, w] float32, no gradient."""
        ...

    def decode(self, latents: Tensor, *, checkpoint: bool = False) -> Tensor:
        """Latents to pixels [B, 3, H, W] in about -1..1, float32, with gradients; `checkpoint` saves memory."""
        ...

    def text(self, prompts: Sequence[str], height: int, width: int, sizes: Tensor | None = None) -> Text:
        """Encode prompts with the frozen text encoders, no gradient; `sizes` [B, 6] as in `Batch`."""
        ...

    def noised(self, latents: Tensor, noise: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """(x_t, t) at the noise levels that u [B] in 0..1 picks (u uniform: the training's own distribution)."""
        ...

    def predict(self, x: Tensor, t: Tensor, text: Text) -> Tensor:
        """The UNet's output for x [B, C, h, w] at t [B]."""
        ...

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What `predict` should give (epsilon, velocity or the clean picture, as this model was trained)."""
        ...

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio [B] at t."""
        ...

    def clean(self, x: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        """The clean latents that a prediction means."""
        ...

    def few_steps(self, count: int = 4) -> FewSteps:
        """The few-step sampler of this model."""
        ...


class FewSteps(Protocol):
    """A few-step sampler without a state of its own: what one step must remember is handed to the next."""

    times: Tensor  # [count], as `Base.predict` takes them

    def start(self, noise: Tensor) -> Tensor:
        """Standard normal noise to the first x."""
        ...

    def scaled(self, i: int, x: Tensor) -> Tensor:
        """What the UNet gets at step i."""
        ...

    def advance(self, i: int, x: Tensor, prediction: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """x after step i, and what step i + 1 wants to remember (None at the start); with gradients."""
        ...


@dataclass
class Validation:
    """What a task shows in between: PIL pictures by file name (without suffix), and measures by name."""

    pictures: dict[str, Any] = field(default_factory=dict)
    measures: dict[str, float] = field(default_factory=dict)


@runtime_checkable
class Task(Protocol):
    """One system's training. The loop calls `losses` on micro batches and optimises `module`.

    A task may also have `enough(step: int) -> bool`, asked after every validation: True ends the run as if this were
    its last step. And `uses_all = True` where each step's loss depends on every parameter of `module`: several
    processes then need not look for those that were left out, step by step.
    """

    name: str
    module: nn.Module
    """All that is trained, and nothing else: its state dict is the checkpoint. Frozen models stay outside of it."""

    def losses(self, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        """Weighted terms, each the mean over the micro batch's samples; the loop backpropagates their sum."""
        ...

    def logs(self) -> Mapping[str, float]:
        """Unweighted figures of the last `losses` (identity similarity, alignment distance, ...)."""
        ...

    def validate(self, step: Step) -> Validation:
        """Pictures and measures of the module as it is now (the loop swaps the average's weights in before)."""
        ...

    def state(self) -> dict[str, Any]:
        """What else a resumed run needs, as JSON; usually {}."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None: ...

    def export(self, folder: Path, facts: Mapping[str, Any]) -> list[Path]:
        """Write the result in its published layout, and a model card from `facts` (what the loop knows of the run)."""
        ...


class Source(Protocol):
    """Prepared data. Stateless: the order is a function of (seed, step), so resuming needs the step's number alone."""

    def __len__(self) -> int:
        """Records."""
        ...

    def micro_batches(self, step: int, seed: int, rank: int, world: int, size: int, count: int) -> Iterator[Batch]:
        """The `count` micro batches of `size` samples of this rank for one optimiser step.

        The global batch has world * size * count samples in one order for any (world, size, count) of that product;
        rank r, micro batch m holds places (m * world + r) * size and on.
        """
        ...

    def state(self) -> dict[str, Any]:
        """Fingerprint of the data, kept in checkpoints; resuming on other data is refused."""
        ...
