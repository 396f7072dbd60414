"""The Triton backend: its interpreted checks in a process of their own, and its refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from idcore import id_attention
from idcore.backends import triton as backend
from idcore.errors import NoBackendError
from idcore.ops import dispatch

pytest.importorskip("triton")
HERE = Path(__file__).parent
CHECKS = ("interpreted_checks.py", "interpreted_shapes.py", "interpreted_ops.py")
TOKENS = "../ops/test_stage_tokens.py"  # its tests run with every backend that can


def run_checks(file: str, *selection: str, timeout: int) -> str:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", str(HERE / file), *selection]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("file", CHECKS)
def test_interpreted_kernels_agree_with_float64(file):
    assert " passed" in run_checks(file, "-m", "not nightly", timeout=1800)


def test_stage_tokens_interpreted():
    assert " passed" in run_checks(TOKENS, "-k", "triton", timeout=1800)


@pytest.mark.nightly
def test_interpreted_kernels_agree_with_float64_on_2000_random_calls():
    assert " passed" in run_checks("interpreted_shapes.py", "-m", "nightly", timeout=14400)


def test_refusals_name_the_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch._choose.cache_clear()
    q = torch.zeros(1, 1, 2, 64)
    with pytest.raises(NoBackendError, match="needs a CUDA device; TRITON_INTERPRET=1"):
        id_attention(q, q, q, backend="triton")
    wide = torch.zeros(1, 1, 2, 192)
    with pytest.raises(NoBackendError, match=r"head_dim=192 \(at most 128 for float32\)"):
        id_attention(wide, wide, wide, backend="triton")
    with pytest.raises(NoBackendError, match="dtype=float64"):
        id_attention(q.double(), q.double(), q.double(), backend="triton")
    assert backend.DIFFERENTIABLE is False
    many = torch.zeros(1, 1, 1, 1, dtype=torch.half).expand(4096, 20, 1, 64)
    with pytest.raises(NoBackendError, match="4096 samples of 20 heads .at most 65535 together"):
        id_attention(many, many, many, backend="triton")


def test_a_triton_that_is_too_old_is_refused(monkeypatch):
    backend._installation.cache_clear()
    monkeypatch.setattr("importlib.metadata.version", lambda name: "3.3.1")
    try:
        assert "Triton 3.3.1 is too old (needs 3.4 or newer, which PyTorch 2.8" in "; ".join(backend._installation())
    finally:
        backend._installation.cache_clear()


def test_importing_the_backend_imports_no_triton():
    code = "import sys, idcore.backends.triton; assert 'idcore.kernels' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE.parents[1])
