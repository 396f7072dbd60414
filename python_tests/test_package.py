"""The package: what it exports, how light its import is, what it carries."""

import errno
import json
import os
import subprocess
import sys

import pytest

import idcore

PROBE = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.process_time()
import idcore
seconds = time.process_time() - start
idcore.__version__
new = set(sys.modules) - before
heavy = [m for m in new if m.split('.')[0] in ('diffusers', 'transformers', 'onnxruntime', 'triton', 'PIL')]
print(json.dumps({'seconds': seconds, 'heavy': heavy, 'compiled': 'idcore._C' in new,
                  'cuda': torch.cuda.is_initialized(), 'torchvision': 'torchvision' in sys.modules}))
"""


def test_import_is_light():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    seen = json.loads(done.stdout)
    assert seen["seconds"] < 1.5
    assert not seen["heavy"] and not seen["compiled"] and not seen["cuda"] and not seen["torchvision"]


def test_ops_and_the_embedded_pipeline_load_no_compiler():
    """PyTorch's compiler takes longer to import than PyTorch: who does not compile does not wait for it."""
    code = "import sys, idcore.ops, idcore.sampling.tiny_pipeline; print('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_our_mark_of_constants_is_the_compilers_own():
    import torch

    from idcore.backends.call import constant_in_traces

    def ours(): ...

    def theirs(): ...

    assert vars(constant_in_traces(ours)) == vars(torch.compiler.assume_constant_result(theirs)) != {}


def test_public_names_resolve():
    for name in idcore.__all__:
        assert getattr(idcore, name) is not None
    assert callable(idcore.attach)


def test_attach_stays_a_function_after_its_module_was_imported():
    code = "import idcore.sampling.tiny_pipeline, idcore.testing, idcore; assert callable(idcore.attach), idcore.attach"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_name_lists_what_there_is():
    with pytest.raises(AttributeError, match="no attribute 'atach'; it exports .*attach"):
        _ = idcore.atach


def test_the_compiled_module_is_built():
    """Not a skip: a checkout whose tests run must hold the C++ kernels."""
    from idcore.env import build_info

    info = build_info()
    assert "error" not in info, info.get("error")
    assert "base" in info["isa"]


def test_env_report_survives_and_is_json():
    from idcore.env import as_text, report

    r = report()
    assert {"machine", "command", "backends", "providers", "weights", "build"} <= set(r)
    json.dumps(r)
    assert r["backends"]["reference"]["usable"] and r["backends"]["cpu"]["usable"], r["backends"]
    for name, b in r["backends"].items():
        assert b["usable"] != bool(b["why_not"]), name
    assert "backends of id_attention" in as_text(r)


def test_env_as_a_module():
    done = subprocess.run([sys.executable, "-m", "idcore.env", "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["command"] == "python -m idcore.env --json"


def test_a_command_tells_errors_in_one_line(capsys):
    from idcore.errors import InputError, told

    def fails():
        raise InputError("wanted this, got that")

    assert told(lambda: None) == 0 and told(lambda: 3) == 3
    assert told(fails) == 1
    assert capsys.readouterr().err == "error: wanted this, got that\n"


def test_a_command_tells_what_the_disk_refuses_and_ctrl_c(capsys):
    from idcore.errors import told

    def full():
        raise OSError(errno.ENOSPC, "No space left on device", "out/a.png")

    def stopped():
        raise KeyboardInterrupt

    assert told(full) == 1
    assert "No space left on device: 'out/a.png'; free some space there" in capsys.readouterr().err
    assert told(stopped) == 130 and capsys.readouterr().err == "stopped\n"
    with pytest.raises(FileNotFoundError):  # a fault of ours keeps its traceback
        told(lambda: open("/no/such/file"))


def test_commands_hold_libraries_to_errors_unless_told_otherwise(monkeypatch):
    from diffusers.utils import logging

    from idcore.errors import quiet_libraries

    before = logging.get_verbosity()
    try:
        monkeypatch.setenv("DIFFUSERS_VERBOSITY", "warning")
        quiet_libraries()
        assert logging.get_verbosity() == before
        monkeypatch.delenv("DIFFUSERS_VERBOSITY")
        quiet_libraries()
        assert logging.get_verbosity() == logging.ERROR and os.environ["DIFFUSERS_VERBOSITY"] == "error"
    finally:
        logging.set_verbosity(before)
