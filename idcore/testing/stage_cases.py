"""Shapes of `stage_tokens` for tests and benchmarks, and seeded inputs for them."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..ops import stage_tokens
from .cases import DTYPES, moved
from .eager import eager_stage_tokens


@dataclass(frozen=True)
class StageTokensCase:
    """One call of `stage_tokens`. picked: "" (all stages), "one" (a stage for all samples), "each" (one per sample)."""

    op: ClassVar[str] = "stage_tokens"
    gradients: ClassVar[tuple[str, ...]] = ("embeddings", "tokens")

    name: str
    origin: str
    batch: int = 1
    length: int = 77
    width: int = 1280
    stages: int = 10
    count: int = 1
    token_batch: int = 1
    shared_positions: bool = False
    left_out: bool = False
    picked: str = ""
    dtype: str = "fp32"

    @property
    def flops(self) -> int:
        """Nothing is multiplied."""
        return 0

    backward_flops = flops

    @property
    def bytes(self) -> int:
        """Embeddings and the tokens wanted read once, the result written once."""
        stages = 1 if self.picked else self.stages
        rows = self.batch * self.length * (1 + stages) + stages * self.token_batch * self.count
        return (4 if self.dtype == "fp32" else 2) * rows * self.width

    def with_(self, **changes: Any) -> StageTokensCase:
        """A copy with other values."""
        return replace(self, **changes)

    def inputs(self, seed: int = 0, device: str = "cpu") -> dict[str, Any]:
        """embeddings [B, L, E], tokens [S, Bt, T, E], positions [1 or B, T], stage."""
        gen, dtype = torch.Generator().manual_seed(seed), DTYPES[self.dtype]
        rows = 1 if self.shared_positions else self.batch
        positions = torch.stack([torch.randperm(self.length, generator=gen)[: self.count] for _ in range(rows)])
        if self.left_out:
            positions[:, -1] = -1
        stage = None
        if self.picked:
            stage = torch.randint(self.stages, (self.batch if self.picked == "each" else 1,), generator=gen)
        given = {
            "embeddings": torch.randn(self.batch, self.length, self.width, generator=gen).to(dtype),
            "tokens": torch.randn(self.stages, self.token_batch, self.count, self.width, generator=gen).to(dtype),
            "positions": positions, "stage": stage,
        }  # fmt: skip
        return {name: moved(value, device) for name, value in given.items()}

    def run(self, given: dict[str, Any], backend: str | None) -> Tensor:
        """The op on a backend."""
        return stage_tokens(**given, backend=backend)

    def eager(self, given: dict[str, Any]) -> Tensor:
        """The definition by indexing."""
        return eager_stage_tokens(**given)

    truth = eager


# SDXL's second text encoder: five stages of one token for keys and one for values.
STAGE_CASES = (
    StageTokensCase("sdxl-77x1280", "SeFi-IDE on SDXL's second text encoder", batch=2),
    StageTokensCase("sd15-77x768", "SeFi-IDE on SD 1.5's text encoder", width=768, batch=8, token_batch=8),
)


def random_stage_case(seed: int, dtype: str | None = None) -> StageTokensCase:
    """A case drawn from everything that `stage_tokens` allows."""
    r = random.Random(seed)
    batch, length = r.choice((1, 1, 2, 3, 4, 6)), r.choice((1, 2, 7, 16, 77))
    return StageTokensCase(
        f"random-{seed}", f"random_stage_case({seed})", batch=batch, length=length,
        width=r.choice((3, 8, 31, 64, 129, 768)), stages=r.choice((1, 2, 5, 10)),
        count=min(length, r.choice((1, 1, 2, 3, 5))),
        token_batch=r.choice([n for n in range(1, batch + 1) if batch % n == 0]),
        shared_positions=r.random() < 0.5, left_out=r.random() < 0.3, picked=r.choice(("", "", "one", "each")),
        dtype=dtype or r.choice(tuple(DTYPES)),
    )  # fmt: skip
