"""`kv_bank`: one GEMM per context, as good as two per layer, in the layout that the kernels read."""

import pytest
import torch
import torch.nn.functional as F

from idcore.errors import InputError
from idcore.ops import id_attention, kv_bank
from idcore.ops.kv_bank import lay_out, one_block

SDXL = [(64, 1), (128, 2), (128, 2), (64, 1)]  # (C, heads), one head dim
SD15 = [(16, 2), (16, 2), (32, 2), (64, 2), (32, 2)]  # the head dim changes
WIDTH = 48


def made(layers, dtype=torch.float32, seed=0, rows=2, length=5, together=True):
    g = torch.Generator().manual_seed(seed)
    flat = [torch.nn.Parameter(torch.randn(c, WIDTH, generator=g).to(dtype), False) for c, _ in layers for _ in "kv"]
    if together:
        lay_out(flat)
    context = torch.randn(rows, length, WIDTH, generator=g).to(dtype)
    return context, list(zip(flat[::2], flat[1::2], strict=True)), [h for _, h in layers]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layers", [SDXL, SD15], ids=["sdxl", "sd15"])
@pytest.mark.parametrize("rows, length", [(1, 4), (2, 5), (3, 77)])
def test_against_float64(layers, dtype, rows, length):
    context, weights, heads = made(layers, dtype, rows=rows, length=length)
    assert one_block([w for pair in weights for w in pair]) is not None
    for pair, given, h in zip(kv_bank(context, weights, heads), weights, heads, strict=True):
        for got, w in zip(pair, given, strict=True):
            truth = F.linear(context.double(), w.double()).unflatten(-1, (h, -1)).transpose(1, 2)
            eager = F.linear(context, w).unflatten(-1, (h, -1)).transpose(1, 2)
            assert got.shape == truth.shape and got.dtype == dtype and got.stride(3) == 1
            floor = (1e-6 if dtype == torch.float32 else 1e-5) * truth.abs().max()
            assert (got - truth).abs().max() <= 2 * (eager - truth).abs().max() + floor


def test_one_gemm_where_the_weights_lie_together(monkeypatch):
    calls = []
    for name in ("bmm", "mm"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, real=real: calls.append(1) or real(*a))
    real = F.linear
    monkeypatch.setattr(F, "linear", lambda *a: calls.append(1) or real(*a))
    for layers, runs in ((SDXL, 1), (SD15, 4)):
        for dtype in (torch.float32, torch.bfloat16):
            context, weights, heads = made(layers, dtype)
            calls.clear()
            kv_bank(context, weights, heads)
            assert len(calls) == runs
    context, weights, heads = made(SDXL, together=False)
    calls.clear()
    kv_bank(context, weights, heads)
    assert len(calls) == 2 * len(SDXL)


def test_the_kernels_read_it_as_it_is():
    context, weights, heads = made([(64, 2)] * 3)
    q = torch.randn(2, 2, 33, 32)
    for k, v in kv_bank(context, weights, heads):
        ours = id_attention(q, k, v, k, v, id_scale=0.5, merge="ortho_v2", num_zero=2)
        plain = id_attention(q, k.contiguous(), v.contiguous(), k.contiguous(), v.contiguous(), id_scale=0.5,
                             merge="ortho_v2", num_zero=2)  # fmt: skip
        assert torch.equal(ours, plain)


def test_gradients_flow_to_context_and_weights():
    context, weights, heads = made(SD15)
    for w in (w for pair in weights for w in pair):
        w.requires_grad_()
    context.requires_grad_()
    sum((k**2).sum() + v.sum() for k, v in kv_bank(context, weights, heads)).backward()
    got = [context.grad, *(w.grad for pair in weights for w in pair)]
    for t in (context, *(w for pair in weights for w in pair)):
        t.grad = None
    sum((F.linear(context, wk) ** 2).sum() + F.linear(context, wv).sum() for wk, wv in weights).backward()
    for a, b in zip(got, [context.grad, *(w.grad for pair in weights for w in pair)], strict=True):
        torch.testing.assert_close(a, b)


def test_laying_out_keeps_objects_and_values():
    g = torch.Generator().manual_seed(3)
    parameters = [torch.nn.Parameter(torch.randn(c, 7, generator=g)) for c in (3, 4, 5)]
    before = [p.detach().clone() for p in parameters]
    same = list(parameters)
    assert one_block(parameters) is None
    block = lay_out(parameters)
    assert all(a is b for a, b in zip(same, parameters, strict=True))
    assert torch.equal(torch.cat(before), block) and torch.equal(one_block(parameters), block)
    with torch.no_grad():
        parameters[1].add_(1)
    assert torch.equal(one_block(parameters)[3:7], before[1] + 1)
    assert one_block(parameters[::-1]) is None
    assert torch.equal(one_block(parameters[1:]), block[3:])


@pytest.mark.parametrize(
    "change, text",
    [
        ({"context": torch.zeros(5, WIDTH)}, r"context must be floats \[R, L, E\], got \[5, 48\]"),
        ({"context": torch.zeros(1, 5, WIDTH, dtype=torch.int64)}, "must be floats"),
        ({"context": torch.zeros(1, 5, 9)}, r"two weights \[C, E\] = \[C, 9\]"),
        ({"context": torch.zeros(1, 5, WIDTH).half()}, r"torch.float32 on cpu, the context is torch.float16"),
        ({"heads": [1]}, "same, at least one, layers, got 4 and 1"),
        ({"heads": [3, 2, 2, 1]}, "layer 0 must have two weights.*divisible by 3 heads"),
        ({"weights": [], "heads": []}, "at least one"),
    ],
)
def test_bad_input(change, text):
    context, weights, heads = made(SDXL)
    given = {"context": context, "weights": weights, "heads": heads} | change
    with pytest.raises(InputError, match=text):
        kv_bank(**given)
