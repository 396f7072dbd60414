"""The cuda backend's refusals and doors, on machines without a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import Case, build

from idcore import id_attention
from idcore.backends import cuda
from idcore.backends.call import Call
from idcore.errors import NoBackendError

CALL = Call("cuda", torch.float16, 2, 10, 4096, 77, 64, (32,), "add", False, False, False, False, True)


def reasons(**changes) -> str:
    import dataclasses

    return "; ".join(cuda.why_not(dataclasses.replace(CALL, **changes)))


def test_each_refusal_names_what_was_wanted_and_what_came():
    assert "dtype=float32 (bfloat16 or float16" in reasons(dtype=torch.float32)
    assert "head_dim=48 (one of 40, 64, 80, 128, 160)" in reasons(head_dim=48)
    assert "17 identities (at most 16)" in reasons(li=(4,) * 17)
    assert "head dim of q, k or v is not contiguous" in reasons(dense_last_dim=False)
    assert "gradients are recorded" in reasons(needs_grad=True)
    assert "device=cpu (runs on cuda)" in reasons(device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_the_error_says_so():
    q = torch.zeros(1, 1, 2, 64, dtype=torch.float16)
    with pytest.raises(NoBackendError, match=r"device=cpu \(runs on cuda\)"):
        id_attention(q, q, q, backend="cuda")
    assert "no usable CUDA device" in reasons()


def module():
    m = cuda._load()[0]
    if m is None:
        pytest.skip(cuda._load()[1])
    return m


def test_scratch_memory_is_sized_by_the_call():
    m = module()

    def plan(**changes) -> tuple[int, int]:
        a, _ = build(Case(dtype=torch.float16, **changes))
        return m.id_attention_cuda_plan(*cuda.call_tuples(a, torch.empty_like(a.q))[0])

    b, h, lq, d = 2, 2, 33, 64
    assert plan() == (0, 1)
    assert plan(lq=0) == (0, 0)
    assert plan(merge="ortho", li=(), rows=(), scale=1.0) == (0, 1)
    two = plan(merge="ortho")
    assert two[0] >= 4 * 2 * b * h * d and two[1] in (1, 2)
    assert two[1] == 1 or two[0] >= 2 * b * h * lq * d + 4 * 2 * b * h * d
    assert plan(merge="ortho_v2")[0] >= two[0] + 4 * b * h * lq


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_launch_without_a_driver_raises_the_runtime_s_text():
    m = module()
    a, _ = build(Case(dtype=torch.float16))
    with pytest.raises(RuntimeError, match="CUDA error (35|100): "):
        m.id_attention_cuda(*cuda.call_tuples(a, torch.empty_like(a.q))[0], 0, 0)


def test_importing_the_backend_needs_no_driver():
    code = "import idcore.backends.cuda as c; c.why_not"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
