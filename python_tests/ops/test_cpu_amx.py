"""The AMX kernels: on the machine's own tiles, else on emulated ones (build with IDCORE_EMULATE_AMX=ON)."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
import torch

from idcore.ops import id_attention
from idcore.testing import Case, assert_parity, make_inputs

_C = pytest.importorskip("idcore._C", reason="the compiled module is not built: pip install -e .")


@pytest.fixture(params=("amx", "amx_emulated"))
def tiles(request):
    if request.param not in _C.compiled_isas():
        fix = "; build with IDCORE_EMULATE_AMX=ON" if request.param == "amx_emulated" else ""
        pytest.skip(f"this build has no {request.param}{fix}")
    if request.param not in _C.usable_isas():
        pytest.skip(f"this machine has no {request.param}")
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa("")


@pytest.mark.parametrize("head_dim", (32, 64, 96, 160, 256))
@pytest.mark.parametrize("merge", ("none", "add", "ortho", "ortho_v2"))
def test_tails_of_tiles(tiles, merge, head_dim):
    lengths = ((1, 1), (2, 5), (15, 16), (16, 17), (31, 32), (33, 37), (77, 4))
    for i, (lt, li) in enumerate(lengths):
        lq = (1, 16, 17, 33, 130, 31, 48)[(i + head_dim // 32) % 7]
        case = Case(f"tiles-{lt}-{li}", "tails", heads=2, lq=lq, lt=lt, li=(li,), head_dim=head_dim, dtype="bf16")
        assert_parity(case.with_(merge=merge, num_zero=i % 3), "cpu")


def test_several_identities_masks_biases_and_none_at_all(tiles):
    case = Case("people", "several", batch=2, heads=2, lq=70, li=(5, 33, 0), num_zero=2, mask=True, dtype="bf16")
    for merge in ("add", "ortho", "ortho_v2"):
        assert_parity(case.with_(merge=merge), "cpu")
        assert_parity(case.with_(merge=merge, bias="full", text_batch=2, layout="cut"), "cpu")


def test_agrees_with_the_dot_product_and_leaves_other_calls_to_it(tiles):
    """The same rounded operands, summed in another order; a head dim of no whole tiles takes the dot product itself."""
    for head_dim, same_bits in ((64, False), (40, True)):
        given = make_inputs(Case("both", "both", heads=2, lq=300, head_dim=head_dim, dtype="bf16"))
        _C.set_cpu_isa(tiles)
        ours = id_attention(**given, backend="cpu")
        _C.set_cpu_isa("avx512bf16")
        dots = id_attention(**given, backend="cpu")
        assert (ours.float() - dots.float()).abs().max() <= 2**-7 * dots.float().abs().max()
        assert torch.equal(ours, dots) == same_bits


def test_not_taken_by_default():
    """Its speed was not measured on a machine that has it."""
    assert not _C.cpu_isa().startswith("amx")


def test_the_unit_holds_tile_instructions():
    if "amx" not in _C.compiled_isas() or shutil.which("objdump") is None:
        pytest.skip("no AMX in this build, or no objdump")
    code = subprocess.run(["objdump", "-d", _C.__file__], capture_output=True, text=True, check=True).stdout
    for name in ("ldtilecfg", "tileloadd", "tdpbf16ps", "tilestored", "tilerelease"):
        assert re.search(rf"\b{name}\b", code), f"{name} is not there"
