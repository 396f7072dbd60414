"""The Triton kernels of the other ops in the interpreter, against float64. Run by test_triton.py."""

from __future__ import annotations

import pytest
import torch

from idcore.ops.semantic_alignment import semantic_alignment
from idcore.ops.token_attention_loss import token_attention_loss


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
