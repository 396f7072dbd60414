"""Triton kernels in the interpreter (CPU) against float64: forward and backward.

Run by test_triton.py in a process of its own: Triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import math
import random

import pytest
import torch
from cases import Case, build, check_backward, check_forward, poisoned
from idcore.kernels import launch, launch_bwd

from idcore import id_attention
from idcore.backends import reference
from idcore.ops.semantic_alignment import semantic_alignment
from idcore.ops.token_attention_loss import token_attention_loss


@pytest.fixture(scope="module")
def kernels():
    """Modules that launch forward and backward, their kernels interpreted."""
    if not launch.INTERPRETED:
        pytest.fail("set TRITON_INTERPRET=1 before Python starts (test_triton.py does)")
    return launch, launch_bwd


BASE = Case()
TWO = dict(li=(5, 32), rows=(1, 2), scale=(0.7, -0.4))
FORWARD = {
    "add": BASE,
    "ortho": BASE.with_(merge="ortho", **TWO, mask=True),
    "ortho_v2": BASE.with_(merge="ortho_v2", **TWO, mask=True),
    "half add": BASE.with_(dtype=torch.float16, scale="tensor", layout="plain"),
    "half ortho_v2": BASE.with_(dtype=torch.float16, merge="ortho_v2", layout="cut"),
    "half ortho": BASE.with_(dtype=torch.float16, merge="ortho"),
    "bfloat16 upcast": BASE.with_(dtype=torch.bfloat16, merge="ortho_v2"),
    "one row, fewer tokens than five": BASE.with_(merge="ortho_v2", lq=1, li=(1,), zero=9, d=40),
    "three rows, no zero tokens": BASE.with_(merge="ortho_v2", lq=3, li=(4,), zero=0, d=80),
    "63 rows, 10 tokens": BASE.with_(lq=63, li=(10,), layout="holes"),
    "77 rows, 16 tokens": BASE.with_(merge="ortho", lq=77, li=(16,), d=16),
    "37 tokens, wide head": BASE.with_(merge="ortho_v2", lq=33, li=(37,), d=160),
    "4097 rows": BASE.with_(merge="ortho_v2", b=1, h=1, lq=4097, rows=(1,), text_rows=1),
    "identity without tokens": BASE.with_(merge="ortho_v2", li=(0, 5), rows=(2, 2), scale=(1.0, 1.0), zero=3),
    "no identity": BASE.with_(merge="ortho", li=(), rows=(), scale=1.0),
    "scale 0": BASE.with_(merge="ortho_v2", scale=0.0),
    "bias, long text": BASE.with_(bias=True, lt=150, scale="tensor", mask=True),
    "cond and uncond halves": BASE.with_(b=4, rows=(2,), text_rows=1),
    "stage bank": BASE.with_(merge="ortho_v2", stages=5, layout="cut"),
    "half stage bank, a stage each": BASE.with_(
        b=4, text_rows=2, stages=3, stage_rows=4, lq=63, rows=(1,), dtype=torch.float16
    ),
    "num_global above all": BASE.with_(merge="ortho_v2", li=(3,), zero=2, num_global=9),
}
BACKWARD = {
    "add": BASE.with_(**TWO, mask=True),
    "ortho": BASE.with_(merge="ortho", **TWO, mask=True),
    "ortho_v2": BASE.with_(merge="ortho_v2", **TWO, mask=True, text_rows=1),
    "half add": BASE.with_(dtype=torch.float16, scale="tensor"),
    "half ortho_v2": BASE.with_(dtype=torch.float16, merge="ortho_v2", layout="cut"),
    "one row": BASE.with_(lq=1, li=(1,), zero=9, d=40),
    "fewer tokens than five": BASE.with_(merge="ortho_v2", lq=17, li=(1,), zero=9, d=40),
    "300 rows, holes, bias": BASE.with_(merge="ortho_v2", b=1, h=1, lq=300, li=(4,), rows=(1,), text_rows=1,
                                        zero=0,
                                        layout="holes", bias=True, d=80),
    "identity without tokens": BASE.with_(merge="ortho_v2", li=(0, 5), rows=(2, 2), scale=(1.0, 0.0), zero=3),
    "no identity": BASE.with_(li=(), rows=(), scale=1.0),
    "stage bank": BASE.with_(merge="ortho", stages=3, text_rows=1),
    "half stage bank, a stage each": BASE.with_(b=4, text_rows=2, stages=3, stage_rows=4, lq=63,
                                                rows=(1,), dtype=torch.float16),
}  # fmt: skip


@pytest.mark.parametrize("name", FORWARD)
def test_forward(kernels, name):
    c = FORWARD[name]
    a, truth = build(c)
    out, frame = poisoned(a.q)
    kernels[0].forward(a, out)
    check_forward(c, out, a, truth)
    assert frame[:, 0].isnan().all() and frame[:, -1].isnan().all(), "wrote outside its result"


@pytest.mark.parametrize("name", BACKWARD)
def test_backward(kernels, name):
    c = BACKWARD[name]
    a, truth = build(c)
    g = torch.randn(a.q.shape, generator=torch.Generator().manual_seed(1)).to(a.q.dtype)
    check_backward(c, gradients(kernels, a, g), a, truth, g)


def gradients(kernels, a, g):
    """What `backward` makes of the statistics that forward kept."""
    return kernels[1].backward(a, g, kernels[0].forward_stats(a)[1])


def test_a_stage_outside_the_bank_is_the_nearest(kernels):
    a, _ = build(BASE.with_(stages=3, b=1, rows=(1,), text_rows=1))
    outside = a._replace(stage=torch.tensor([7], dtype=torch.int32))
    assert torch.equal(kernels[0].forward(a), kernels[0].forward(outside))


def test_statistics_are_those_of_the_contract(kernels):
    a, _ = build(BASE.with_(merge="ortho_v2", **TWO))
    g = torch.randn(a.q.shape)
    out, stats = kernels[0].forward_stats(a)
    assert torch.equal(out, kernels[0].forward(a))
    for name, ours, truth in zip(stats._fields, stats, expected_stats(a)):
        assert ours.shape == truth.shape and (ours - truth).abs().max() <= 1e-5 * truth.abs().max(), name
    kept = kernels[1].backward(a, g, stats)
    partly = kernels[1].backward(a, g, stats, text_kv=False, id_kv=False)
    assert partly[1:5] == (None, None, [None, None], [None, None]) and torch.equal(partly[0], kept[0])


def expected_stats(a):
    """`call.Stats` by the reference's pieces."""
    h, _ = reference.text_attention(a)
    parts = [reference.branch(a, j) for j in range(len(a.k_id))]
    text = a.q @ reference.rows(a.k_text, a.q.shape[0]).mT / a.q.shape[-1] ** 0.5

    def lse(x, zeros):
        return torch.logsumexp(torch.cat([x, x.new_zeros(*x.shape[:-1], zeros)], -1), -1) / math.log(2)

    share = [reference.global_share(a, raw)[0].flatten(1) for _, _, raw in parts]
    alpha, den = zip(*(reference.ratio(h, i, reference.weight(a, j)) for j, (i, _, _) in enumerate(parts)))
    scaled = [lse(raw / a.q.shape[-1] ** 0.5, a.num_zero) for _, _, raw in parts]
    raws = [lse(raw, a.num_zero) for _, _, raw in parts]
    channels = [torch.stack(x).squeeze(-2) for x in (alpha, den)]
    return lse(text, 0), torch.stack(scaled), torch.stack(raws), torch.stack(share), *channels


