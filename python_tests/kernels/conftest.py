"""Kernels from the checkout where idcore is not installed, and cases shared by the kernel tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[2] / "kernels" / "triton"


def use_checkout() -> None:
    """Make `idcore.kernels` importable from the checkout (an installation maps kernels/triton to it)."""
    if importlib.util.find_spec("idcore.kernels") is not None:
        return
    spec = importlib.util.spec_from_file_location(
        "idcore.kernels", KERNELS / "__init__.py", submodule_search_locations=[str(KERNELS)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["idcore.kernels"] = module
    spec.loader.exec_module(module)


use_checkout()
sys.path.insert(0, str(Path(__file__).parent))
