"""Both GPU backends on a GPU: parity with float64, the same bits every time, graph capture, streams."""

from __future__ import annotations

import pytest
import torch
from cases import Case, build, check_backward, check_forward

from idcore import id_attention
from idcore.backends import triton
from idcore.backends.call import Args

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

BASE = Case(dtype=torch.float16, lq=1025, li=(5, 32), rows=(1, 2), scale=(0.7, -0.4), mask=True)


def on_gpu(a: Args) -> Args:
    """The call's tensors on the GPU, strides kept."""

    def move(t):
        return None if t is None else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda").copy_(t)

    scale = a.scale.cuda() if isinstance(a.scale, torch.Tensor) else a.scale
    return a._replace(
        q=move(a.q), k_text=move(a.k_text), v_text=move(a.v_text), k_id=tuple(map(move, a.k_id)),
        v_id=tuple(map(move, a.v_id)), scale=scale, mask=move(a.mask), text_bias=move(a.text_bias),
    )  # fmt: skip


def call(a: Args, backend: str, out: torch.Tensor | None = None) -> torch.Tensor:
    return id_attention(
        a.q, a.k_text, a.v_text, a.k_id, a.v_id, id_scale=a.scale, id_mask=a.mask, merge=a.merge, num_zero=a.num_zero,
        num_global=a.num_global, text_bias=a.text_bias, backend=backend, out=out,
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("merge", ["add", "ortho", "ortho_v2"])
@pytest.mark.parametrize("head_dim", [40, 64, 80, 128, 160])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parity_and_the_same_bits_every_time(backend, merge, head_dim, dtype):
    c = BASE.with_(merge=merge, d=head_dim, dtype=dtype)
    a, truth = build(c)
    g = on_gpu(a)
    first = call(g, backend)
    check_forward(c, first.cpu(), a, truth, between=True)
    for _ in range(20):
        assert torch.equal(call(g, backend), first), "another run gave other bits"


@pytest.mark.parametrize("layout", ["plain", "holes", "cut"])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_other_layouts(backend, layout):
    c = BASE.with_(merge="ortho_v2", layout=layout, lq=77, bias=True, scale="tensor")
    a, truth = build(c)
    check_forward(c, call(on_gpu(a), backend).cpu(), a, truth, between=True)


@pytest.mark.parametrize("merge", ["add", "ortho", "ortho_v2"])
@pytest.mark.parametrize("head_dim", [40, 64, 80, 128, 160])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_backward_of_triton(merge, head_dim, dtype):
    if head_dim > triton.MAX_HEAD_DIM[dtype]:
        pytest.skip("refused by the backend")
    c = BASE.with_(merge=merge, d=head_dim, dtype=dtype, lq=300)
    a, truth = build(c)
    g = torch.randn(a.q.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    moved = on_gpu(a)
    grads = triton.backward(moved, g.cuda(), triton.forward_stats(moved)[1])
    dq, dkt, dvt, dks, dvs, dscale = grads
    got = (dq.cpu(), dkt.cpu(), dvt.cpu(), [t.cpu() for t in dks], [t.cpu() for t in dvs], dscale.cpu())
    check_backward(c, got, a, truth, g)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_captured_graph_sees_new_inputs_and_scales(backend):
    c = BASE.with_(merge="ortho_v2", scale="tensor")
    a, _ = build(c)
    g = on_gpu(a)
    out = torch.empty_like(call(g, backend))  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(g, backend, out)
    g.q.mul_(-0.5)
    g.scale.add_(0.25)
    graph.replay()
    assert torch.equal(out, call(g, backend))


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_work_goes_to_the_current_stream(backend):
    a, _ = build(BASE.with_(merge="ortho"))
    g = on_gpu(a)
    expected = call(g, backend)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        g.q.mul_(2)
        got = call(g, backend)
        g.q.mul_(0.5)
    stream.synchronize()
    assert not torch.equal(got, expected), "ran before the doubled queries were written"
    assert torch.equal(call(g, backend), expected)
