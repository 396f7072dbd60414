"""The Triton kernels of the other ops in the interpreter, against float64. Run by test_triton.py."""

from __future__ import annotations

import pytest
import torch

from idcore.ops.semantic_alignment import semantic_alignment
from idcore.ops.token_attention_loss import token_attention_loss

pytestmark = pytest.mark.usefixtures("kernels")
DTYPES = [torch.float32, torch.float16]
SHAPES = [dict(), dict(lq=1, lt=5, d=40), dict(lq=700, lt=130, d=80), dict(b=4, rows=2, lq=33, lt=4)]
# odd numbers of image and of text tokens, one sample and head
ODD = [dict(lq=lq, lt=lt, b=1, h=1) for lq, lt in ((1, 1), (3, 4), (33, 5), (63, 10), (77, 16), (4097, 32), (3, 37))]


def inputs(dtype, lq=130, lt=77, d=64, b=2, h=2, rows=1):
    """q [b, h, lq, d], strided; k [b, ...] and k_ref [rows, ...] of similar prompts; weights of the tokens [b, lt]."""
    g = torch.Generator().manual_seed(3)
    q = torch.randn(b, lq, h * d, generator=g).view(b, lq, h, d).transpose(1, 2)
    k = torch.randn(b, h, lt, d, generator=g)
    k_ref = (k + 0.3 * torch.randn(k.shape, generator=g))[:rows]
    return [t.to(dtype) for t in (q, k, k_ref)], torch.rand(b, lt, generator=g)


def loss_and_gradients(tensors, tokens, backend, dtype):
    q, k, k_ref = (t.to(dtype) for t in tensors)
    q, k = q.requires_grad_(), k.requires_grad_()
    loss = token_attention_loss(q, k, k_ref, tokens=tokens, backend=backend)
    return loss.detach(), *torch.autograd.grad(loss, (q, k))


def check_loss(tensors, tokens, dtype) -> None:
    ways = (("triton", dtype), ("reference", torch.float64), ("reference", dtype))
    results = [loss_and_gradients(tensors, tokens, *way) for way in ways]
    for name, ours, truth, eager in zip(("loss", "dq", "dk"), *results, strict=True):
        size = truth.abs().max().item()
        assert ours.shape == truth.shape and torch.isfinite(ours).all()
        limit = 3 * (eager - truth).abs().max().item() + LOSS_FLOOR[dtype] * size + torch.finfo(torch.float32).tiny
        assert (ours - truth).abs().max().item() <= limit, name


# The products of backward take their operands in the call's dtype, PyTorch's path casts everything to float32.
LOSS_FLOOR = {torch.float32: 2e-6, torch.float16: 4e-4}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, *ODD], ids=str)
def test_token_attention_loss(dtype, shape):
    tensors, tokens = inputs(dtype, **shape)
    check_loss(tensors, tokens, dtype)


@pytest.mark.parametrize("lt", [77, 130])
@pytest.mark.parametrize("chosen", [(3,), (0, 70), tuple(range(5, 60))])
def test_token_attention_loss_of_chosen_tokens(chosen, lt):
    tensors, _ = inputs(torch.float16, lt=lt, lq=63, b=1)
    tokens = torch.zeros(lt, dtype=torch.bool)
    tokens[list(chosen)] = True
    check_loss(tensors, tokens, torch.float16)


def test_tokens_that_are_not_chosen_still_share_the_softmax():
    tensors, _ = inputs(torch.float32, b=1)
    tokens = torch.zeros(77)
    tokens[3] = 1.0
    _, _, dk = loss_and_gradients(tensors, tokens, "triton", torch.float32)
    assert (dk.abs().amax((0, 1, 3)) > 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, *ODD, dict(lq=16384, lt=77, b=1, h=1)], ids=str)
def test_semantic_alignment(dtype, shape):
    tensors, _ = inputs(dtype, **shape)
    g = torch.randn(tensors[0].shape[0], tensors[0].shape[1], tensors[1].shape[2], tensors[0].shape[3])
    results = []
    for backend, to in (("triton", dtype), ("sdpa", torch.float64), ("sdpa", dtype)):
        q, k = (t.to(to).requires_grad_() for t in (tensors[0], tensors[2]))
        out = semantic_alignment(q, k, backend=backend)
        results.append((out.detach(), *torch.autograd.grad(out, (q, k), g.to(dtype).to(to))))
    for name, ours, truth, eager in zip(("out", "dq", "dk"), *results, strict=True):
        factor = 2 if name == "out" else 3
        size = max(1.0, truth.abs().max().item())
        limit = factor * (eager - truth).abs().max().item() + (1e-6 if dtype == torch.float32 else 1e-5) * size
        assert ours.shape == truth.shape and torch.isfinite(ours).all()
        assert (ours - truth).abs().max().item() <= limit, name
