"""Compile the kernels for a GPU generation on a machine without a GPU, and read what came out.

The real launch code runs on CPU tensors and Triton's own argument binder specialises its arguments; only the
launch itself is left out. So what is compiled here is what a GPU would run for the same call.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver

from . import launch


class _NoDriver:
    """What Triton's binder asks a driver before it compiles."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"sm{self.target.arch}"  # Triton keeps one cache of compiled kernels per device

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@dataclass
class Built:
    """One compiled kernel. registers a thread; spills in bytes; shared: dynamic shared memory in bytes."""

    name: str
    capability: int
    warps: int
    shared: int
    registers: int
    spills: int
    instructions: set[str] = field(default_factory=set)  # SASS mnemonics with their suffixes
    to_one_number: bool = False  # whether a sum over all of a vector is taken


@contextlib.contextmanager
def recording(capability: int) -> Iterator[list]:
    """Launches inside compile for `capability` (80, 90, 100, ...); the list receives Triton's kernel
    objects.
    """
    kernels: list = []

    def compile_only(kernel, grid, arguments) -> None:
        kernels.append(kernel.warmup(grid=grid, **arguments))

    before = driver._active
    driver.set_active(_NoDriver(capability))
    token = launch.ahead_of_time.set((compile_only, capability))
    try:
        yield kernels
    finally:
        launch.ahead_of_time.reset(token)
        driver._active = before


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def read(kernel, capability: int) -> Built:
    """Registers and spills from ptxas, mnemonics from cuobjdump (both in Triton's wheel)."""
    tool = Path(get_ptxas(capability).path)
    arch = re.search(r"^\.target (\S+?)(,|$)", kernel.asm["ptx"], re.MULTILINE)[1]
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "k.ptx"), Path(folder, "k.cubin")
        ptx.write_text(kernel.asm["ptx"])
        cubin.write_bytes(kernel.asm["cubin"])
        log = _run(str(tool), "-v", f"--gpu-name={arch}", str(ptx), "-o", str(Path(folder, "again.cubin")))
        sass = _run(str(tool.with_name("cuobjdump")), "-sass", str(cubin))
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))
    return Built(
        name=kernel.metadata.name, capability=capability, warps=kernel.metadata.num_warps,
        shared=kernel.metadata.shared,
        registers=int(re.search(r"Used (\d+) registers", log)[1]), spills=spilled,
        instructions=set(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_.]+)", sass,
                                    re.MULTILINE)),
        to_one_number=re.search(r"\(tensor<\d+xf32>\) -> f32", kernel.asm["ttir"]) is not None,
    )  # fmt: skip
