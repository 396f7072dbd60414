"""`stage_tokens`: values and gradients against a loop, registration, compile, errors."""

from __future__ import annotations

import pytest
import torch

from idcore.errors import InputError
from idcore.ops import stage_tokens
from idcore.ops.stage_tokens import BACKENDS, _load
from idcore.testing.parity import poisoned_memory


def tensors(b=4, length=9, e=6, s=5, bt=2, t=3, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    embeddings = torch.randn(b, length, e, generator=g, dtype=dtype)
    tokens = torch.randn(s, bt, t, e, generator=g, dtype=dtype)
    positions = torch.stack([torch.randperm(length, generator=g)[:t] for _ in range(b)])
    positions[1, 0] = -1
    return embeddings.requires_grad_(), tokens.requires_grad_(), positions


def by_loop(embeddings, tokens, positions):
    s, bt, count, _ = tokens.shape
    b = embeddings.shape[0]
    stages = []
    for i in range(s):
        samples = []
        for j in range(b):
            rows = list(embeddings[j])
            for t in range(count):
                at = int(positions[j if positions.shape[0] > 1 else 0, t])
                if at >= 0:
                    rows[at] = tokens[i, j * bt // b, t].to(embeddings.dtype)
            samples.append(torch.stack(rows))
        stages.append(torch.stack(samples))
    return torch.stack(stages)


def usable(backend, dtype):
    why = _load(backend).why_not("cpu", dtype)
    if why:
        pytest.skip("; ".join(why))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bt", [1, 2, 4])
@pytest.mark.parametrize("stage", [None, 3, [0, 4, 4, 1]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_values_and_gradients(backend, bt, stage, dtype):
    usable(backend, dtype)
    embeddings, tokens, positions = tensors(bt=bt, dtype=dtype)
    stages = None if stage is None else torch.tensor(stage)
    got = stage_tokens(embeddings, tokens, positions, stage=stages, backend=backend)
    want = by_loop(embeddings, tokens, positions)
    if stage is not None:
        want = want[stages.expand(4), torch.arange(4)]
    assert torch.equal(got, want)
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    got_g = torch.autograd.grad((got * weight).sum(), (embeddings, tokens))
    wide = [t.detach().double().requires_grad_() for t in (embeddings, tokens)]
    truth = by_loop(*wide, positions)
    truth = truth if stage is None else truth[stages.expand(4), torch.arange(4)]
    want_g = torch.autograd.grad((truth * weight.double()).sum(), wide)
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    for x, y in zip(got_g, want_g):
        assert x.dtype == dtype and (x.double() - y).abs().max() < limit


@pytest.mark.parametrize("backend", BACKENDS)
def test_trained_tokens_may_be_wider_than_the_embeddings(backend):
    usable(backend, torch.float16)
    embeddings, tokens, positions = tensors(dtype=torch.float16)
    tokens = tokens.detach().float().requires_grad_()
    out = stage_tokens(embeddings, tokens, positions, backend=backend)
    assert out.dtype == torch.float16 and torch.equal(out, by_loop(embeddings, tokens, positions))
    out.float().sum().backward()
    assert tokens.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_and_one_list_of_positions(backend):
    usable(backend, torch.float32)
    embeddings, tokens, _ = tensors(dtype=torch.float32)
    wide = torch.full((4, 9, 12), float("nan"))
    wide[:, :, ::2] = embeddings.detach()
    turned = tokens.detach().permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    positions = torch.tensor([7, -1, 0])
    got = stage_tokens(wide[:, :, ::2], turned, positions, backend=backend)
    assert torch.equal(got, by_loop(embeddings.detach(), tokens.detach(), positions[None]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stage", [None, [0, 2, 2, 1]])
def test_cpu_gradients_are_sums_in_float32_for_any_number_of_threads(stage, dtype, isa):
    """Rows that no vector divides, more than one thread does alone; what nothing reads gets zeros."""
    embeddings, tokens, positions = tensors(b=4, length=77, e=331, s=3, bt=2, t=5, dtype=dtype)
    stages = None if stage is None else torch.tensor(stage)
    shape = (4, 77, 331) if stages is not None else (3, 4, 77, 331)
    g = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    wide = [t.detach().float().requires_grad_() for t in (embeddings, tokens)]
    out = stage_tokens(*wide, positions, stage=stages, backend="reference")
    want = torch.autograd.grad(out, wide, g.float())
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with poisoned_memory():
                out = stage_tokens(embeddings, tokens, positions, stage=stages, backend="cpu")
                results.append(torch.autograd.grad(out, (embeddings, tokens), g))
    finally:
        torch.set_num_threads(before)
    for found in results:
        assert all(torch.equal(x, y) for x, y in zip(found, results[0], strict=True))
    roundoff = {torch.float32: 1e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    for x, y in zip(results[0], want, strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(x.float(), y, rtol=roundoff, atol=1e-6)


def test_cpu_gradients_of_tokens_alone_and_of_an_expanded_result():
    embeddings, tokens, positions = tensors(dtype=torch.float32)
    out = stage_tokens(embeddings.detach(), tokens, positions, backend="cpu")
    (got,) = torch.autograd.grad(out.sum(), tokens)
    want = stage_tokens(embeddings.detach(), tokens, positions, backend="reference")
    assert torch.equal(got, torch.autograd.grad(want.sum(), tokens)[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stage", [None, torch.tensor([2])])
def test_opcheck(backend, stage):
    usable(backend, torch.float32)
    embeddings, tokens, positions = tensors(dtype=torch.float32)
    stage = None if stage is None else stage.int()
    torch.library.opcheck(torch.ops.idcore.stage_tokens, (embeddings, tokens, positions.int(), stage, backend))


@pytest.mark.slow
def test_compiles_without_a_graph_break():
    embeddings, tokens, positions = tensors(dtype=torch.float32)
    compiled = torch.compile(stage_tokens, fullgraph=True, backend="aot_eager")
    got = compiled(embeddings, tokens, positions, stage=torch.tensor(1))
    assert torch.equal(got, stage_tokens(embeddings, tokens, positions, stage=torch.tensor(1)))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(embeddings=torch.randn(4, 9)), r"embeddings must be floating-point \[B, L, E\]"),
        (
            dict(tokens=torch.randn(5, 3, 3, 6)),
            r"tokens must be floating-point \[S, 1 or B, T, E\] = \[S, 1 or 4, T, 6\]",
        ),
        (dict(tokens=torch.ones(5, 1, 3, 6, dtype=torch.int64)), r"tokens must be floating-point"),
        (dict(positions=torch.tensor([1, 2])), r"positions must be integers \[T\] = \[3\] or \[B, T\] = \[4, 3\]"),
        (dict(positions=torch.tensor([1.0, 2.0, 3.0])), r"positions must be integers"),
        (dict(positions=torch.tensor([1, 2, 9])), r"positions must be -1 \(left out\) to L - 1 = 8, got 1 to 9"),
        (dict(positions=torch.tensor([1, 2, 2])), r"must be distinct, got \[1, 2, 2\]"),
        (dict(positions=torch.empty(3, dtype=torch.int64, device="meta")), r"positions are on meta, embeddings on cpu"),
        (dict(stage=torch.tensor(5)), r"stage must be 0 to 4, got 5 to 5"),
        (dict(stage=torch.tensor(0.0)), r"stage must be an integer tensor"),
        (dict(stage=2), r"stage must be an integer tensor .* got 2"),
        (dict(backend="cuda"), r"backend must be one of"),
    ],
)
def test_errors_say_what_was_wanted_and_what_came(changes, message):
    embeddings, tokens, positions = tensors(dtype=torch.float32)
    given = dict(embeddings=embeddings, tokens=tokens, positions=positions) | changes
    with pytest.raises(InputError, match=message):
        stage_tokens(**given)