def test_the_op_takes_the_backend_for_both_directions(kernels):
    a, truth = build(BASE.with_(merge="ortho_v2"))
    q = a.q.detach().requires_grad_()
    out = id_attention(
        q, a.k_text, a.v_text, a.k_id, a.v_id, id_scale=0.8, merge="ortho_v2", num_zero=8, backend="triton"
    )
    check_forward(BASE, out.detach(), a, truth)
    out.sum().backward()
    expected = torch.autograd.grad(
        id_attention(
            q, a.k_text, a.v_text, a.k_id, a.v_id, id_scale=0.8, merge="ortho_v2", num_zero=8, backend="reference"
        ).sum(),
        q,
    )[0]
    assert (q.grad - expected).abs().max() < 2e-5


def loss_inputs(dtype, lq=130, lt=77, d=64, b=2):
    """q, k, k_ref of two similar prompts, and weights of the tokens."""
    g = torch.Generator().manual_seed(3)
    q = torch.randn(b, lq, 2 * d, generator=g).view(b, lq, 2, d).transpose(1, 2)
    k = torch.randn(b, 2, lt, d, generator=g)
    k_ref = (k + 0.3 * torch.randn(k.shape, generator=g))[:1]
    return [t.to(dtype) for t in (q, k, k_ref)], torch.rand(b, lt, generator=g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [{}, dict(lq=1, lt=5, d=40), dict(lq=300, lt=130, d=80)], ids=str)
