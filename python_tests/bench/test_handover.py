"""OpenMP's threads between PyTorch's loops and ours: one runtime, and no call of ours ends threads of the team."""

import json
import os
import subprocess
import sys

import pytest

from idcore.bench import handover

pytest.importorskip("idcore._C", reason="the compiled module is not built: pip install -e .")

SCRIPT = """
import torch
from idcore.bench import handover
from idcore.ops import id_attention
from idcore.testing.cases import Case
torch.set_num_threads(8)
x = torch.randn(1 << 20)
case = Case("few", "test", heads=2, lq=64, merge="MERGE", num_zero=2)
given = case.inputs()
def forward():
    id_attention(**given, backend="cpu")
def backward():
    q = given["q"].clone().requires_grad_()
    id_attention(**{**given, "q": q}, backend="cpu").sum().backward()
print([handover.replaced(call, lambda: x + 1, turns=3) for call in (forward, backward)], len(handover.threads()))
"""


@pytest.mark.skipif(not handover.threads(), reason="this system does not list a process's threads")
@pytest.mark.parametrize("merge", ["add", "ortho_v2"])
def test_calls_with_little_to_do_keep_the_team(merge):
    """A team of two in the place of eight would end six threads, which PyTorch's next loop starts anew."""
    environment = {**os.environ, "OMP_NUM_THREADS": "8", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("MERGE", merge)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    replaced, alive = eval(done.stdout.replace("] ", "], "))
    assert replaced == [0, 0] and alive >= 8


@pytest.mark.skipif(not handover.threads(), reason="this system does not list a process's files")
def test_one_runtime_and_a_row_per_case():
    script = "import json; from idcore.bench import handover; print(json.dumps(handover.run(1, turns=2)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert len(report["runtimes"]) == 1
    assert [(r["case"], r["with"]) for r in report["rows"]] == [
        (c.name, other) for c in handover.CASES for other in ("add", "matmul")
    ]
    assert all(r["us"]["ours"] > 0 and r["us"]["in_turn"] > 0 and r["threads_replaced"] == 0 for r in report["rows"])
