"""`token_attention_loss` in plain PyTorch: values, gradients, registration, memory, errors."""

from __future__ import annotations

import sys

import pytest
import torch

from idcore.errors import InputError, NoBackendError
from idcore.ops import token_attention_loss


def tensors(b=2, h=2, lq=50, lt=9, d=16, dtype=torch.float64, keys=2):
    g = torch.Generator().manual_seed(0)
    return (
        torch.randn(b, h, lq, d, generator=g, dtype=dtype),
        torch.randn(keys, h, lt, d, generator=g, dtype=dtype),
        torch.randn(1, h, lt, d, generator=g, dtype=dtype),
    )


def by_maps(q, k, k_ref, tokens=None):
    """The definition with both maps written out, the reference map a constant."""
    b, lt = q.shape[0], k.shape[2]
    full = [x.repeat_interleave(b // x.shape[0], 0).mT * q.shape[-1] ** -0.5 for x in (k, k_ref)]
    square = ((q @ full[0]).softmax(-1) - (q @ full[1]).softmax(-1).detach()) ** 2
    if tokens is None:
        return square.mean()
    w = tokens.to(square).expand(b, lt)[:, None, None, :].expand(square.shape)
    return (w * square).sum() / w.sum()


@pytest.mark.parametrize("keys", [1, 2])
@pytest.mark.parametrize("chosen", [None, [2, 3], "weights"])
def test_value_and_gradients_are_those_of_the_definition(monkeypatch, keys, chosen):
    monkeypatch.setattr(
        sys.modules["idcore.ops.token_attention_loss"], "CHUNK", 16
    )  # several chunks, the last one short
    q, k, k_ref = tensors(keys=keys)
    tokens = None
    if chosen == "weights":
        tokens = torch.rand(2, 9)
    elif chosen:
        tokens = torch.zeros(9, dtype=torch.bool)
        tokens[chosen] = True
    q, k = q.requires_grad_(), k.requires_grad_()
    loss = token_attention_loss(q, k, k_ref, tokens=tokens)
    truth = by_maps(q, k, k_ref, tokens)
    torch.testing.assert_close(loss, truth)
    expected = torch.autograd.grad(3 * truth, (q, k))
    for x, y in zip(torch.autograd.grad(3 * loss, (q, k)), expected, strict=True):
        torch.testing.assert_close(x, y)


def test_same_prompts_give_zero():
    q, k, _ = tensors(keys=1)
    assert token_attention_loss(q, k, k) == 0


def test_opcheck_passes():
    q, k, k_ref = tensors(dtype=torch.float32)
    weight = torch.ones(2, 9)
    arguments = (q.requires_grad_(), k.requires_grad_(), k_ref, weight, "reference")
    torch.library.opcheck(torch.ops.idcore.token_loss_fwd.default, arguments)


def test_nothing_of_the_size_of_a_map_is_saved():
    q, k, k_ref = tensors(lq=500, lt=77, dtype=torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        token_attention_loss(q.requires_grad_(), k.requires_grad_(), k_ref)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    inputs = {t.untyped_storage().data_ptr() for t in (q, k, k_ref)}
    assert sum(n for p, n in storages.items() if p not in inputs) < 1000


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda q, k, r: (q[0], k, r, {}), r"q must be \[B, H, Lq, D\]"),
        (lambda q, k, r: (q, k[:, :1], r, {}), r"k must be \[1 or B, H, Lt, D\] = \[1 or 2, 2, Lt, 16\]"),
        (lambda q, k, r: (q, k, r[:, :, :4], {}), r"k_ref must be .* got \[1, 2, 4, 16\]"),
        (lambda q, k, r: (q, k.float(), r, {}), r"k is torch.float32 on cpu, q is torch.float64"),
        (lambda q, k, r: (q, k, r.requires_grad_(), {}), r"pass k_ref.detach\(\)"),
        (lambda q, k, r: (q, k, r, {"tokens": torch.ones(3)}), r"tokens must be \[Lt\] = \[9\]"),
        (lambda q, k, r: (q, k, r, {"tokens": torch.zeros(9)}), "tokens chooses no token"),
        (lambda q, k, r: (q, k, r, {"backend": "sdpa"}), "backend must be one of triton, cpu, reference"),
    ],
)
def test_bad_input_names_what_was_wanted(change, text):
    q, k, k_ref, options = change(*tensors())
    with pytest.raises(InputError, match=text):
        token_attention_loss(q, k, k_ref, **options)


def test_a_named_backend_that_cannot_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(NoBackendError, match="backend 'triton' cannot run this call: .*CUDA device"):
        token_attention_loss(*tensors(dtype=torch.float32), backend="triton")
