"""The Triton kernels of `id_attention` in the interpreter: odd shapes and random calls. Run by test_triton.py."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from cases import Case, build, check_backward, check_forward, poisoned

ROWS = (1, 3, 33, 63, 77, 4097)
TOKENS = (1, 4, 5, 10, 16, 32, 37)
DTYPES = (torch.float32, torch.float16)
MERGES = ("add", "ortho", "ortho_v2")


def both_directions(kernels, c: Case) -> None:
    """Forward into a poisoned result and, where gradients are well-conditioned, backward."""
    a, truth = build(c)
    out, _ = poisoned(a.q)
    check_forward(c, kernels.forward(a, out), a, truth)
    # With one row, or one token of text, h and i are proportional and alpha's gradient is 0, the difference of large
    # terms: no arithmetic gives it well, so such calls say nothing about the kernels.
    if c.merge == "add" or (c.lq > 1 and c.lt > 1):
        g = torch.randn(a.q.shape, generator=torch.Generator().manual_seed(c.seed)).to(a.q.dtype)
        check_backward(c, kernels.gradients(a, g), a, truth, g)


def odd(rows: int, tokens: int, dtype: torch.dtype, merge: str) -> Case:
    return Case(merge=merge, dtype=dtype, b=1, h=1, lq=rows, li=(tokens,), rows=(1,), text_rows=1, seed=rows + tokens)


@pytest.mark.parametrize("rows", ROWS[:-1])
def test_odd_shapes(kernels, rows):
    """Every number of tokens; dtypes and merges take turns."""
    i = ROWS.index(rows)
    for j, tokens in enumerate(TOKENS):
        both_directions(kernels, odd(rows, tokens, DTYPES[(i + j) % 2], MERGES[(i + j // 2) % 3]))


@pytest.mark.parametrize("dtype, merge, tokens", [(torch.float32, "ortho_v2", 5), (torch.float16, "ortho", 37)])
def test_many_odd_rows(kernels, dtype, merge, tokens):
    both_directions(kernels, odd(4097, tokens, dtype, merge))


@pytest.mark.nightly
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_all_odd_shapes(kernels, rows, tokens):
    for dtype, merge in itertools.product(DTYPES, MERGES):
        both_directions(kernels, odd(rows, tokens, dtype, merge))


def random_case(seed: int) -> Case:
    """Any shape, layout, dtype and merge."""
    r = random.Random(seed)
    n = r.choice((0, 1, 1, 2, 3))
    b = r.choice((1, 2, 4))
    divisors = [k for k in (1, 2, 4) if b % k == 0]
    zero = r.choice((0, 1, 8, 20))
    return Case(
        merge=r.choice(MERGES), dtype=r.choice(DTYPES), b=b, h=r.choice((1, 2, 3)),
        lq=r.choice((1, 3, 17, 33, 63, 77, 130)), lt=r.choice((1, 5, 77, 80, 129)),
        d=r.choice((8, 40, 64, 80, 128, 160)),
        li=tuple(r.choice((0 if zero else 1, 1, 4, 5, 10, 32, 37)) for _ in range(n)),
        rows=tuple(r.choice(divisors) for _ in range(n)), text_rows=r.choice(divisors), zero=zero,
        num_global=r.choice((1, 5, 40)), scale=r.choice(("tensor", 0.0, -1.5, 1.0)) if n else 1.0,
        mask=n > 0 and r.random() < 0.5, bias=r.random() < 0.2, layout=r.choice(("packed", "plain", "holes", "cut")),
        stages=r.choice((0, 0, 3)), stage_rows=r.choice((1, b)), seed=seed,
    )  # fmt: skip


@pytest.mark.parametrize("block", range(4))
def test_fuzz(kernels, block):
    for seed in range(10 * block, 10 * block + 10):
        both_directions(kernels, random_case(seed))


@pytest.mark.nightly
@pytest.mark.parametrize("block", range(40))
def test_fuzz_long(kernels, block):
    for seed in range(1000 + 50 * block, 1050 + 50 * block):
        both_directions(kernels, random_case(seed))
