"""The instruction sets of the compiled module, for tests of its kernels."""

import importlib.util

import pytest

if importlib.util.find_spec("idcore._C"):
    import torch  # noqa: F401  (first: one OpenMP for both)

    from idcore import _C
else:
    _C = None


@pytest.fixture(params=_C.compiled_isas() if _C else ["the compiled module"])
def isa(request):
    """Each compiled instruction set in turn, forced; skips those that this machine lacks."""
    if _C is None or request.param not in _C.usable_isas():
        pytest.skip(f"this machine has no {request.param}")
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa("")
