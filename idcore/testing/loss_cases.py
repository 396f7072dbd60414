"""Shapes of `token_attention_loss` and `semantic_alignment` for tests and benchmarks, and seeded inputs for them."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..ops import semantic_alignment, token_attention_loss
from .cases import DTYPES, LAYOUTS, laid_out, moved
from .eager import eager_semantic_alignment, eager_token_attention_loss


@dataclass(frozen=True)
class SemanticCase:
    """One call of `semantic_alignment`."""

    op: ClassVar[str] = "semantic_alignment"
    gradients: ClassVar[tuple[str, ...]] = ("q", "k")

    name: str
    origin: str
    batch: int = 1
    heads: int = 10
    lq: int = 4096
    lt: int = 77
    head_dim: int = 64
    text_batch: int = 1
    dtype: str = "fp32"
    layout: str = "tokens"

    @property
    def flops(self) -> int:
        """Multiply-adds of the two matrix products, times 2."""
        return 4 * self.batch * self.heads * self.lq * self.lt * self.head_dim

    @property
    def backward_flops(self) -> int:
        """Five products where forward has two: scores again, the gradient of P, dq twice, dk."""
        return self.flops * 5 // 2

    @property
    def bytes(self) -> int:
        """q and K read once, the result written once."""
        rows = self.batch * (self.lq + self.lt) + self.text_batch * self.lt
        return (4 if self.dtype == "fp32" else 2) * rows * self.heads * self.head_dim

    def with_(self, **changes: Any) -> Any:
        """A copy with other values."""
        return replace(self, **changes)

    def inputs(self, seed: int = 0, device: str = "cpu") -> dict[str, Any]:
        """q [B, H, Lq, D] and k [Bt, H, Lt, D]."""
        gen = torch.Generator().manual_seed(seed)
        given = {"q": laid_out(self, self.batch, self.lq, gen), "k": laid_out(self, self.text_batch, self.lt, gen)}
        return {name: moved(value, device) for name, value in given.items()}

    def run(self, given: dict[str, Any], backend: str | None) -> Tensor:
        """The op on a backend. [B, H, Lt, D]"""
        return semantic_alignment(**given, backend=backend)

    def eager(self, given: dict[str, Any]) -> Tensor:
        """The definition. [B, H, Lt, D]"""
        return eager_semantic_alignment(**given)

    truth = eager


@dataclass(frozen=True)
class TokenLossCase(SemanticCase):
    """One call of `token_attention_loss`. tokens: "" (all), "bool", "weights" [Lt], "samples" [B, Lt]."""

    op: ClassVar[str] = "token_attention_loss"

    ref_batch: int = 1
    tokens: str = ""

    @property
    def flops(self) -> int:
        """Multiply-adds of the two score products, times 2."""
        return 4 * self.batch * self.heads * self.lq * self.lt * self.head_dim

    @property
    def backward_flops(self) -> int:
        """Four products: both scores again, dq, dk."""
        return self.flops * 2

    @property
    def bytes(self) -> int:
        """q and both K read once."""
        rows = self.batch * self.lq + (self.text_batch + self.ref_batch) * self.lt
        return (4 if self.dtype == "fp32" else 2) * rows * self.heads * self.head_dim

    def inputs(self, seed: int = 0, device: str = "cpu") -> dict[str, Any]:
        """q, k, k_ref and tokens. The keys are alike, as those of two prompts that differ by a word."""
        gen = torch.Generator().manual_seed(seed)
        q, k = laid_out(self, self.batch, self.lq, gen), laid_out(self, self.text_batch, self.lt, gen)
        noise = laid_out(self, self.ref_batch, self.lt, gen)
        k_ref = noise if self.ref_batch != self.text_batch else (k + 0.3 * noise).to(DTYPES[self.dtype])
        given = {"q": q, "k": k, "k_ref": k_ref, "tokens": self._tokens(gen)}
        return {name: moved(value, device) for name, value in given.items()}

    def _tokens(self, gen: torch.Generator) -> Tensor | None:
        if not self.tokens:
            return None
        weights = torch.rand(self.batch if self.tokens == "samples" else 1, self.lt, generator=gen)
        weights = torch.where(weights < 0.5, torch.zeros_like(weights), weights)
        weights[:, -1] = 1.0  # at least one counts
        return weights if self.tokens == "samples" else weights[0] > 0 if self.tokens == "bool" else weights[0]

    def run(self, given: dict[str, Any], backend: str | None) -> Tensor:
        """The op on a backend. []"""
        return token_attention_loss(**given, backend=backend)

    def eager(self, given: dict[str, Any]) -> Tensor:
        """The definition with both maps stored. []"""
        return eager_token_attention_loss(**given)

    truth = eager


# Where PuLID's and SeFi-IDE's losses read: the cross-attention layers of SDXL at 1024 px, of SD 1.5 at 512 px.
SEMANTIC_CASES = (
    SemanticCase("sdxl-4096x640", "SDXL UNet, 1024 px, down_blocks.1"),
    SemanticCase("sdxl-1024x1280", "SDXL UNet, 1024 px, mid_block", heads=20, lq=1024),
)
TOKEN_LOSS_CASES = (
    TokenLossCase("sdxl-4096x640", "SDXL UNet, 1024 px, down_blocks.1"),
    TokenLossCase("sd15-1024x640", "SD 1.5 UNet, 512 px, down_blocks.1", heads=8, lq=1024, head_dim=80),
)

_ROWS = (1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 257)
_TOKENS = (1, 2, 5, 7, 14, 16, 29, 77, 78, 130)
_HEAD_DIMS = (4, 8, 16, 24, 40, 64, 64, 72, 80, 128, 160)


def _drawn(r: random.Random, dtype: str | None) -> dict[str, Any]:
    batch = r.choice((1, 1, 2, 3, 4))
    divisors = [n for n in range(1, batch + 1) if batch % n == 0]
    return dict(
        batch=batch, heads=r.choice((1, 2, 3)), lq=r.choice(_ROWS), lt=r.choice(_TOKENS), head_dim=r.choice(_HEAD_DIMS),
        text_batch=r.choice(divisors), dtype=dtype or r.choice(tuple(DTYPES)), layout=r.choice(LAYOUTS),
    )  # fmt: skip


def random_semantic_case(seed: int, dtype: str | None = None) -> SemanticCase:
    """A case drawn from everything that `semantic_alignment` allows."""
    return SemanticCase(f"random-{seed}", f"random_semantic_case({seed})", **_drawn(random.Random(seed), dtype))


def random_token_loss_case(seed: int, dtype: str | None = None) -> TokenLossCase:
    """A case drawn from everything that `token_attention_loss` allows."""
    r = random.Random(seed)
    drawn = _drawn(r, dtype)
    ref_batch = r.choice([n for n in range(1, drawn["batch"] + 1) if drawn["batch"] % n == 0])
    tokens = r.choice(("", "", "bool", "weights", "samples"))
    return TokenLossCase(
        f"random-{seed}", f"random_token_loss_case({seed})", **drawn, ref_batch=ref_batch, tokens=tokens
    )
