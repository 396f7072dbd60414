"""What the compilers make of the kernels: registers, spills, shared memory, instructions. Needs no GPU."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR = {80: "HMMA.16816", 90: ("HGMMA", "HMMA.16816"), 100: ("UTCHMMA", "HMMA.16816")}
# kernels without a matrix product; and those of wide tiles, which must use the generation's own instruction at D = 64
NO_PRODUCT = {"merge_kernel", "fold_kernel", "quotient_kernel", "join_kernel", "tokens_kernel", "tokens_grad_kernel",
              "embeddings_grad_kernel"}  # fmt: skip
WIDE = {"forward_kernel", "keys_kernel", "loss_kernel", "loss_keys_kernel", "gather_kernel", "text_kernel"}
OWN = {80: "HMMA.16816", 90: "HGMMA", 100: "UTCHMMA"}
ALL = NO_PRODUCT | WIDE | {"coupling_kernel", "rows_kernel", "loss_rows_kernel", "image_kernel"}


def build_ahead(*jobs: str) -> list[dict]:
    """Kernels of jobs "dtype,head dim,op or merge,capability[,variant]" (`build_ahead.py`), never interpreted.

    Jobs of one generation share a process; two processes run side by side.
    """
    by_generation: dict[str, list[str]] = {}
    for job in jobs:
        by_generation.setdefault(job.split(",")[3], []).append(job)
    with ThreadPoolExecutor(2) as pool:
        return [kernel for kernels in pool.map(_build, by_generation.values()) for kernel in kernels]


def _build(jobs: list[str]) -> list[dict]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("build_ahead.py")), *jobs]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=3000)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(kernels: list[dict], spills: int = 0) -> None:
    for k in kernels:
        assert k["spills"] <= spills, k
        assert k["registers"] <= 255, k
        assert k["shared"] <= SHARED_LIMIT[k["capability"]], k
        if k["name"] not in NO_PRODUCT and k["dtype"] != "float32":
            assert any(i.startswith(TENSOR[k["capability"]]) for i in k["instructions"]), k
        # Triton 3.6, which PyTorch 2.11 brings, fails there
        assert not (k["to_one_number"] and any(i.startswith("UTCHMMA") for i in k["instructions"])), k
        if k["name"] == "gather_kernel" and k["dtype"] != "float32":
            assert any(i.startswith("LDGSTS") for i in k["instructions"]), f"no copies in the background: {k}"


# SDXL's call in every generation; what other variants there are (long text, a stage bank, few rows) in one each
COMMON = [("float16", 80), ("bfloat16", 90), ("float16", 100)]
SDXL = [f"{dtype},64,{op},{cap}" for dtype, cap in COMMON for op in ("ortho_v2", "token_loss", "semantic")]
VARIANTS = ["float16,64,add,90,forward", "float16,64,ortho,80,bank", "float16,64,ortho_v2,90,few",
            "float16,64,token_loss,100,long", "float16,64,semantic,80,long", "float16,64,stage_tokens,90"]  # fmt: skip


def test_triton_kernels_of_sdxl_compile_for_every_generation_without_spills():
    kernels = build_ahead(*SDXL, *VARIANTS)
    assert {k["name"] for k in kernels} == ALL
    check(kernels)
    for k in kernels:
        if k["name"] in WIDE and k["job"] in SDXL:
            assert any(i.startswith(OWN[k["capability"]]) for i in k["instructions"]), k


@pytest.mark.nightly
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_triton_kernels_of_every_head_dim(dtype, capability):
    for head_dim in (40, 64, 80, 128) if dtype == "float32" else (40, 64, 80, 128, 160):
        start = f"{dtype},{head_dim}"
        jobs = [
            f"{start},{merge},{capability},{v}" for merge in ("add", "ortho", "ortho_v2") for v in ("", "bank", "few")
        ]
        jobs += [f"{start},{op},{capability},{v}" for op in ("token_loss", "semantic") for v in ("", "long")]
        # float32 goes through plain multiply-adds, whose operands take many registers: the backward of wide heads
        # spills a few words, a price of exactness that no served configuration pays
        check(build_ahead(*jobs), spills=64 if dtype == "float32" and head_dim > 64 else 0)


@functools.cache
def cuda_binary(folder: Path) -> Path:
    """The compiled module where it holds CUDA code, else the commonest kernels compiled now."""
    try:
        from idcore import _C

        if hasattr(_C, "id_attention_cuda"):
            return Path(_C.__file__)
    except ImportError:
        pass
    if shutil.which("nvcc") is None:
        pytest.skip("idcore was built without CUDA and there is no nvcc")
    path = folder / "small.o"
    command = ["nvcc", "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "-gencode", "arch=compute_80,code=sm_80",
               "-c",
               str(ROOT / "csrc/cuda/id_attention_small.cu"), "-o", str(path)]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    return path


def cuobjdump(*arguments: str) -> str:
    return subprocess.run([str(TOOLS / "cuobjdump"), *arguments], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def binary(tmp_path_factory) -> Path:
    return cuda_binary(tmp_path_factory.mktemp("cuda"))


def test_cuda_kernels_keep_everything_in_registers(binary):
    text = cuobjdump("-res-usage", str(binary))
    usage = r"\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
    rows = re.findall(r"Function (\S*(?:attend|merge)_kernel\S*):" + usage, text)
    assert len(rows) >= 12, text[:2000]
    for name, registers, stack, local in rows:
        assert (stack, local) == ("0", "0"), f"{name} spills: stack {stack}, local {local}"
        # two blocks a multiprocessor: 65536 / (2 * 256) registers a thread, with six warps 65536 / (2 * 192)
        if re.search(r"ELi(40|64)ELb0", name):
            assert int(registers) <= 128, (name, registers)
        elif re.search(r"ELi((40|64)ELb1|80ELb0)", name):
            assert int(registers) <= 168, (name, registers)


def test_the_align_face_kernel_keeps_everything_in_registers(binary):
    rows = re.findall(r"Function \S*align_kernel\S*:\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)",
                      cuobjdump("-res-usage", str(binary)))  # fmt: skip
    if not rows:
        pytest.skip("only the attention kernels were compiled for this test")
    for registers, stack, local in rows:  # two blocks of 256 threads a multiprocessor
        assert int(registers) <= 128 and (stack, local) == ("0", "0")


nightly = pytest.mark.nightly


@pytest.mark.parametrize("arch", ["80", "90a", pytest.param("89", marks=nightly), pytest.param("100", marks=nightly)])
def test_cuda_kernels_use_tensor_cores_and_copies_in_the_background(binary, arch):
    archs = set(re.findall(r"sm_(\d+a?)", cuobjdump("-lelf", str(binary))))
    assert "80" in archs
    if arch not in archs:
        pytest.skip(f"this module holds no code for sm_{arch}")
    sass = cuobjdump("-arch", f"sm_{arch}", "-sass", str(binary))
    bodies = re.findall(r"Function : (\S*attend_kernel\S*)\n(.*?)(?=Function :|\Z)", sass, re.DOTALL)
    assert len(bodies) >= 6
    for name, body in bodies:
        kind = "HMMA.16816.F32.BF16" if "BFloat16" in name else "HMMA.16816.F32 "
        for wanted in (kind, "LDGSTS.E.BYPASS", "LDSM.16.M88.4", "LDSM.16.MT88.4"):
            assert wanted in body, f"{name} has no {wanted}"
        assert "LDL" not in body and "STL" not in body, f"{name} uses local memory"


@pytest.mark.parametrize(
    "version, archs, compression",
    [("13.0.88", "80-real;90a-real;100-real;100-virtual", "-Xfatbin=-compress-mode=size"),
     ("12.6.20", "80-real;90a-real;90-virtual", "-Xfatbin=-compress-all"),
     ("11.8", "80-real;90-real;90-virtual", "-Xfatbin=-compress-all")],
)  # fmt: skip
def test_an_older_nvcc_is_asked_only_for_what_it_knows(version, archs, compression):
    cmake = pytest.importorskip("cmake")
    command = [str(Path(cmake.CMAKE_BIN_DIR) / "cmake"), f"-DVERSION={version}",
               "-DARCHS=80-real;90a-real;100-real;100-virtual", "-P", "cmake/cuda_archs.cmake"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == f"-- {archs} {compression}"