def test_token_attention_loss(kernels, dtype, shape):
    tensors, tokens = loss_inputs(dtype, **shape)
    results = []
    for backend, to in (("triton", dtype), ("reference", torch.float64), ("reference", dtype)):
        q, k, k_ref = (t.to(to) for t in tensors)
        q, k = q.requires_grad_(), k.requires_grad_()
        loss = token_attention_loss(q, k, k_ref, tokens=tokens, backend=backend)
        results.append((loss.detach(), *torch.autograd.grad(loss, (q, k))))
    for ours, truth, eager in zip(*results, strict=True):
        size = truth.abs().max().item()
        assert ours.shape == truth.shape and size > 0
        limit = 3 * (eager - truth).abs().max().item() + (2e-6 if dtype == torch.float32 else 2e-3) * size
        assert (ours - truth).abs().max().item() <= limit + torch.finfo(torch.float32).tiny


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [{}, dict(lq=1, lt=5, d=40), dict(lq=700, lt=130, d=80)], ids=str)
def test_semantic_alignment(kernels, dtype, shape):
    tensors, _ = loss_inputs(dtype, **shape)
    g = torch.randn(tensors[0].shape[0], 2, tensors[1].shape[2], tensors[0].shape[3])
    results = []
    for backend, to in (("triton", dtype), ("sdpa", torch.float64), ("sdpa", dtype)):
        q, k = (t.to(to).requires_grad_() for t in (tensors[0], tensors[2]))
        out = semantic_alignment(q, k, backend=backend)
        results.append((out.detach(), *torch.autograd.grad(out, (q, k), g.to(dtype).to(to))))
    for ours, truth, eager in zip(*results, strict=True):
        limit = 3 * (eager - truth).abs().max().item() + (3e-6 if dtype == torch.float32 else 1e-3)
        assert ours.shape == truth.shape
        assert (ours - truth).abs().max().item() <= limit * max(1.0, truth.abs().max().item())


def random_case(seed: int) -> Case:
    """Any shape, layout, dtype and merge."""
    r = random.Random(seed)
    n = r.choice((0, 1, 1, 2, 3))
    b = r.choice((1, 2, 4))
    divisors = [k for k in (1, 2, 4) if b % k == 0]
    zero = r.choice((0, 1, 8, 20))
    return Case(
        merge=r.choice(("add", "ortho", "ortho_v2")), dtype=r.choice((torch.float32, torch.float16)), b=b,
        h=r.choice((1, 2, 3)), lq=r.choice((1, 3, 17, 33, 63, 77, 130)), lt=r.choice((1, 5, 77, 80, 129)),
        d=r.choice((8, 40, 64, 80, 128, 160)), li=tuple(r.choice((0 if zero else 1, 1, 4, 5, 10, 32,
                                                                  37)) for _ in range(n)),
        rows=tuple(r.choice(divisors) for _ in range(n)), text_rows=r.choice(divisors), zero=zero,
        num_global=r.choice((1, 5, 40)), scale=r.choice(("tensor", 0.0, -1.5, 1.0)) if n else 1.0,
        mask=n > 0 and r.random() < 0.5, bias=r.random() < 0.2, layout=r.choice(("packed", "plain", "holes",
                                                                                 "cut")), seed=seed,
    )  # fmt: skip


def fuzz(kernels, seed: int) -> None:
    c = random_case(seed)
    a, truth = build(c)
    out, _ = poisoned(a.q)
    check_forward(c, kernels[0].forward(a, out), a, truth)
    # With one token of text or a few rows alpha is a quotient of two nearly proportional sums, and its
    # gradient the
    # difference of large terms: no float32 arithmetic gives it well, so such calls say nothing about the
    # kernels.
    if seed % 4 == 0 and (c.merge == "add" or (c.lq > 8 and c.lt > 1)):
        g = torch.randn(a.q.shape, generator=torch.Generator().manual_seed(seed)).to(a.q.dtype)
        check_backward(c, gradients(kernels, a, g), a, truth, g)


@pytest.mark.parametrize("block", range(4))
def test_fuzz(kernels, block):
    for seed in range(10 * block, 10 * block + 10):
        fuzz(kernels, seed)


@pytest.mark.nightly
@pytest.mark.parametrize("block", range(40))
def test_fuzz_long(kernels, block):
    for seed in range(1000 + 50 * block, 1050 + 50 * block):
        fuzz(kernels, seed)
