"""The cuda backend's refusals and doors, on machines without a GPU."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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


def test_a_build_that_does_not_run_here_says_so(monkeypatch):
    class Built:
        id_attention_cuda_problem = staticmethod(lambda: "CUDA error 209: no kernel image")
        build_info = staticmethod(lambda: {"cuda_compiler": "13.0.88", "cuda_archs": ["80-real"]})

    monkeypatch.setattr(cuda, "_load", lambda: (Built, ""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    cuda._device_reasons.cache_clear()
    try:
        assert "(CUDA 13.0.88, 80-real) do not run on this GPU and driver (CUDA error 209: no kernel" in reasons()
    finally:
        cuda._device_reasons.cache_clear()


def test_a_refused_launch_is_planned_again(monkeypatch):
    """The device refuses one launch for all: the second plan has another workspace, and runs."""
    asked = []

    class Refusing:
        id_attention_cuda_plan = staticmethod(lambda *_: (256, 1) if not asked else (512, 2))

        @staticmethod
        def id_attention_cuda(*given):
            asked.append(given[-2])
            return given[-2] == 512

    monkeypatch.setattr(cuda, "_load", lambda: (Refusing, ""))
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    a, _ = build(Case(dtype=torch.float16, merge="ortho"))
    cuda.forward(a)
    assert asked == [256, 512]


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
        m.id_attention_cuda(*cuda.call_tuples(a, torch.empty_like(a.q))[0], 0, 0, 0)
    assert m.id_attention_cuda_problem().startswith("CUDA error ")


def test_too_small_a_workspace_asks_for_another_plan():
    m = module()
    a, _ = build(Case(dtype=torch.float16, merge="ortho"))
    tuples = cuda.call_tuples(a, torch.empty_like(a.q))[0]
    assert m.id_attention_cuda(*tuples, 0, m.id_attention_cuda_plan(*tuples)[0] - 1, 0) is False
    assert m.id_attention_cuda_together(False) is True and m.id_attention_cuda_together(True) is False


def test_importing_the_backend_needs_no_driver():
    code = "import idcore.backends.cuda as c; c.why_not"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
