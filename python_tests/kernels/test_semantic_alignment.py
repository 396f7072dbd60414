"""`semantic_alignment` through PyTorch, and its refusals; its kernels are tested in interpreted_checks.py."""

from __future__ import annotations

import pytest
import torch

from idcore.errors import InputError, NoBackendError
from idcore.ops.semantic_alignment import semantic_alignment


def tensors(keys=1, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, 50, 16, generator=g, dtype=dtype)
    return q, torch.randn(keys, 3, 9, 16, generator=g, dtype=dtype)


@pytest.mark.parametrize("keys", [1, 2])
def test_it_is_the_definition(keys):
    q, k = tensors(keys)
    scores = k.expand(2, -1, -1, -1) @ q.mT / 4.0
    torch.testing.assert_close(semantic_alignment(q, k), scores.softmax(-1) @ q)


def test_gradients():
    q, k = tensors()
    few = (q[:, :1, :6].requires_grad_(), k[:, :1, :3].requires_grad_())
    assert torch.autograd.gradcheck(semantic_alignment, few)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda q, k: (q[0], k, None), r"q must be \[B, H, Lq, D\]"),
        (lambda q, k: (q, k[:, :1], None), r"k must be .* = \[1 or 2, 3, Lt, 16\], got \[1, 1, 9, 16\]"),
        (lambda q, k: (q, k.float(), None), "k is torch.float32 on cpu, q is torch.float64"),
        (lambda q, k: (q, k, "cuda"), "backend must be one of triton, cpu, sdpa"),
    ],
)
def test_bad_input_names_what_was_wanted(change, text):
    q, k, backend = change(*tensors())
    with pytest.raises(InputError, match=text):
        semantic_alignment(q, k, backend=backend)


def test_a_named_backend_that_cannot_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(NoBackendError, match="backend 'triton' cannot run this call: .*CUDA device"):
        semantic_alignment(*tensors(dtype=torch.float32), backend="triton")
