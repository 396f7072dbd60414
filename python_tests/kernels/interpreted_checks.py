"""Triton kernels in the interpreter (CPU) against float64: forward and backward.

Run by test_triton.py in a process of its own: Triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import math

import pytest
import torch
from cases import Case, build, check_backward, check_forward, poisoned

from idcore import id_attention
from idcore.backends import reference

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
    kernels.forward(a, out)
    check_forward(c, out, a, truth)
    assert frame[:, 0].isnan().all() and frame[:, -1].isnan().all(), "wrote outside its result"


@pytest.mark.parametrize("name", BACKWARD)
def test_backward(kernels, name):
    c = BACKWARD[name]
    a, truth = build(c)
    g = torch.randn(a.q.shape, generator=torch.Generator().manual_seed(1)).to(a.q.dtype)
    check_backward(c, kernels.gradients(a, g), a, truth, g)


@pytest.mark.parametrize("index, taken", [(7, 2), (-3, 0)])
def test_a_stage_outside_the_bank_is_the_nearest(kernels, index, taken):
    a, _ = build(BASE.with_(stages=3, b=1, rows=(1,), text_rows=1))
    outside, inside = (a._replace(stage=torch.tensor([n], dtype=torch.int32)) for n in (index, taken))
    assert torch.equal(kernels.forward(outside), kernels.forward(inside))


def test_statistics_are_those_of_the_contract(kernels):
    a, _ = build(BASE.with_(merge="ortho_v2", **TWO))
    g = torch.randn(a.q.shape)
    out, stats = kernels.forward_stats(a)
    assert torch.equal(out, kernels.forward(a))
    for name, ours, truth in zip(stats._fields, stats, expected_stats(a)):
        assert ours.shape == truth.shape and (ours - truth).abs().max() <= 1e-5 * truth.abs().max(), name
    kept = kernels.backward(a, g, stats)
    partly = kernels.backward(a, g, stats, text_kv=False, id_kv=False)
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
