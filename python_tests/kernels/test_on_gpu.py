"""Both GPU backends on a GPU: parity with float64, the same bits every time, graph capture, streams."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import Case, build, check_backward, check_forward

from idcore import id_attention
from idcore.backends import cuda, triton
from idcore.backends.call import Args
from idcore.ops import align_face

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
        stage=move(a.stage),
    )  # fmt: skip


def call(a: Args, backend: str, out: torch.Tensor | None = None) -> torch.Tensor:
    return id_attention(
        a.q, a.k_text, a.v_text, a.k_id, a.v_id, id_scale=a.scale, id_mask=a.mask, merge=a.merge, num_zero=a.num_zero,
        num_global=a.num_global, text_bias=a.text_bias, stage=a.stage, backend=backend, out=out,
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
@pytest.mark.parametrize("merge", ["add", "ortho_v2"])
def test_a_captured_graph_runs_through_the_stages(backend, merge):
    c = BASE.with_(merge=merge, stages=4, stage_rows=2)
    a, _ = build(c)
    g = on_gpu(a)
    out = torch.empty_like(call(g, backend))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(g, backend, out)
    for first, second in ((0, 3), (2, 2), (3, 1)):
        g.stage.copy_(torch.tensor([first, second]))
        graph.replay()
        now = torch.tensor([first, second], dtype=torch.int32)
        _, truth = build(c)
        check_forward(c, out.cpu(), a._replace(stage=now), truth._replace(stage=now), between=True)


@pytest.mark.parametrize("shape", [dict(h=10, lq=4096), dict(h=20, lq=1024), dict(h=10, lq=4096, b=2)])
def test_ortho_of_sdxl_is_one_launch(shape):
    if torch.cuda.get_device_properties(0).shared_memory_per_multiprocessor < 200 * 1024:
        pytest.skip("too little shared memory for the tiles of a whole layer")
    c = BASE.with_(merge="ortho_v2", **{"b": 1, **shape}, li=(32,), rows=(1,), text_rows=1, scale="tensor")
    a, truth = build(c)
    g = on_gpu(a)
    assert cuda.launches(g) == 1
    first = call(g, "cuda")
    check_forward(c, first.cpu(), a, truth, between=True)
    for _ in range(20):
        assert torch.equal(call(g, "cuda"), first), "another run gave other bits"


@pytest.mark.parametrize("merge", ["ortho", "ortho_v2"])
@pytest.mark.parametrize("head_dim", [40, 64, 80, 128, 160])
def test_one_launch_and_two_agree(merge, head_dim):
    """Both ways of ortho, whichever of them this GPU would take."""
    c = BASE.with_(merge=merge, d=head_dim)
    a, truth = build(c)
    g = on_gpu(a)
    before = cuda._load()[0].id_attention_cuda_together(False)
    try:
        assert cuda.launches(g) == 2
        check_forward(c, call(g, "cuda").cpu(), a, truth, between=True)
        cuda._load()[0].id_attention_cuda_together(True)
        if cuda.launches(g) == 1:
            check_forward(c, call(g, "cuda").cpu(), a, truth, between=True)
    finally:
        cuda._load()[0].id_attention_cuda_together(before)


def test_threads_with_other_sizes_do_not_disturb_each_other():
    """A launch may take the shared memory that its plan needs whatever other threads launch meanwhile."""
    made = [on_gpu(build(BASE.with_(merge="ortho_v2", lq=lq, li=li, rows=(1,), scale=0.7))[0])
            for lq, li in ((4096, (32,)), (64, (4,)), (1025, (5,)), (300, (16,)))]  # fmt: skip
    expected = [call(g, "cuda") for g in made]
    torch.cuda.synchronize()

    def repeat(i: int) -> bool:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            found = [call(made[i], "cuda") for _ in range(200)]
            torch.cuda.current_stream().synchronize()
        return all(torch.equal(x, expected[i]) for x in found[::20])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(repeat, range(4)))


def test_a_call_too_large_for_one_launch():
    c = BASE.with_(merge="ortho_v2", d=160, h=8, lq=8192, li=(4,), rows=(1,), text_rows=1, lt=7, scale=0.8, mask=False)
    a, truth = build(c)
    g = on_gpu(a)
    assert cuda.launches(g) == 2
    check_forward(c, call(g, "cuda").cpu(), a, truth, between=True)


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8])
def test_align_face_is_the_cpu_s(dtype, resample):
    pictures = [torch.randint(0, 256, size, dtype=torch.uint8) for size in ((900, 700, 3), (60, 80, 3))]
    matrices = torch.tensor([[[s * 0.8, -s * 0.6, 5.0], [s * 0.6, s * 0.8, -30 * s]] for s in (0.1, 0.24, 0.6, 1.7)])
    of = torch.tensor([0, 0, 0, 1])
    norm = {} if dtype == torch.uint8 else dict(mean=127.5, std=(128.0, 64.0, 32.0))
    want = align_face(pictures, matrices, 112, picture_of=of, resample=resample, dtype=dtype, backend="cpu", **norm)
    got = align_face([p.cuda() for p in pictures], matrices.cuda(), 112, picture_of=of.cuda(), resample=resample,
                     dtype=dtype, backend="cuda", **norm).cpu()  # fmt: skip
    off = (got.float() - want.float()).abs()
    level = 1.0 if dtype == torch.uint8 else 1 / 32  # a value beside .5 may round to the other side
    assert off.max() <= 1.01 * level and (off > 0).float().mean() < 0.01


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
