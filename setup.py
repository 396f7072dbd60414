"""Builds csrc/ with CMake into idcore._C and maps kernels/triton to idcore.kernels. PyTorch is not needed to build.

Environment: IDCORE_CUDA=AUTO|ON|OFF, IDCORE_CUDA_ARCHS="80-real;...", CUDACXX=/path/to/nvcc, MAX_JOBS=n.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CUDA_ARCHS = "80-real;89-real;90a-real;100-real;100-virtual"


def find_tool(name: str, bin_attribute: str) -> str:
    """The build environment's own wheel before /usr/bin, so that versions do not flip from build to build."""
    try:
        tool = Path(getattr(importlib.import_module(name), bin_attribute)) / name
        if tool.exists():
            return str(tool)
    except (ImportError, AttributeError):
        pass
    tool = shutil.which(name)
    if tool is None:
        raise SystemExit(f"setup.py: {name} was not found; install it with `pip install {name}`")
    return tool


class CMakeBuild(build_ext):
    """One persistent build tree per interpreter, so a second `pip install` compiles only what changed."""

    def build_extension(self, ext: Extension) -> None:
        tree = ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        tree.mkdir(parents=True, exist_ok=True)
        cmake = find_tool("cmake", "CMAKE_BIN_DIR")
        subprocess.run([cmake, *self.configure_arguments(tree)], check=True)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 2)
        subprocess.run([cmake, "--build", str(tree), "-j", jobs], check=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        built = tree / "out" / Path(self.get_ext_filename("_C")).name
        # Unlink first: overwriting a library that a running process has mapped would crash that process.
        target.unlink(missing_ok=True)
        shutil.copy2(built, target)

    def configure_arguments(self, tree: Path) -> list[str]:
        """Everything that may differ from the last configure is passed each time, or CMake's cache would keep it."""
        import pybind11

        return [
            *("-S", str(ROOT), "-B", str(tree), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja', 'BIN_DIR')}",
            f"-DCMAKE_BUILD_TYPE={os.environ.get('IDCORE_BUILD_TYPE') or 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={tree / 'out'}",
            f"-DIDCORE_CUDA={os.environ.get('IDCORE_CUDA') or 'AUTO'}",
            f"-DIDCORE_CUDA_ARCHS={os.environ.get('IDCORE_CUDA_ARCHS') or CUDA_ARCHS}",
            f"-DIDCORE_EMULATE_AMX={os.environ.get('IDCORE_EMULATE_AMX') or 'OFF'}",
            f"-DIDCORE_SANITIZE={os.environ.get('IDCORE_SANITIZE') or 'OFF'}",
        ]


def package_names() -> list[str]:
    return [*find_packages(include=["idcore", "idcore.*"]), "idcore.kernels"]


setup(
    packages=package_names(),
    # kernels/ itself stays no package: Hugging Face has one of that name, which diffusers imports.
    package_dir={"idcore": "idcore", "idcore.kernels": "kernels/triton"},
    package_data={"idcore": ["assets/**/*", "py.typed"]},
    include_package_data=False,
    ext_modules=[Extension("idcore._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
