"""Kernels from the checkout where idcore is not installed, and cases shared by the kernel tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

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


@pytest.fixture(scope="module")
def kernels() -> SimpleNamespace:
    """Triton's `forward`, `forward_stats`, `backward` of id_attention, interpreted, and `gradients(a, g)` by both."""
    from idcore.kernels import launch, launch_bwd

    if not launch.INTERPRETED:
        pytest.fail("set TRITON_INTERPRET=1 before Python starts (test_triton.py does)")

    def gradients(a, g):
        return launch_bwd.backward(a, g, launch.forward_stats(a)[1])

    return SimpleNamespace(
        forward=launch.forward, forward_stats=launch.forward_stats, backward=launch_bwd.backward, gradients=gradients
    )
