"""Shapes of `id_attention` for tests and benchmarks, each with its origin, and seeded inputs for them."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..ops import id_attention
from .eager import eager_id_attention

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MERGES = ("none", "add", "ortho", "ortho_v2")
# How q, K and V lie in memory: views of [B, L, C], contiguous [B, H, L, D], cut from a larger tensor full of NaN, or
# one sample's single head expanded over batch and heads (strides 0).
LAYOUTS = ("tokens", "heads", "cut", "expanded")


@dataclass(frozen=True)
class Case:
    """One call of `id_attention`. merge "none" means no identity at all."""

    op: ClassVar[str] = "id_attention"
    gradients: ClassVar[tuple[str, ...]] = ("q", "k_text", "v_text", "k_id", "v_id", "id_scale")

    name: str
    origin: str
    batch: int = 1
    heads: int = 10
    lq: int = 4096
    lt: int = 77
    head_dim: int = 64
    li: tuple[int, ...] = (32,)
    dtype: str = "fp32"
    merge: str = "ortho_v2"
    num_zero: int = 0
    num_global: int = 5
    text_batch: int = 1
    id_batch: int = 1
    mask: bool = False
    bias: str = ""  # "", "tokens" (one row for all), "full"
    tensor_scale: bool = False
    scale: float = 0.8
    layout: str = "tokens"
    stages: int = 0  # of the text bank; 0: no bank
    stage: str = "one"  # "one" index for all samples, or one for "each"

    @property
    def ill_posed(self) -> bool:
        """Gradients hang on rounding: alpha is a quotient of nearly proportional sums, its gradient their difference.

        That is so for ortho with few image tokens, and with one token of text, where h is the same in every row.
        """
        return self.merge.startswith("ortho") and (self.lq <= 8 or self.lt == 1)

    @property
    def flops(self) -> int:
        """Multiply-adds of the two matrix products of every branch, times 2. Softmax and merge are not counted."""
        keys = self.lt + (0 if self.merge == "none" else sum(self.li))
        return 4 * self.batch * self.heads * self.lq * self.head_dim * keys

    @property
    def backward_flops(self) -> int:
        """Five products where forward has two: scores again, the gradients of P, V, Q and K."""
        return self.flops * 5 // 2

    @property
    def bytes(self) -> int:
        """q, K and V read once and the result written once."""
        size = 4 if self.dtype == "fp32" else 2
        ids = 0 if self.merge == "none" else sum(self.li) * self.id_batch
        rows = 2 * self.batch * self.lq + 2 * (self.lt * self.text_batch + ids)
        return size * rows * self.heads * self.head_dim

    def with_(self, **changes: Any) -> Case:
        """A copy with other values."""
        return replace(self, **changes)

    def inputs(self, seed: int = 0, device: str = "cpu") -> dict[str, Any]:
        """`make_inputs` of this case."""
        return make_inputs(self, seed, device)

    def run(self, given: dict[str, Any], backend: str | None) -> Tensor:
        """The op on a backend. [B, H, Lq, D]"""
        return id_attention(**given, backend=backend)

    def eager(self, given: dict[str, Any]) -> Tensor:
        """The op in ordinary PyTorch. [B, H, Lq, D]"""
        return eager_id_attention(**given)

    def truth(self, given: dict[str, Any]) -> Tensor:
        """The op in the arithmetic of its inputs, which are float64 here: the reference backend."""
        return id_attention(**given, backend="reference")


# The two cross-attention layers of the SDXL UNet at 1024 px: 10 layers of the first, 60 of the second.
SDXL_LAYERS = (
    Case("sdxl-4096x640", "SDXL UNet, 1024 px, down_blocks.1", heads=10, lq=4096),
    Case("sdxl-1024x1280", "SDXL UNet, 1024 px, down_blocks.2 and mid_block", heads=20, lq=1024),
)

MODEL_CASES = (
    *SDXL_LAYERS,
    Case("sd15-4096x320", "SD 1.5 UNet, 512 px, down_blocks.0", heads=8, head_dim=40, lq=4096, li=(4,)),
    Case("sd15-1024x640", "SD 1.5 UNet, 512 px, down_blocks.1", heads=8, head_dim=80, lq=1024, li=(16,)),
    Case("sd15-64x1280", "SD 1.5 UNet, 512 px, mid_block", heads=8, head_dim=160, lq=64, li=(16,)),
)

# Small shapes at which kernels of this kind go wrong: tails of rows, tokens and channels, and counts around 5.
ODD_CASES = (
    Case("one-of-each", "smallest call", heads=1, lq=1, lt=1, head_dim=8, li=(1,)),
    Case("lq33", "a row behind a block of 32", heads=2, lq=33, lt=77, li=(4,)),
    Case("lq63-d40", "head dim of SD 1.5", heads=2, lq=63, head_dim=40, lt=7, li=(5,), num_zero=2),
    Case("lq130-d80", "two chunks of rows", heads=3, lq=130, head_dim=80, li=(16,), mask=True),
    Case("lq257-fewer-than-5", "zero tokens among the first five", heads=2, lq=257, lt=20, li=(3,), num_zero=8),
    Case("three-people", "several identities with regions", batch=2, heads=2, lq=144, li=(32, 5, 16), mask=True),
    Case("halves", "cond and uncond halves of a batch of 4", batch=4, heads=2, lq=40, id_batch=2, text_batch=4),
    Case("long-keys", "more tokens than one prompt has", heads=1, lq=70, lt=1024, li=(1024,)),
    Case("d17", "odd head dim", heads=2, lq=50, head_dim=17, lt=9, li=(6,)),
    Case("d160", "widest head of SD 1.5", heads=1, lq=64, head_dim=160, lt=77, li=(16,), num_zero=16),
    Case("d256", "widest head taken", heads=1, lq=34, head_dim=256, lt=13, li=(7,)),
    Case("masked-prompt", "padding mask over the prompt", batch=2, heads=2, lq=48, bias="tokens"),
    Case("full-bias", "bias per row and head", batch=2, heads=2, lq=37, lt=11, bias="full", text_batch=2),
    Case("only-zero-tokens", "an identity without tokens", heads=2, lq=20, li=(0,), num_zero=4),
)


def random_case(seed: int, dtype: str | None = None) -> Case:
    """A case drawn from everything that the operator allows."""
    r = random.Random(seed)
    batch = r.choice((1, 1, 2, 3, 4, 6)) if r.random() < 0.99 else 0
    divisors = [n for n in range(1, batch + 1) if batch % n == 0] or [1]
    num_zero = r.choice((0, 0, 1, 3, 8, 16))
    low = 0 if num_zero else 1
    return Case(
        name=f"random-{seed}",
        origin=f"random_case({seed})",
        batch=batch,
        heads=r.choice((1, 2, 3)),
        lq=r.choice((0, 1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 160, 257, 300)),
        lt=r.choice((1, 2, 5, 7, 13, 14, 15, 29, 77, 78, 154)),
        head_dim=r.choice((1, 4, 8, 16, 20, 24, 32, 40, 64, 64, 72, 80, 96, 128, 160, 256)),
        li=tuple(r.choice((low, 1, 2, 4, 5, 6, 10, 16, 32, 37)) for _ in range(r.choice((1, 1, 1, 2, 3)))),
        dtype=dtype or r.choice(tuple(DTYPES)),
        merge=r.choice(MERGES[1:]),
        num_zero=num_zero,
        num_global=r.choice((1, 4, 5, 5, 9)),
        text_batch=r.choice(divisors),
        id_batch=r.choice(divisors),
        mask=r.random() < 0.4,
        bias=r.choice(("", "", "", "tokens", "full")),
        tensor_scale=r.random() < 0.3,
        scale=r.choice((0.8, 1.0, 0.0, -0.7, 3.0)),
        layout=r.choice(LAYOUTS),
        stages=r.choice((0, 0, 0, 1, 3)),
        stage=r.choice(("one", "each")),
    )


def laid_out(case: Any, batch: int, length: int, gen: torch.Generator) -> Tensor:
    """Normal numbers [batch, H, length, D] in the case's dtype and layout; what lies around a "cut" tensor is NaN.

    Args:
        case: anything with heads, head_dim, dtype and layout.
    """
    h, d, dtype = case.heads, case.head_dim, DTYPES[case.dtype]
    if case.layout == "expanded":
        one = torch.randn(1, length, 1, d, generator=gen, dtype=torch.float64).to(dtype)
        return one.expand(batch, length, h, d).transpose(1, 2)
    values = torch.randn(batch, length, h, d, generator=gen, dtype=torch.float64).to(dtype)
    if case.layout == "heads":
        return values.transpose(1, 2).contiguous()
    if case.layout == "cut":
        larger = torch.full((batch + 1, length + 2, h + 1, d + 3), float("nan"), dtype=dtype)
        inner = larger[:batch, 1 : 1 + length, 1:, 2 : 2 + d]
        inner.copy_(values)
        return inner.transpose(1, 2)
    return values.transpose(1, 2)


def _text(case: Case, gen: torch.Generator) -> Tensor:
    """[Bt, H, Lt, D], or the bank [S, Bt, H, Lt, D]."""
    rows = laid_out(case, max(1, case.stages) * case.text_batch, case.lt, gen)
    return rows.unflatten(0, (case.stages, case.text_batch)) if case.stages else rows


def make_inputs(case: Case, seed: int = 0, device: str = "cpu") -> dict[str, Any]:
    """Arguments of `id_attention` for a case: q, k_text, v_text, k_id, v_id and the keyword arguments."""
    gen = torch.Generator().manual_seed(seed)
    li = () if case.merge == "none" else case.li
    n, b = len(li), case.batch
    given = {
        "q": laid_out(case, b, case.lq, gen),
        "k_text": _text(case, gen),
        "v_text": _text(case, gen),
        "k_id": tuple(laid_out(case, case.id_batch, length, gen) for length in li),
        "v_id": tuple(laid_out(case, case.id_batch, length, gen) for length in li),
        "id_scale": tuple(case.scale * (1.0 - 0.25 * j) for j in range(n)),
        "id_mask": None,
        "text_bias": None,
        "merge": "add" if case.merge == "none" else case.merge,
        "num_zero": case.num_zero,
        "num_global": case.num_global,
    }
    if case.tensor_scale:
        given["id_scale"] = torch.rand(n, b, generator=gen) * 2 - 0.5
    if case.mask and n:
        mask = torch.rand(n, b, case.lq, generator=gen)
        given["id_mask"] = torch.where(mask < 0.3, torch.zeros_like(mask), mask)
    if case.stages:
        picked = torch.randint(case.stages, (b if case.stage == "each" and b else 1,), generator=gen)
        given["stage"] = picked.to(torch.int32)
    if case.bias == "tokens":
        bias = torch.zeros(b, 1, 1, case.lt)
        bias[..., case.lt // 2 + 1 :] = float("-inf")
        given["text_bias"] = bias
    elif case.bias == "full":
        given["text_bias"] = torch.randn(b, case.heads, case.lq, case.lt, generator=gen)
    return {name: moved(value, device) for name, value in given.items()}


def moved(value: Any, device: str) -> Any:
    """A tensor, or tuple of tensors, on a device with its strides and with what lies around it; others as they are."""
    if isinstance(value, tuple):
        return tuple(moved(v, device) for v in value)
    if not isinstance(value, Tensor) or device == "cpu":
        return value
    whole = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage()).to(device)
    return whole.as_strided(value.shape, value.stride(), value.storage_offset())
