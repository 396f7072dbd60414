"""The losses on attention maps by the compiled CPU kernels: parity by the rule, forward and backward."""

import pytest
import torch

from idcore.errors import NoBackendError
from idcore.ops import semantic_alignment, token_attention_loss
from idcore.testing import (
    SemanticCase,
    TokenLossCase,
    assert_gradients,
    assert_parity,
    random_semantic_case,
    random_token_loss_case,
)

_C = pytest.importorskip("idcore._C", reason="the compiled module is not built: pip install -e .")
KINDS = {"semantic": (SemanticCase, random_semantic_case), "token": (TokenLossCase, random_token_loss_case)}


@pytest.mark.parametrize("kind", KINDS)
def test_odd_shapes(kind, isa):
    """Tails of rows, tokens and channels, and rows that fill more than one segment."""
    for lq, lt, d in ((1, 1, 1), (3, 77, 8), (33, 5, 17), (63, 14, 40), (129, 15, 64), (1300, 77, 64), (70, 9, 256)):
        for dtype in ("fp32", "bf16", "fp16"):
            case = KINDS[kind][0]("odd", "test", batch=2, heads=2, lq=lq, lt=lt, head_dim=d, dtype=dtype)
            assert_parity(case, "cpu")
            assert_gradients(case, "cpu")


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("kind", KINDS)
def test_random_calls(kind, seed):
    usable = _C.usable_isas()
    _C.set_cpu_isa(usable[seed % len(usable)])
    try:
        case = KINDS[kind][1](seed)
        assert_parity(case, "cpu", seed=seed)
        assert_gradients(case, "cpu", seed=seed)
    finally:
        _C.set_cpu_isa("")


def inputs(lq=700, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, lq, 3, 40, generator=g).to(dtype).transpose(1, 2).requires_grad_()
    k, k_ref = (torch.randn(b, 3, 20, 40, generator=g).to(dtype) for b in (2, 1))
    return q, k.requires_grad_(), k_ref


def test_bits_do_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            q, k, k_ref = inputs()
            out = semantic_alignment(q, k, backend="cpu")
            loss = token_attention_loss(q, k, k_ref, backend="cpu")
            results.append((out, loss, *torch.autograd.grad(out.square().sum() + loss, (q, k))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_no_map_is_stored():
    q, k, k_ref = inputs(4096)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        semantic_alignment(q, k, backend="cpu").sum()
        token_attention_loss(q, k, k_ref, backend="cpu")
    own = q.nbytes + k.nbytes
    assert sum(saved) < 2 * own + k_ref.nbytes + 100_000
    assert 2 * 3 * 4096 * 20 * 4 > 100_000  # a map would show


def test_gradients_come_in_the_memory_order_of_the_queries():
    q, k, k_ref = inputs()
    for out in (semantic_alignment(q, k, backend="cpu").sum(), token_attention_loss(q, k, k_ref, backend="cpu")):
        (dq,) = torch.autograd.grad(out, q)
        assert dq.stride() == q.stride()


@pytest.mark.parametrize("large", (1e4, -1e4))
def test_large_logits_stay_finite(large, isa):
    """Logits far from 0 on every row, so that no unshifted exponential could be represented."""
    q, k, k_ref = inputs(70)
    q = (torch.ones_like(q) * large).requires_grad_()
    k = torch.ones_like(k).requires_grad_()
    out = semantic_alignment(q, k, backend="cpu")
    torch.testing.assert_close(out, torch.full_like(out, large))
    loss = token_attention_loss(q, k, k_ref, backend="cpu")
    assert all(torch.isfinite(t).all() for t in torch.autograd.grad(out.sum() + loss, (q, k)))


def test_nan_reaches_the_results(isa):
    q, k, k_ref = inputs(70)
    with torch.no_grad():
        q[0, 0, 3, 1] = float("nan")
        assert semantic_alignment(q, k, backend="cpu")[0, 0].isnan().all()
        assert token_attention_loss(q, k, k_ref, backend="cpu").isnan()


def test_opcheck():
    q, k, k_ref = inputs(50)
    torch.library.opcheck(torch.ops.idcore.semantic_fwd.default, (q, k, "cpu"))
    torch.library.opcheck(torch.ops.idcore.token_loss_fwd.default, (q, k, k_ref, torch.ones(2, 20), "cpu"))


def test_refusals_are_named_and_the_default_goes_on():
    q, k, _ = (t.detach().double() for t in inputs(50))
    with pytest.raises(NoBackendError, match="backend 'cpu' cannot run this call: dtype=float64"):
        semantic_alignment(q, k, backend="cpu")
    assert semantic_alignment(q, k).dtype == torch.float64
    sparse = torch.stack((q, q), -1).float().flatten(3)[..., ::2]
    with pytest.raises(NoBackendError, match="not contiguous"):
        semantic_alignment(sparse, k.float(), backend="cpu")
    assert semantic_alignment(sparse, k.float()).shape == (2, 3, 20, 40)
