"""`id_attention` against an independent float64 truth, its gradients, batch rules, and torch.compile."""

import pytest
import torch
from id_attention_naive import naive
from torch.utils._python_dispatch import TorchDispatchMode

from idcore.backends import reference_bwd
from idcore.backends.call import Call
from idcore.backends.checks import normalize
from idcore.ops import dispatch, id_attention
from idcore.ops.id_attention import _flat, numbers

MERGES = ("add", "ortho", "ortho_v2")
BACKENDS = ("reference", "sdpa", "cpu")


def case(b=2, h=2, lq=5, lt=4, li=3, d=8, n=1, bi=1, bt=None, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)

    def r(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    bt = b if bt is None else bt
    kv = [r(bi, h, li, d) for _ in range(2 * n)]
    return r(b, h, lq, d), r(bt, h, lt, d), r(bt, h, lt, d), kv[:n], kv[n:]


def tolerance(dtype):
    return {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 6e-2, torch.float16: 8e-3}[dtype]


def usable(backend):
    if backend == "cpu":
        pytest.importorskip("idcore._C", reason="the compiled module is not built")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_zero", (0, 1, 8))
@pytest.mark.parametrize("merge", MERGES)
def test_values_equal_the_naive_truth(merge, num_zero, backend):
    usable(backend)
    q, kt, vt, ki, vi = case(b=4, n=2, bi=2)
    want = naive(q, kt, vt, ki, vi, [[0.8] * 4, [-0.5] * 4], merge=merge, num_zero=num_zero)
    got = id_attention(q, kt, vt, ki, vi, id_scale=(0.8, -0.5), merge=merge, num_zero=num_zero, backend=backend)
    assert (got.double() - want).abs().max() < tolerance(q.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("li, num_zero", [(1, 0), (1, 8), (3, 1), (4, 16), (5, 2), (7, 0), (0, 3)])
def test_first_five_include_zero_tokens(li, num_zero, backend):
    usable(backend)
    q, kt, vt, ki, vi = case(li=li)
    want = naive(q, kt, vt, ki, vi, [[1.0] * 2], merge="ortho_v2", num_zero=num_zero)
    got = id_attention(q, kt, vt, ki, vi, merge="ortho_v2", num_zero=num_zero, backend=backend)
    assert (got.double() - want).abs().max() < tolerance(q.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bi, bt", [(1, 1), (2, 4), (4, 2), (2, 1), (4, 4)])
def test_batch_rows(bi, bt, backend):
    """One identity for all, one per sample, and the cond/uncond halves of a batch above two."""
    usable(backend)
    q, kt, vt, ki, vi = case(b=4, bi=bi, bt=bt)
    got = id_attention(q, kt, vt, ki, vi, merge="ortho_v2", num_zero=2, backend=backend)
    for s in range(4):
        alone = id_attention(
            q[s : s + 1],
            kt[s * bt // 4][None],
            vt[s * bt // 4][None],
            ki[0][s * bi // 4][None],
            vi[0][s * bi // 4][None],
            merge="ortho_v2",
            num_zero=2,
            backend="reference",
        )
        assert (got[s : s + 1] - alone).abs().max() < tolerance(q.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("merge", MERGES)
def test_masks_and_scale_tensors(merge, backend):
    usable(backend)
    q, kt, vt, ki, vi = case(b=4, n=3, lq=6)
    masks = [None, torch.rand(1, 6), (torch.rand(4, 6) > 0.5).float()]
    scale = torch.tensor([[0.5, 1.0, -2.0, 0.0]] * 3)
    want = naive(q, kt, vt, ki, vi, scale.tolist(), mask=masks, merge=merge, num_zero=3)
    got = id_attention(q, kt, vt, ki, vi, id_scale=scale, id_mask=masks, merge=merge, num_zero=3, backend=backend)
    assert (got.double() - want).abs().max() < tolerance(q.dtype)


@pytest.mark.parametrize("merge", MERGES)
def test_no_influence_outside_the_mask(merge):
    q, kt, vt, ki, vi = case(lq=6)
    k = ki[0].requires_grad_()
    mask = torch.tensor([[1.0, 1, 1, 0, 0, 0]])
    out = id_attention(q, kt, vt, k, vi[0], id_mask=mask, merge=merge)
    assert torch.autograd.grad(out[:, :, 3:].pow(2).sum(), k, retain_graph=True)[0].abs().max() == 0
    assert torch.autograd.grad(out[:, :, :3].pow(2).sum(), k)[0].abs().max() > 0


def test_alpha_is_zero_where_the_text_attention_is_zero():
    q, kt, vt, ki, vi = case()
    for merge in ("ortho", "ortho_v2"):
        for backend in ("reference", "sdpa"):
            got = id_attention(q, kt, vt * 0, ki, vi, merge=merge, backend=backend)
            plain = id_attention(q, kt, vt * 0, ki, vi, merge="add", backend="reference")
            assert torch.isfinite(got).all() and (got - plain).abs().max() < 1e-6


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("num_zero", (0, 3))
@pytest.mark.parametrize("merge", MERGES)
def test_closed_form_backward_equals_autograd(merge, num_zero, masked):
    q, kt, vt, ki, vi = case(b=4, n=2, bi=2, bt=1, lq=7, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (q, kt, vt, *ki, *vi)]
    scale = torch.randn(2, 4, requires_grad=True)
    mask = torch.rand(2, 4, 7) if masked else None
    options = dict(id_scale=scale, id_mask=mask, merge=merge, num_zero=num_zero, num_global=2)
    out = id_attention(q, kt, vt, ki, vi, backend="reference", **options)
    g = torch.randn_like(out)
    want = torch.autograd.grad(out, [*leaves, scale], g)
    a = normalize(q, kt, vt, ki, vi, text_bias=None, **options)
    with torch.no_grad():
        dq, dkt, dvt, dks, dvs, dscale = reference_bwd.backward(a, g)
    for name, x, y in zip("q kt vt k0 k1 v0 v1 scale".split(), want, (dq, dkt, dvt, *dks, *dvs, dscale)):
        assert (x - y).abs().max() < (1e-5 if name == "scale" else 1e-11), name


@pytest.mark.parametrize("backend", ("sdpa", "cpu"))
@pytest.mark.parametrize("merge", MERGES)
def test_gradients_of_each_backend(merge, backend):
    usable(backend)
    q, kt, vt, ki, vi = case(b=2, n=2, bi=1, lq=9, d=16)
    scale = torch.tensor([0.7, -0.3])
    grads = {}
    for name in (backend, "reference"):
        leaves = [t.detach().clone().requires_grad_() for t in (q, kt, vt, *ki, *vi, scale)]
        k = leaves[3:5], leaves[5:7]
        out = id_attention(*leaves[:3], *k, id_scale=leaves[7], merge=merge, num_zero=2, backend=name)
        grads[name] = torch.autograd.grad((out * torch.linspace(-1, 1, 16)).sum(), leaves)
    for x, y in zip(grads[backend], grads["reference"]):
        assert (x - y).abs().max() < 2e-5 * max(1.0, float(y.abs().max()))


@pytest.mark.parametrize("backend", ("cpu",))
def test_opcheck(backend):
    usable(backend)
    q, kt, vt, ki, vi = case(d=16)
    rest = (None, None, None, "ortho_v2", 2, 5, backend)
    torch.library.opcheck(torch.ops.idcore.id_attention, (q, kt, vt, ki, vi, torch.ones(1, 2), *rest))
    for t in (q, kt, vt, *ki, *vi):
        t.requires_grad_()
    scale = torch.ones(1, 2, requires_grad=True)
    torch.library.opcheck(torch.ops.idcore.id_attention_for_training, (q, kt, vt, ki, vi, scale, *rest))


@pytest.mark.slow
@pytest.mark.parametrize("backend", (None, "sdpa", "cpu"))
def test_compiles_without_a_graph_break(backend):
    usable(backend)
    q, kt, vt, ki, vi = case(d=16)
    seen = []

    def step(q, scale):
        return id_attention(q + 1, kt, vt, ki, vi, id_scale=scale, merge="ortho_v2", num_zero=2, backend=backend)

    def counting(gm, inputs):
        seen.append(gm)
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=counting)
    for s in (0.1, 0.5, 2.0):
        scale = torch.tensor([s])
        assert (compiled(q, scale) - step(q, scale)).abs().max() < 1e-5
    assert len(seen) == 1, "a new scale must not recompile"
    inductor = torch.compile(step, fullgraph=True)
    x = q.clone().requires_grad_()
    inductor(x, scale).sum().backward()
    y = q.clone().requires_grad_()
    step(y, scale).sum().backward()
    assert (x.grad - y.grad).abs().max() < 1e-5


def test_out_and_memory_order():
    q, kt, vt, ki, vi = case()
    got = id_attention(q, kt, vt, ki, vi)
    assert got.transpose(1, 2).is_contiguous()
    buffer = torch.full((2, 5, 2, 8), float("nan")).transpose(1, 2)
    assert id_attention(q, kt, vt, ki, vi, out=buffer) is buffer
    assert torch.equal(buffer, got)


def test_text_only_and_zero_scale():
    q, kt, vt, ki, vi = case()
    text = torch.nn.functional.scaled_dot_product_attention(q, kt, vt)
    assert (id_attention(q, kt, vt) - text).abs().max() < 1e-6
    assert (id_attention(q, kt, vt, ki, vi, id_scale=0.0) - text).abs().max() < 1e-6


def bank_case(b=3, stages=4, rows=3):
    """q, K and V banks of `stages`, an identity; all need gradients."""
    g = torch.Generator().manual_seed(5)

    def make(*shape):
        return torch.randn(*shape, generator=g).requires_grad_()

    bank = stages, rows, 2, 7, 16
    return make(b, 2, 33, 16), make(*bank), make(*bank), make(1, 2, 5, 16), make(1, 2, 5, 16)


STAGES = {"int": 2, "one for all": torch.tensor(2), "one per sample": torch.tensor([3, 0, 3])}


@pytest.mark.parametrize("rows", (1, 3))
@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES.keys())
@pytest.mark.parametrize("backend", ("reference", "sdpa", "cpu"))
def test_a_stage_bank_equals_the_picked_text(backend, stage, rows):
    q, kt, vt, ki, vi = bank_case(rows=rows)
    usable_for_bank(backend, stage)
    picked = [stage] * 3 if isinstance(stage, int) else stage.expand(3).tolist()
    row = [i * rows // 3 for i in range(3)]
    options = dict(id_scale=0.7, merge="ortho_v2", num_zero=2)
    got = id_attention(q, kt, vt, ki, vi, stage=stage, backend=backend, **options)
    k, v = (torch.stack([t[s, r] for s, r in zip(picked, row)]) for t in (kt, vt))
    want = id_attention(q, k, v, ki, vi, backend="reference", **options)
    assert (got - want).abs().max() < 2e-6
    weight = torch.linspace(-1, 1, 16)
    grads = [torch.autograd.grad((x * weight).sum(), (q, kt, vt, ki, vi), retain_graph=True) for x in (got, want)]
    for x, y in zip(*grads):
        assert (x - y).abs().max() < 2e-5
    for s in set(range(4)) - set(picked):
        assert grads[0][1][s].eq(0).all() and grads[0][2][s].eq(0).all()


def usable_for_bank(backend, stage):
    if backend == "cpu":
        usable(backend)
        call = Call("cpu", torch.float32, 3, 2, 33, 7, 16, (5,), "ortho_v2", False, False, True, False, True, 4)
        if not isinstance(stage, int) and (reasons := dispatch.why_not("cpu", call)):
            pytest.skip("; ".join(reasons))


def test_the_registered_op_trains_where_only_pytorch_can_run_the_call():
    """A head too wide for the compiled kernels, met under torch.compile: PyTorch's forward, the closed form back."""
    q, kt, vt, ki, vi = case(d=272)
    assert dispatch.choose(Call("cpu", q.dtype, 2, 2, 5, 4, 272, (3,), "add", *[False] * 4, True)) == "sdpa"
    scale = torch.ones(1, 2)
    leaves = [t.requires_grad_() for t in (q, kt, vt, *ki, *vi, scale)]
    op = torch.ops.idcore.id_attention_for_training
    got = op(q, kt, vt, ki, vi, scale, None, None, None, "ortho_v2", 2, 5, "")[0]
    want = id_attention(q, kt, vt, ki, vi, id_scale=scale, merge="ortho_v2", num_zero=2, backend="reference")
    assert (got - want).abs().max() < 1e-5
    weight = torch.linspace(-1, 1, 272)
    for x, y in zip(*(torch.autograd.grad((t * weight).sum(), leaves) for t in (got, want))):
        assert (x - y).abs().max() < 2e-5 * max(1.0, float(y.abs().max()))


class Names(TorchDispatchMode):
    """Of the operations that run inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scale", [(), (0.5,), (0.5, -0.7)])
def test_numbers_reach_the_device_without_a_copy_from_the_cpu(scale):
    """Such a copy waits for all work of a GPU, and a CUDA graph cannot hold one."""
    q, k, v, kid, vid = case(n=len(scale))
    a = normalize(q, k, v, kid, vid, id_scale=scale, id_mask=None, merge="add", num_zero=0, num_global=5,
                  text_bias=None)  # fmt: skip
    with Names() as ran:
        made = _flat(a)[5]
    assert not {"lift_fresh", "_to_copy", "copy_"} & set(ran.names), ran.names
    assert made.dtype == torch.float32 and made.shape == (len(scale), q.shape[0])
    assert torch.equal(made, torch.tensor(scale).reshape(-1, 1).expand(-1, q.shape[0]))
    assert torch.equal(numbers(scale, q.device), torch.tensor(scale))
