"""The CUDA kernels' own source, compiled for the host and run thread by thread, against float64.

csrc/cuda/emulate.h stands in for the instructions of the GPU (mma, ldmatrix, cp.async, shuffles, barriers of a block
and of the grid). What this cannot show: timing, and that ptxas and the hardware do what the PTX manual says.
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


def compile_library(folder: Path, *flags: str, source: str = "emulate.cpp"):
    """A C++ file of this folder as a loaded library."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the kernels for the host")
    path = folder / "emulated.so"
    file = str(Path(__file__).with_name(source))
    done = subprocess.run(["g++", *FLAGS, *flags, file, "-o", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    library = ctypes.CDLL(str(path))
    library.params_bytes.restype = ctypes.c_int64
    return library


def attention_library(folder: Path, *flags: str):
    library = compile_library(folder, *flags)
    library.id_attention_emulated.restype = ctypes.c_char_p
    library.planned.restype = None
    return library


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return attention_library(tmp_path_factory.mktemp("emulated"))


def run(library, a, out: torch.Tensor, warps: int, grid: int = 0, slots: int = 0, seed: int = 1) -> None:
    """Two launches where grid is 0, else one of `grid` blocks that keep `slots` tiles each."""
    error = library.id_attention_emulated(ctypes.byref(params(a, out)), warps, grid, slots, seed)
    assert error is None, error.decode()


def check(library, c: Case, warps: int, grid: int = 0, slots: int = 0) -> None:
    a, truth = build(c)
    results = []
    for seed in (1, 2):  # other orders of the threads must give the same bits
        out, frame = poisoned(a.q)
        run(library, a, out, warps, grid, slots, seed)
        assert frame[:, 0].isnan().all() and frame[:, -1].isnan().all(), "wrote outside its result"
        results.append(out)
    tiles = -(-c.lq // (16 * warps)) * c.h * c.b
    check_forward(c, results[0], a, truth, between=c.merge != "add" and tiles > grid * slots)
    assert torch.equal(results[0], results[1]), f"depends on the order of threads: {c}"


BASE = Case(dtype=torch.float16, b=1, h=2, rows=(1,), text_rows=1)
V2 = BASE.with_(merge="ortho_v2")
TWO = dict(li=(5, 32), rows=(1, 2), scale=(0.7, -0.4), b=2)
CASES = {  # the call, warps of a block; where one launch does ortho: its blocks, and the tiles that each keeps
    "add": (BASE, 2),
    "add, identities of one block of keys and of more": (
        BASE.with_(li=(4, 37, 32, 0), rows=(1,) * 4, scale=(0.5, -0.7, 1.0, 0.3), zero=3, mask=True, lq=20),
        1,
    ),
    "ortho": (BASE.with_(merge="ortho", **TWO, mask=True), 1),
    "ortho_v2, six warps": (V2.with_(h=1, lq=130), 6),
    "bfloat16 ortho_v2": (V2.with_(dtype=torch.bfloat16, scale="tensor"), 2),
    "bfloat16 add, bias": (BASE.with_(dtype=torch.bfloat16, bias=True, lt=100), 2),
    "D=40, fewer tokens than five": (V2.with_(d=40, lq=17, li=(1,), zero=9), 1),
    "D=80": (V2.with_(d=80, lq=20, h=1), 2),
    "D=128, bias": (BASE.with_(merge="ortho", d=128, lq=17, h=1, bias=True), 1),
    "D=160": (V2.with_(d=160, lq=17, h=1), 1),
    "one row": (V2.with_(lq=1, num_global=9), 1),
    "not aligned": (V2.with_(layout="holes", lq=20), 2),
    "rows cut out": (BASE.with_(layout="cut", lq=63), 4),
    "identity without tokens": (V2.with_(li=(0, 37), rows=(1, 1), scale=(1.0, 0.0), zero=3), 2),
    "no identity": (BASE.with_(merge="ortho", li=(), rows=(), scale=1.0), 2),
    "no zero tokens, cond and uncond": (BASE.with_(b=4, h=1, lq=16, rows=(2,), zero=0), 1),
    "bank, one stage for all": (BASE.with_(stages=4, b=2, text_rows=2, lq=20), 1),
    "bank, a stage for each sample": (V2.with_(stages=3, stage_rows=4, b=4, h=1, text_rows=2, lq=17), 1, 3, 3),
    "bank, not aligned": (BASE.with_(stages=2, layout="holes", lq=5), 1),
    "one launch, a tile a block": (V2.with_(lq=60), 2, 4, 1),
    "one launch, all on the chip": (BASE.with_(merge="ortho", **TWO, mask=True), 1, 5, 3),
    "one launch, some leave the chip": (V2.with_(**{**TWO, "scale": "tensor"}, lq=77, mask=True), 1, 4, 2),
    "one launch, not aligned": (V2.with_(layout="holes", lq=70, h=1), 1, 2, 2),
    "one launch, bfloat16": (V2.with_(dtype=torch.bfloat16, lq=150, lt=20), 2, 3, 2),
    "one launch, D=40": (V2.with_(d=40, lq=40, h=3, zero=0), 1, 4, 2),
    "one launch, D=80": (V2.with_(d=80, lq=40, lt=33), 1, 2, 3),
    "one launch, D=128": (BASE.with_(merge="ortho", d=128, lq=33, lt=5), 1, 2, 2),
    "one launch, D=160": (V2.with_(d=160, lq=33, lt=5, li=(4, 1, 2), rows=(1,) * 3, h=1), 1, 2, 2),
    "one launch, sixteen identities": (V2.with_(li=(2,) * 16, rows=(1,) * 16, lq=20, lt=5, scale=0.1), 1, 2, 2),
    "one launch, tiles of one stage": (V2.with_(li=(0,), zero=2, lt=9, lq=96, h=1), 1, 1, 3),
    "one launch, bias": (V2.with_(bias=True, lq=50, zero=0), 2, 2, 2),
}


@pytest.mark.parametrize("name", CASES)
def test_emulated_kernels_agree_with_float64(library, name):
    check(library, *CASES[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("growth", [3.0, 40.0])
def test_logits_that_grow_along_the_keys_move_the_softmax_s_reference(library, dtype, growth):
    """Each block of keys has larger logits than the one before, by less and by more than the headroom."""
    c = V2.with_(dtype=dtype, lt=128, li=(96,), zero=2, lq=16, h=1)
    a, truth = build(c)
    ramp = {n: torch.linspace(-growth, growth, n).reshape(1, 1, n, 1) / 8 for n in (128, 96)}
    bend = [a.q.float().mean(2, keepdim=True).sign() * ramp[n] + 0.1 * t.float()
            for n, t in ((128, a.k_text), (96, a.k_id[0]))]  # fmt: skip
    k_text, k_id = (x.to(dtype) for x in bend)
    a = a._replace(k_text=k_text, k_id=(k_id,))
    truth = truth._replace(k_text=k_text.double(), k_id=(k_id.double(),))
    out, _ = poisoned(a.q)
    run(library, a, out, 1)
    check_forward(c, out, a, truth, between=True)


@pytest.mark.parametrize("index, taken", [(-7, 0), (99, 3)])
def test_a_stage_outside_the_bank_is_kept_inside(library, index, taken):
    c = BASE.with_(stages=4, lq=5, lt=9)
    a, truth = build(c)
    out, _ = poisoned(a.q)
    run(library, a._replace(stage=torch.tensor([index], dtype=torch.int32)), out, 1)
    inside = torch.tensor([taken], dtype=torch.int32)
    check_forward(c, out, a._replace(stage=inside), truth._replace(stage=inside))


def test_struct_layout_is_the_same_here_and_in_csrc(library):
    assert library.params_bytes() == ctypes.sizeof(Params)


class Limits(ctypes.Structure):
    """`Limits` of csrc/cuda/id_attention_plan.h."""

    _fields_ = [("multiprocessors", ctypes.c_int32), ("shared_bytes", ctypes.c_int32), ("shared_all", ctypes.c_int32),
                ("cooperative", ctypes.c_bool)]  # fmt: skip


GPUS = {  # multiprocessors; shared memory of a block and of a multiprocessor
    "sm_80": Limits(108, 163 * 1024, 164 * 1024, True),
    "sm_89": Limits(128, 99 * 1024, 100 * 1024, True),
    "sm_90": Limits(132, 227 * 1024, 228 * 1024, True),
}


def planned(library, c: Case, limits: Limits, resident: int | None = None) -> dict[str, int]:
    a, _ = build(c)
    got = (ctypes.c_int64 * 6)()
    held = ctypes.c_int64(limits.multiprocessors * (2 if c.d <= 64 else 1) if resident is None else resident)
    library.planned(ctypes.byref(params(a, torch.empty_like(a.q))), ctypes.byref(limits), held, got)
    return dict(zip(("warps", "grid", "slots", "together", "shared", "scratch"), got, strict=True))


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("merge", ["add", "ortho_v2"])
@pytest.mark.parametrize("d", [40, 64, 80, 128, 160])
def test_blocks_fit_the_shared_memory_of_every_generation(library, d, merge, gpu):
    for lq, n in ((1024, 1), (17, 1), (4096, 16)):
        p = planned(library, BASE.with_(d=d, merge=merge, h=20, lq=lq, lt=2, li=(1,) * n, rows=(1,) * n), GPUS[gpu])
        assert 1 <= p["warps"] <= 8 and p["shared"] <= GPUS[gpu].shared_bytes
        if p["together"]:
            blocks = 2 if d <= 64 else 1
            assert p["grid"] <= blocks * GPUS[gpu].multiprocessors
            assert blocks * (p["shared"] + 1024) <= GPUS[gpu].shared_all
            tiles = -(-lq // (16 * p["warps"])) * 20
            assert p["warps"] >= 4 or tiles == p["grid"], "blocks with several tiles need warps to hide waits"
    assert planned(library, BASE.with_(d=d, merge=merge, lq=17), GPUS[gpu])["warps"] == 1  # few rows


def test_ortho_of_sdxl_is_one_launch_and_stays_on_the_chip(library):
    wide, narrow = V2.with_(h=20, lq=1024, lt=2), V2.with_(h=10, lq=4096, lt=2)
    for c in (wide, narrow):
        p = planned(library, c, GPUS["sm_90"])
        assert p["together"] and p["scratch"] < 4 * c.h * c.lq + 200 * 2 * 64 * 4 * c.h, p  # no h in memory
    p = planned(library, narrow.with_(b=2), GPUS["sm_90"])
    assert p["together"] and p["scratch"] > 2 * 2 * 10 * 4096 * 64, p  # guidance halves: a part leaves the chip


@pytest.mark.parametrize("shape", [dict(h=10, lq=4096), dict(h=20, lq=1024)])
@pytest.mark.parametrize("b", [1, 2, 4, 8])
def test_no_multiprocessor_of_an_h100_gets_much_more_than_its_share(library, shape, b):
    """Blocks are as large as they can be (they share the reads of K and V) while SDXL's layers still come out even."""
    p = planned(library, BASE.with_(b=b, lt=77, **shape), GPUS["sm_90"])
    busiest = -(-p["grid"] // 132) * p["warps"] * 16
    assert p["grid"] == -(-shape["lq"] // (16 * p["warps"])) * shape["h"] * b
    assert busiest <= 1.1 * shape["lq"] * shape["h"] * b / 132, p
    assert p["warps"] >= 5, p


def test_two_launches_where_one_cannot_be(library):
    c = V2.with_(h=10, lq=1024, lt=2)
    assert planned(library, c, GPUS["sm_90"])["together"]
    assert not planned(library, c, GPUS["sm_90"], resident=100)["together"]  # the device holds fewer blocks
    assert not planned(library, c, Limits(132, 227 * 1024, 228 * 1024, False))["together"]
    assert not planned(library, c.with_(h=40, lq=9216, b=4, lt=1), GPUS["sm_90"])["together"]  # too much to keep


@pytest.mark.parametrize("left_out", ["BARRIER", "GRID_BARRIER"])
def test_leaving_barriers_out_is_noticed(tmp_path, left_out):
    broken = attention_library(tmp_path, f"-DIDCORE_EMULATE_NO_{left_out}", "-O1")
    a, truth = build(BASE.with_(merge="ortho"))
    out, _ = poisoned(a.q)
    run(broken, a, out, 2, 4, 1)
    with pytest.raises(AssertionError):
        check_forward(BASE, out, a, truth, between=True)


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
            layout=r.choice(("packed", "plain", "holes", "cut")), stages=r.choice((0, 0, 3)),
            stage_rows=r.choice((1, b)), seed=seed,
        )  # fmt: skip
        warps = r.choice((1, 2, 4))
        tiles = -(-c.lq // (16 * warps)) * c.h * c.b
        grid = 0 if c.merge == "add" or not n else r.choice((0, min(tiles, 3), min(tiles, 7)))
        rounds = -(-tiles // grid) if grid else 1
        least = min(rounds, 3 if c.lt <= 32 and not sum(c.li) else 2)
        check(library, c, warps, grid, r.randint(least, max(least, min(rounds, 4))))
