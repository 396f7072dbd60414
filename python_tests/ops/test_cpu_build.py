"""The compiled module: what it says of itself, how it fails, and that its units keep to themselves."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch  # noqa: F401  (first, so that one OpenMP runtime serves both)

from idcore.backends import cpu
from idcore.backends.call import Call

_C = pytest.importorskip("idcore._C", reason="the compiled module is not built: pip install -e .")
ROOT = Path(__file__).resolve().parents[2]


def run(code, **environment):
    env = {**os.environ, **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    return done.stdout + done.stderr


def test_build_info_names_what_is_in_it():
    info = _C.build_info()
    assert info["isa"][0] == "base" and info["isa_chosen"] in info["isa_usable"]
    assert set(info["isa_usable"]) <= set(info["isa"])
    assert info["compiler"] and isinstance(info["cuda_archs"], list)


def test_devices_can_be_asked_without_a_driver():
    devices = _C.cuda_devices()
    assert isinstance(devices, list)
    assert all({"name", "capability", "memory_bytes"} <= set(d) for d in devices)


def test_environment_forces_the_instruction_set():
    assert run("import torch; from idcore import _C; print(_C.cpu_isa())", IDCORE_CPU_ISA="base").strip() == "base"


def test_unknown_instruction_set_becomes_a_reason():
    code = (
        "import torch\nfrom idcore.testing import Case, make_inputs\nfrom idcore.ops import id_attention\n"
        "given = make_inputs(Case('x', 'test', heads=1, lq=2))\n"
        "id_attention(**given)\n"  # another backend takes it
        "id_attention(**given, backend='cpu')\n"
    )
    text = run(code, IDCORE_CPU_ISA="avx9000")
    assert "NoBackendError" in text and "IDCORE_CPU_ISA" in text and "base" in text


def test_unknown_name_is_refused():
    with pytest.raises(ValueError, match="'mmx' was not compiled in"):
        _C.set_cpu_isa("mmx")


def test_missing_module_becomes_a_reason_with_the_fix(monkeypatch):
    cpu._load.cache_clear()
    monkeypatch.setitem(sys.modules, "idcore._C", None)
    import idcore

    monkeypatch.delattr(idcore, "_C", raising=False)
    try:
        call = Call("cpu", torch.float32, 1, 1, 1, 1, 64, (1,), "add", False, False, False, False, True)
        (reason,) = cpu.why_not(call)
        assert "idcore._C cannot be loaded" in reason and "pip install -e ." in reason
    finally:
        monkeypatch.undo()
        cpu._load.cache_clear()


def test_wrong_tuples_are_refused_before_memory_is_touched():
    head = (0, 1, 0, 0, 0)
    numbers = (0, 0, 1, 1, 1, 1, 64, 0, 5)
    with pytest.raises(ValueError, match="numbers must be a tuple of 9, got 2"):
        _C.id_attention_cpu((0, 0), head, head, head, head, (), (), ())
    with pytest.raises(ValueError, match="k_text must be a tuple of 5, got 1"):
        _C.id_attention_cpu(numbers, head, (0,), head, head, (), (), ())
    with pytest.raises(ValueError, match="head dim above 256"):
        _C.id_attention_cpu((0, 0, 1, 1, 1, 1, 512, 0, 5), head, head, head, head, (), (), ())
    with pytest.raises(ValueError, match="more than 16 identities"):
        _C.id_attention_cpu(numbers, head, head, head, head, (), ((),) * 17, ())


def test_peak_is_a_rate():
    assert _C.cpu_peak_gflops(1, 0.01) > 0.1


def _isa_objects():
    return sorted(ROOT.glob("build/cmake-*/CMakeFiles/isa_*.dir/csrc/cpu/isa_*.o"))


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm on this machine")
def test_instruction_set_units_leak_no_weak_symbols():
    """A weak symbol built for AVX-512 could be linked for everybody and stop older machines."""
    objects = _isa_objects()
    if not objects:
        pytest.skip("no build tree beside the checkout")
    for path in objects:
        listing = subprocess.run(["nm", str(path)], capture_output=True, text=True, check=True).stdout
        leaks = [line for line in listing.splitlines() if line.split()[-2] in ("W", "V", "u")]
        assert not leaks, (path.name, leaks)
        shared = [line for line in listing.splitlines() if line.split()[-2] == "T"]
        assert len(shared) == 1 and "kernels_" in shared[0], (path.name, shared)


def test_openmp_runtime_is_shared_with_torch():
    """Two OpenMP runtimes in one process cost milliseconds per call and ignore torch.set_num_threads."""
    if not Path("/proc/self/maps").exists() or not _C.build_info()["openmp"]:
        pytest.skip("needs Linux and OpenMP")
    code = (
        "import torch\nfrom idcore import _C\n"
        "found = {l.split()[-1] for l in open('/proc/self/maps') if 'gomp' in l or 'iomp' in l or 'libomp' in l}\n"
        "print(len(found), sorted(found))"
    )
    assert run(code).startswith("1 "), run(code)
