"""The compiled CPU backend: parity by the rule on every instruction set of this machine, threads, strides, out=."""

import subprocess
import sys

import pytest
import torch

from idcore.backends import cpu
from idcore.backends.checks import normalize
from idcore.ops import id_attention
from idcore.testing import MODEL_CASES, ODD_CASES, Case, assert_parity, make_inputs, random_case
from idcore.testing.cases import LAYOUTS, MERGES

_C = pytest.importorskip("idcore._C", reason="the compiled module is not built: pip install -e .")


@pytest.mark.parametrize("dtype", ("fp32", "bf16", "fp16"))
@pytest.mark.parametrize("case", ODD_CASES, ids=lambda c: c.name)
def test_odd_shapes(case, dtype, isa):
    for merge in MERGES:
        assert_parity(case.with_(dtype=dtype, merge=merge), "cpu")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_and_poisoned_surroundings(layout, isa):
    for dtype in ("fp32", "bf16", "fp16"):
        for head_dim in (17, 40, 64):
            case = ODD_CASES[3].with_(layout=layout, dtype=dtype, head_dim=head_dim, bias="full", text_batch=1)
            assert_parity(case, "cpu")


@pytest.mark.parametrize("case", MODEL_CASES, ids=lambda c: c.name)
def test_model_shapes(case):
    """On the instruction set that a user gets. Rows are cut to keep the float64 truth cheap."""
    for dtype in ("fp32", "bf16"):
        assert_parity(case.with_(dtype=dtype, lq=min(case.lq, 600), num_zero=8), "cpu")


@pytest.mark.parametrize("seed", range(200))
def test_random_calls(seed):
    """200 seeded calls, spread over the instruction sets of this machine."""
    usable = _C.usable_isas()
    _C.set_cpu_isa(usable[seed % len(usable)])
    try:
        assert_parity(random_case(seed), "cpu", seed=seed)
    finally:
        _C.set_cpu_isa("")


@pytest.mark.nightly
def test_many_random_calls(isa):
    for seed in range(1000, 3000):
        assert_parity(random_case(seed), "cpu", seed=seed)


THREADED = (
    Case("six-units", "test", batch=2, heads=3, lq=700, num_zero=2),
    Case("one-unit", "test", heads=1, lq=900, li=(32, 4), num_zero=2),
    Case("kept-in-float32", "test", heads=1, lq=200, num_zero=2, dtype="bf16"),
)


@pytest.mark.parametrize("case", THREADED, ids=lambda c: c.name)
def test_bits_do_not_depend_on_the_number_of_threads(case, isa):
    """More threads than heads share a head, and wait for each other's sums."""
    before = torch.get_num_threads()
    try:
        for merge in MERGES:
            given = make_inputs(case.with_(merge=merge))
            results = []
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                results.append(id_attention(**given, backend="cpu"))
            assert all(torch.equal(results[0], other) for other in results[1:])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", ("fp32", "bf16", "fp16"))
