"""Builds the extension for the GPU of this machine alone, with its own Python and torch, offline."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from .place import Save, nothing_saved, place

ROOT = Path(__file__).resolve().parents[3]


# Installed in place; where pip may not write into its environment, built in place: the parts run in the checkout.
WAYS = (
    ("-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "-e", str(ROOT)),
    ("setup.py", "-q", "build_ext", "--inplace"),
)


def architecture(capability: tuple[int, int]) -> str:
    """CMake's name of the one architecture that this GPU runs; Hopper and later need the "a" form for wgmma."""
    major, minor = capability
    number = major * 10 + minor
    return f"{number}{'a' if number == 90 else ''}-real"


def toolkit(tool: str) -> str | None:
    """Path of one of the CUDA toolkit's programs: on the PATH, beside nvcc, in $CUDA_HOME or /usr/local/cuda."""
    found, nvcc = shutil.which(tool), shutil.which("nvcc")
    homes = [Path(nvcc).resolve().parents[1]] if nvcc else []
    homes += [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for home in (*homes, Path("/usr/local/cuda")):
        for folder in ("bin", tool):
            found = found or shutil.which(tool, path=str(home / folder))
    return found


def _found() -> dict[str, Any]:
    code = (
        "import json, torch, importlib.util as u\n"
        "from idcore.env import build_info\n"
        "print(json.dumps({'build': build_info(), 'installed': u.find_spec('idcore.kernels') is not None}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        return {"build": {"error": done.stderr[-500:]}, "installed": False}
    return json.loads(done.stdout)


def run(_: Save = nothing_saved, seconds: float = 90) -> dict[str, Any]:
    """Installs the checkout in place unless it holds kernels for this GPU already."""
    if place().dry:
        return {"ok": True, "built": False, "arch": None, **_found()}
    wanted = architecture(torch.cuda.get_device_capability())
    before = _found()
    if wanted in before["build"].get("cuda_archs", ()):
        return {"ok": True, "built": False, "arch": wanted, **before}
    if not (ROOT / "setup.py").exists():
        return {"ok": False, "error": f"idcore was installed without CUDA kernels for {wanted}; run in a checkout"}
    environment = {
        **os.environ, "IDCORE_CUDA": "ON", "IDCORE_CUDA_ARCHS": wanted, "MAX_JOBS": str(os.cpu_count() or 4),
        "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }  # fmt: skip
    nvcc = toolkit("nvcc")
    if nvcc and not environment.get("CUDACXX"):
        environment["CUDACXX"] = nvcc
    said = []
    for command in WAYS:
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, cwd=ROOT,
                              check=False)  # fmt: skip
        said.append(f"{' '.join(command)}: status {done.returncode}\n{(done.stdout + done.stderr)[-4000:]}")
        after = _found()
        if wanted in after["build"].get("cuda_archs", ()):
            return {"ok": True, "built": True, "arch": wanted, "way": command[:2], **after}
    return {"ok": False, "arch": wanted, "error": "\n".join(said)}


def use_checkout() -> None:
    """Makes `idcore.kernels` importable in a bare checkout; an installation maps kernels/triton to it."""
    if importlib.util.find_spec("idcore.kernels") is not None or not (ROOT / "kernels" / "triton").exists():
        return
    folder = ROOT / "kernels" / "triton"
    spec = importlib.util.spec_from_file_location(
        "idcore.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["idcore.kernels"] = module
    spec.loader.exec_module(module)
