"""The CUDA kernels' own source, compiled for the host and run thread by thread, against float64.

csrc/cuda/emulate.h stands in for the instructions of the GPU (mma, ldmatrix, cp.async, shuffles,
                                                               barriers). What this cannot show:
timing, and that ptxas and the hardware do what the PTX manual says.
"""

from __future__ import annotations

import ctypes
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from cases import Case, build, check_forward, poisoned
from cuda_params import Params, params

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-std=c++17", "-O2", "-mf16c", "-mavx2", "-Wall", "-Wextra", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]


def compile_library(folder: Path, *flags: str):
    """emulate.cpp as a loaded library."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the kernels for the host")
    path = folder / "emulated.so"
    source = Path(__file__).with_name("emulate.cpp")
    done = subprocess.run(["g++", *FLAGS, *flags, str(source), "-o", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    library = ctypes.CDLL(str(path))
    library.id_attention_emulated.restype = ctypes.c_char_p
    library.params_bytes.restype = ctypes.c_int64
    return library


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return compile_library(tmp_path_factory.mktemp("emulated"))


def run(library, a, out: torch.Tensor, warps: int, seed: int) -> None:
    error = library.id_attention_emulated(ctypes.byref(params(a, out)), warps, seed)
    assert error is None, error.decode()


def check(library, c: Case, warps: int) -> None:
    a, truth = build(c)
    results = []
    for seed in (1, 2):  # other orders of the threads must give the same bits
        out, frame = poisoned(a.q)
        run(library, a, out, warps, seed)
        assert frame[:, 0].isnan().all() and frame[:, -1].isnan().all(), "wrote outside its result"
        results.append(out)
    check_forward(c, results[0], a, truth)
    assert torch.equal(results[0], results[1]), f"depends on the order of threads: {c}"


BASE = Case(dtype=torch.float16, b=1, h=2, rows=(1,), text_rows=1)
TWO = dict(li=(5, 32), rows=(1, 2), scale=(0.7, -0.4), b=2)
CASES = {
    "add": (BASE, 2),
    "ortho": (BASE.with_(merge="ortho", **TWO, mask=True), 1),
    "ortho_v2, six warps": (BASE.with_(merge="ortho_v2", h=1, lq=130), 6),
    "bfloat16 ortho_v2": (BASE.with_(dtype=torch.bfloat16, merge="ortho_v2", scale="tensor"), 2),
    "bfloat16 add, bias": (BASE.with_(dtype=torch.bfloat16, bias=True, lt=100), 2),
    "D=40, fewer tokens than five": (BASE.with_(merge="ortho_v2", d=40, lq=17, li=(1,), zero=9), 1),
    "D=80": (BASE.with_(merge="ortho_v2", d=80, lq=20, h=1), 2),
    "D=128, bias": (BASE.with_(merge="ortho", d=128, lq=17, h=1, bias=True), 1),
    "D=160": (BASE.with_(merge="ortho_v2", d=160, lq=17, h=1), 1),
    "one row": (BASE.with_(merge="ortho_v2", lq=1, num_global=9), 1),
    "not aligned": (BASE.with_(merge="ortho_v2", layout="holes", lq=20), 2),
    "rows cut out": (BASE.with_(layout="cut", lq=63), 4),
    "identity without tokens": (BASE.with_(merge="ortho_v2", li=(0, 37), rows=(1, 1), scale=(1.0, 0.0), zero=3), 2),
    "no identity": (BASE.with_(merge="ortho", li=(), rows=(), scale=1.0), 2),
    "no zero tokens, cond and uncond": (BASE.with_(b=4, h=1, lq=16, rows=(2,), zero=0), 1),
}


@pytest.mark.parametrize("name", CASES)
def test_emulated_kernels_agree_with_float64(library, name):
    check(library, *CASES[name])


def test_struct_layout_is_the_same_here_and_in_csrc(library):
    assert library.params_bytes() == ctypes.sizeof(Params)


@pytest.mark.parametrize("merge", ["add", "ortho_v2"])
@pytest.mark.parametrize("d", [40, 64, 80, 128, 160])
def test_blocks_fit_the_shared_memory_of_every_generation(library, d, merge):
    a, _ = build(BASE.with_(d=d, merge=merge, h=20, lq=1024))
    p = ctypes.byref(params(a, torch.empty_like(a.q)))
    sm89, sm80, sm90 = (library.planned_warps(p, *x) for x in ((128, 101376), (108, 166912), (132, 232448)))
    assert 1 <= sm89 <= 8 and 1 <= sm80 <= 8 and 1 <= sm90 <= 8
    a, _ = build(BASE.with_(d=d, merge=merge, lq=17))
    assert library.planned_warps(ctypes.byref(params(a, torch.empty_like(a.q))), 132, 232448) == 1  # few rows


def test_leaving_barriers_out_is_noticed(tmp_path):
    broken = compile_library(tmp_path, "-DIDCORE_EMULATE_NO_BARRIER", "-O1")
    a, truth = build(BASE.with_(merge="ortho"))
    out, _ = poisoned(a.q)
    run(broken, a, out, 2, 1)
    with pytest.raises(AssertionError):
        check_forward(BASE, out, a, truth)


@pytest.mark.nightly
@pytest.mark.parametrize("block", range(20))
def test_emulated_kernels_on_random_calls(library, block):
    for seed in range(10 * block, 10 * block + 10):
        r = random.Random(seed)
        n, b = r.choice((0, 1, 1, 2, 3)), r.choice((1, 2, 4))
        zero, divisors = r.choice((0, 1, 8)), [k for k in (1, 2, 4) if b % k == 0]
        c = Case(
            merge=r.choice(("add", "ortho", "ortho_v2")), dtype=r.choice((torch.float16, torch.bfloat16)),
            b=b, h=r.choice((1, 2)),
            lq=r.choice((1, 3, 17, 33, 63, 77)), lt=r.choice((1, 5, 77, 80, 129)), d=r.choice((40, 64, 80,
                                                                                               128, 160)),
            li=tuple(r.choice((0 if zero else 1, 1, 4, 5, 10, 16, 32, 37)) for _ in range(n)),
            rows=tuple(r.choice(divisors) for _ in range(n)), text_rows=r.choice(divisors), zero=zero,
            num_global=r.choice((1, 5, 40)), scale=r.choice(("tensor", 0.0, -1.5)) if n else 1.0,
            mask=n > 0 and r.random() < 0.5, bias=r.random() < 0.2,
            layout=r.choice(("packed", "plain", "holes", "cut")), seed=seed,
        )  # fmt: skip
        check(library, c, r.choice((1, 2, 4)))