def test_stage_bank(dtype, isa):
    """The text of the picked stage, in views whose batch lies outside the stages."""
    case = Case("bank", "test", batch=4, heads=2, lq=37, lt=9, text_batch=2, merge="ortho_v2", num_zero=2, dtype=dtype)
    given = make_inputs(case)
    more = [make_inputs(case, seed=s) for s in (1, 2)]
    banks = {n: torch.stack([given[n], *(m[n] for m in more)], dim=1).transpose(0, 1) for n in ("k_text", "v_text")}
    for stage in (torch.tensor([1]), torch.tensor([2, 0, 1, 1])):
        got = id_attention(**{**given, **banks}, stage=stage, backend="cpu")
        rows = [(s, i // 2) for i, s in enumerate(stage.expand(4).tolist())]
        picked = {n: torch.stack([bank[s, row] for s, row in rows]) for n, bank in banks.items()}
        assert torch.equal(got, id_attention(**{**given, **picked}, backend="cpu"))
    a = normalize(given["q"], banks["k_text"], banks["v_text"], None, None, id_scale=1.0, id_mask=None, merge="add",
                  num_zero=0, num_global=5, text_bias=None, stage=torch.tensor([2]))  # fmt: skip
    beyond = a._replace(stage=torch.tensor([9], dtype=torch.int32))
    assert torch.equal(cpu.forward(beyond), cpu.forward(a))  # the kernel keeps the index inside the bank


def test_threads_follow_torch():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert _C.build_info()["threads"] == 1
        torch.set_num_threads(2)
        assert _C.build_info()["threads"] == 2
    finally:
        torch.set_num_threads(before)


def test_out_is_written_and_returned():
    given = make_inputs(Case("out", "test", batch=2, heads=2, lq=40, mask=True))
    want = id_attention(**given, backend="cpu")
    for out in (
        torch.full((2, 2, 40, 64), float("nan")),
        torch.full((2, 40, 2, 64), float("nan")).transpose(1, 2),
        torch.full((2, 2, 40, 128), float("nan"))[..., ::2],
    ):
        got = id_attention(**given, backend="cpu", out=out)
        assert got is out and torch.equal(got, want)


def test_out_neighbours_stay_untouched(isa):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for head_dim in (17, 40, 64):
            case = Case("cut", "test", heads=2, lq=35, head_dim=head_dim, dtype={4: "fp32"}.get(dtype.itemsize, "fp16"))
            case = case.with_(dtype="bf16") if dtype == torch.bfloat16 else case
            around = torch.full((3, 4, 37, head_dim + 6), 7.0, dtype=dtype)
            inside = around[1:2, 1:3, 1:36, 3 : 3 + head_dim]
            id_attention(**make_inputs(case), backend="cpu", out=inside)
            inside.zero_()
            assert around.sum(dtype=torch.float64) == 7.0 * (around.numel() - inside.numel())


def test_zero_size_calls(isa):
    for changes in ({"lq": 0}, {"batch": 0}):
        case = Case("empty", "test", heads=2, head_dim=8).with_(**{"lq": 3, "lt": 2, "li": (2,), **changes})
        given = make_inputs(case.with_(text_batch=1, id_batch=1))
        assert id_attention(**given, backend="cpu").shape == given["q"].shape


def test_zero_denominator_gives_text_attention(isa):
    given = make_inputs(Case("zero", "test", heads=2, lq=20, merge="ortho_v2"))
    given["v_text"] = torch.zeros_like(given["v_text"])
    given["id_scale"] = (0.0,)
    for merge in ("ortho", "ortho_v2"):
        given["merge"] = merge
        assert torch.equal(id_attention(**given, backend="cpu"), torch.zeros_like(given["q"]))


def test_nan_reaches_the_result(isa):
    for name in ("q", "k_text", "v_text"):
        given = make_inputs(Case("nan", "test", heads=1, lq=4, lt=5, merge="add"))
        given[name] = given[name].clone()
        given[name][0, 0, 0, 0] = float("nan")
        assert id_attention(**given, backend="cpu")[0, 0, 0].isnan().any()


def test_large_logits_and_scales_stay_finite(isa):
    case = Case("large", "test", heads=2, lq=50, num_zero=3)
    given = make_inputs(case)
    given["q"] = given["q"] * 140.0
    want = id_attention(**{k: v.double() if k in ("q", "k_text", "v_text") else v for k, v in given.items()
                           if k not in ("k_id", "v_id")},
                        k_id=[t.double() for t in given["k_id"]], v_id=[t.double() for t in given["v_id"]],
                        backend="reference")  # fmt: skip
    got = id_attention(**given, backend="cpu")
    assert torch.isfinite(got).all() and (got - want).abs().max() < 2e-3


def test_workspace_can_be_freed():
    given = make_inputs(Case("workspace", "test", heads=2, lq=300))
    want = id_attention(**given, backend="cpu")
    assert _C.release_workspace() > 0
    assert _C.release_workspace() == 0
    assert torch.equal(id_attention(**given, backend="cpu"), want)


def test_forked_child_works_with_one_thread():
    """GNU OpenMP cannot rebuild its threads after fork; one thread is the documented way."""
    code = (
        "import os, torch\n"
        "from idcore.testing import Case, make_inputs\n"
        "from idcore.ops import id_attention\n"
        "torch.set_num_threads(2)\n"
        "given = make_inputs(Case('fork', 'test', heads=4, lq=600))\n"
        "want = id_attention(**given, backend='cpu')\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    torch.set_num_threads(1)\n"
        "    os._exit(0 if torch.equal(id_attention(**given, backend='cpu'), want) else 1)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0


def test_forward_takes_no_float32_copy_of_sixteen_bit_inputs():
    """The workspace of a bf16 call holds the text attention in bf16 and per-head sums, nothing of q's size in fp32."""
    _C.release_workspace()
    case = Case("memory", "test", heads=10, lq=4096, dtype="bf16")
    id_attention(**make_inputs(case), backend="cpu")
    result_bytes = 2 * case.heads * case.lq * case.head_dim
    assert _C.release_workspace() < 1.7 * result_bytes


def test_backend_names_what_it_cannot_run():
    from idcore.backends.call import Call

    def reasons(**changes):
        facts = dict(
            device="cpu", dtype=torch.float32, batch=1, heads=2, lq=8, lt=4, head_dim=64, li=(3,), merge="add",
            has_mask=False, has_text_bias=False, needs_grad=False, mask_needs_grad=False, dense_last_dim=True,
        )  # fmt: skip
        return cpu.why_not(Call(**{**facts, **changes}))

    assert reasons() == []
    assert reasons(device="cuda") == ["device=cuda (runs on cpu)"]
    assert reasons(dtype=torch.float64) == ["dtype=float64 (needs float32, bfloat16 or float16)"]
    assert reasons(head_dim=512) == ["head_dim=512 (at most 256)"]
    assert reasons(li=(1,) * 17) == ["17 identities (at most 16)"]
    assert "call .contiguous()" in reasons(dense_last_dim=False)[0]
