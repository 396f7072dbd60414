"""The GPU command on a machine without a GPU: it says so, and its parts' bookkeeping is right."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from idcore.backends import cpu, sdpa
from idcore.bench.gpu import (
    build,
    calls,
    graphs,
    main,
    place,
    progress,
    races,
    report,
    sanitize,
    shapes,
    steps,
    tests,
    timings,
)
from idcore.bench.main import main as bench
from idcore.testing import Case

SMALL = Case("small", "test", heads=2, lq=20, lt=7, li=(3,), num_zero=2, dtype="bf16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so_and_fails(tmp_path, capsys):
    assert bench(["gpu", "--out", str(tmp_path / "results")]) == 2
    assert "sees no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "results").exists(), "nothing was measured, so nothing is written"


def test_unknown_parts_name_the_choices():
    with pytest.raises(SystemExit, match="choose from build, tests, races, sanitize, timings"):
        main.chosen("races,timing")
    assert main.chosen("timings,build") == ["build", "timings"], "in the order of the parts"


def test_it_takes_less_than_nine_minutes():
    assert sum(main.PARTS.values()) < 9 * 60


def test_the_lists_are_as_many_and_as_mixed_as_promised():
    assert len(shapes.RACES) == 60 and len({c.name for c in shapes.RACES}) == 60
    assert len(shapes.SANITIZED) == 40
    assert {c.merge for c in shapes.SANITIZED} == set(shapes.MERGES)
    assert {c.head_dim for c in shapes.SANITIZED} == set(shapes.HEAD_DIMS)
    assert {c.dtype for c in shapes.SANITIZED} == {"fp16", "bf16"}
    assert any(c.stages for c in shapes.SANITIZED) and any(c.layout == "cut" for c in shapes.SANITIZED)
    assert races.REPEATS == 250
    assert {c.head_dim for c in shapes.TRAINED} == set(shapes.HEAD_DIMS)
    assert {c.merge for c in shapes.TRAINED} == set(shapes.MERGES)
    assert {c.op for c in shapes.OPS} == {"id_attention", "semantic_alignment", "stage_tokens", "token_attention_loss"}


def test_the_kernel_part_needs_neither_diffusers_nor_pillow():
    code = (
        "import sys\n"
        "for name in ('diffusers', 'transformers', 'safetensors', 'PIL', 'typer', 'tqdm', 'onnxruntime', 'peft',\n"
        "             'accelerate', 'scipy', 'skimage', 'onnx', 'hypothesis'):\n"
        "    sys.modules[name] = None\n"
        "import importlib\n"
        "for name in ('main', 'gpu.main', 'gpu.calls', 'gpu.races', 'gpu.sanitize', 'gpu.tests', 'gpu.timings'):\n"
        "    importlib.import_module('idcore.bench.' + name)\n"
        "from idcore.ops import id_attention\n"
        "from idcore.testing import Case, fuzz\n"
        "assert fuzz.fuzz('id_attention', 'sdpa', range(3)).ran == 3\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("capability, arch", [((8, 0), "80-real"), ((9, 0), "90a-real"), ((10, 0), "100-real")])
def test_one_architecture_is_built(capability, arch):
    assert build.architecture(capability) == arch


def test_repeats_that_agree_and_repeats_that_do_not(monkeypatch):
    if cpu._load()[0] is None:
        pytest.skip(cpu._load()[1])
    with torch.no_grad():
        assert races.forward_differences(SMALL, "cpu", 5, "cpu") == 0
    assert races.backward_differences(SMALL.with_(tensor_scale=True), "sdpa", 3, "cpu") == 0
    right, turn = sdpa.forward, []

    def racing(a, out=None):
        turn.append(1)
        result = right(a, out)
        return result.neg_() if len(turn) % 3 == 0 else result

    monkeypatch.setattr(sdpa, "forward", racing)
    with torch.no_grad():
        assert races.forward_differences(SMALL, "sdpa", 9, "cpu") == 3


MEMCHECK = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: {} error{}\n"
RACECHECK = "========= COMPUTE-SANITIZER\n========= RACECHECK SUMMARY: {} hazards displayed ({} errors, 0 warnings)\n"


def test_verdicts_of_the_sanitizer():
    assert sanitize.judged(MEMCHECK.format(0, "s"), 0)["ok"]
    assert sanitize.judged(RACECHECK.format(0, 0), 0)["ok"]
    wrong = sanitize.judged(MEMCHECK.format(3, "s"), sanitize.ERRORS)
    assert not wrong["ok"] and wrong["findings"] == 3 and "COMPUTE-SANITIZER" in wrong["output"]
    assert sanitize.judged(RACECHECK.format(2, 2), sanitize.ERRORS)["findings"] == 2
    assert not sanitize.judged("Device not supported", 1)["ok"], "a tool that did not run proves nothing"
    assert not sanitize.judged(MEMCHECK.format(0, "s"), None)["ok"], "stopped for time"
    assert not sanitize.judged("", 0)["ok"], "no summary"


TESTS = """
import os, sys, time, pytest
def test_passes(): pass
def test_fails(): assert 1 == 2, "one is two"
@pytest.mark.skip
def test_is_skipped(): pass
def test_hangs(): time.sleep(600)
def test_dies(): os._exit(9)
def test_comes_last(): pass
"""


def test_a_test_that_hangs_or_dies_costs_itself(tmp_path, monkeypatch):
    """And those before and behind it count."""
    folder = tmp_path / "python_tests" / "kernels"
    folder.mkdir(parents=True)
    (folder / "test_some.py").write_text(TESTS.replace("def test_", "@pytest.mark.gpu\ndef test_"))
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: x\n")
    monkeypatch.setattr(tests, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(tests.__file__).resolve().parents[3]))
    shard = tests._Shard(tmp_path, "0/1")
    done = False
    while not done:
        last = ([{}] + progress.lines(shard.file)[shard.before :])[-1]  # of this process
        shard.patience = 0.0 if last.get("began", "").endswith("test_hangs") else 1e9
        done = shard.look()
        time.sleep(0.1)
    found = shard.result()
    counts = (found["tests"], found["failures"], found["skipped"], found["errors"])
    assert counts == (4, 1, 1, 2), shard.file.read_text()
    texts = "\n".join(found["failed"])
    assert "test_fails: " in texts and "one is two" in texts
    assert "test_hangs: hung for 0 s" in texts and "test_dies: its process ended with status 9" in texts


def test_a_process_of_tests_that_cannot_begin_is_told_of(tmp_path, monkeypatch):
    monkeypatch.setattr(tests, "ROOT", tmp_path)  # no tests there
    shard = tests._Shard(tmp_path, "0/1")
    shard.process.wait(timeout=60)
    assert shard.look(), "no other process is started"
    assert shard.result()["errors"] == 1 and "process 0/1: its process ended with status 4" in shard.lost[0]


def test_a_context_that_is_lost_ends_the_process_behind_its_test(tmp_path, monkeypatch):
    left = []
    monkeypatch.setenv("IDCORE_TEST_PROGRESS", str(tmp_path / "p"))
    monkeypatch.setattr(progress, "_context_works", lambda: False)
    monkeypatch.setattr(os, "_exit", left.append)
    one = SimpleNamespace(nodeid="a", when="call", passed=False, failed=True, outcome="failed", longreprtext="no")
    progress.pytest_runtest_logreport(one)
    assert left == [progress.LOST] and progress.lines(tmp_path / "p")[-1]["outcome"] == "failed"
    passed = SimpleNamespace(nodeid="b", when="call", passed=True, failed=False, outcome="passed", longreprtext="")
    progress.pytest_runtest_logreport(passed)
    assert len(left) == 1
    (tmp_path / "p").open("a").write('{"began": "cut o')
    assert len(progress.lines(tmp_path / "p")) == 2


def test_shares_cover_a_list_once():
    together = [x for i in range(5) for x in calls.part(range(23), f"{i}/5")]
    assert sorted(together) == list(range(23))


def test_one_call_forward_and_backward():
    for case in shapes.SANITIZED[:6]:
        assert torch.isfinite(calls.once(case, "sdpa", False, "cpu")).all()
    assert torch.isfinite(calls.once(shapes.RACES[2].with_(lq=33), "sdpa", True, "cpu")).all()


def test_rivals_compute_the_same_shape(monkeypatch):
    given = SMALL.inputs()
    for name, call in timings.rivals(given).items():
        assert call().shape == given["q"].shape, name
    monkeypatch.setattr(timings, "place", lambda: place.Place("cpu", ("cuda", "triton"), "triton", False))
    reasons = timings.usable(SMALL)
    assert set(reasons) == {"cuda", "triton"} and all(reasons.values()), "neither runs without a GPU"

    def broken(*_, **__):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(timings, "check_parity", broken)
    assert timings.usable(SMALL)["cuda"] == "error RuntimeError: no kernel image", "a fault of one is no one else's"


def as_part(monkeypatch, script):
    """Parts become processes of this script; the folder of their results is its argument."""
    monkeypatch.setattr(main, "_command", lambda name, out, seconds: [sys.executable, "-c", script, str(out), name])
    monkeypatch.setattr(main, "TICK", 0.2)


@pytest.mark.parametrize(
    "script, seconds, error",
    [("raise SystemExit(3)", 600, "ended with status 3"), ("import time; time.sleep(600)", 1, "stopped for time")],
)
def test_a_part_that_dies_or_hangs_becomes_a_result(tmp_path, monkeypatch, script, seconds, error):
    as_part(monkeypatch, script)
    result = main.part("races", tmp_path, seconds)
    assert not result["ok"] and error in result["error"]


BEGINS = """
import json, os, sys, time; from pathlib import Path
def save(found): Path(sys.argv[1], "new").write_text(json.dumps(found)), Path(sys.argv[1], "new").replace(at)
at, past = Path(sys.argv[1], sys.argv[2] + ".json"), Path(sys.argv[1], "past.json")
past = json.loads(past.read_text())["past"] if past.exists() else []
found = {"rows": [], "problems": [], "begun": [], "different": {"a": {}}}
print("began", flush=True)
for name in ("one", "two", "three", "four"):
    if name in past: continue
    found["begun"].append(name)
    save({**found, "under_way": [name, time.monotonic() + (0 if name == "two" else 600)]})
"""


def test_what_a_part_found_before_it_was_stopped_is_kept(tmp_path, monkeypatch):
    as_part(monkeypatch, BEGINS + "    found['rows'].append(1)\n    if name == 'two': time.sleep(600)\n")
    monkeypatch.setattr(main, "AGAIN", 1e9)  # too late for another process
    seen, right = [], main.gather
    monkeypatch.setattr(main, "gather", lambda out, found, *more: seen.append(right(out, found, *more)))
    monkeypatch.setattr(main, "report", SimpleNamespace(markdown=lambda whole: ""))
    monkeypatch.setattr(main, "machine", dict)
    result = main.part("timings", tmp_path, 600)
    assert result["rows"] == [1] and not result["ok"] and "stopped for time in two\nbegan" in result["error"]
    under_way = seen[-1]["parts"]["timings"]
    assert under_way["rows"] == [1] and under_way["error"] == "under way", "also while it runs"


def test_a_part_goes_on_behind_the_step_that_hung_or_killed_it(tmp_path, monkeypatch):
    step = """
    if name == "two": time.sleep(600)
    if name == "three": os._exit(70)
    found["rows"].append(name)
    found["different"]["a"][name] = 1
save({**found, "ok": True})
"""
    as_part(monkeypatch, BEGINS + step)
    monkeypatch.setattr(main, "machine", dict)
    monkeypatch.setattr(main, "report", SimpleNamespace(markdown=lambda whole: ""))
    result = main.part("timings", tmp_path, 600)
    assert not result["ok"] and "error" not in result
    assert result["rows"] == ["one", "four"] and result["different"] == {"a": {"one": 1, "four": 1}}
    assert {name: why.splitlines()[0] for name, why in result["lost"].items()} == {
        "two": "hung", "three": "ended with status 70",
    }  # fmt: skip
    assert "under_way" not in result
    told = {**result, "rows": []}
    assert "lost: two; lost: three" in report.markdown(
        {"machine": dict.fromkeys(("gpu", "driver", "torch", "triton", "commit")), "command": "x",
         "parts": {"timings": told}}
    )  # fmt: skip


def test_steps_are_named_before_they_begin_and_not_done_twice(monkeypatch):
    saved, found, left = [], {}, []
    done = steps.Steps(lambda x: saved.append(json.loads(json.dumps(x))), found, ["old"])
    assert not done.begin("old") and done.begin("new", 5)
    name, until = saved[-1]["under_way"]
    assert name == "new" and 0 < until - time.monotonic() <= 5 and saved[-1]["begun"] == ["new"]
    assert done.guarded(lambda: 3, left.append) == 3
    assert done.guarded(lambda: 1 / 0, lambda what: what) == "ZeroDivisionError: division by zero"
    monkeypatch.setattr(steps, "context_works", lambda: False)
    monkeypatch.setattr(os, "_exit", left.append)
    done.guarded(lambda: 1 / 0, lambda what: found.update(bad=what))
    assert left == [steps.LOST] and saved[-1]["bad"].startswith("Zero"), "first it is told"
    done.end()
    assert "under_way" not in found


def test_a_rival_that_cannot_be_captured_leaves_the_others_their_times(monkeypatch, capsys):
    def captured(calls):
        calls[0]()
        return graphs.Plain(calls)

    monkeypatch.setenv(place.DRY, "1")
    monkeypatch.setattr(graphs, "captured", captured)
    found = graphs.microseconds({"ours": [lambda: None], "bad": [lambda: 1 / 0]}, rounds=2)
    assert set(found) == {"ours"} and "not captured: bad: ZeroDivisionError" in capsys.readouterr().err
    assert timings._ratios({"cuda": timing(8.0), "eager": timing(40.0)}, "cuda", 4.0)["over_text_only_flash"] is None
    monkeypatch.setattr(graphs, "context_works", lambda: False)
    with pytest.raises(ZeroDivisionError):
        graphs.microseconds({"bad": [lambda: 1 / 0]}, rounds=2)


def test_the_toolkit_is_found_off_the_path(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    for tool in ("cuda/bin/nvcc", "cuda/compute-sanitizer/compute-sanitizer"):
        (tmp_path / tool).parent.mkdir(parents=True)
        (tmp_path / tool).touch(mode=0o755)
    assert build.toolkit("nvcc") == str(tmp_path / "cuda/bin/nvcc")
    assert build.toolkit("compute-sanitizer") == str(tmp_path / "cuda/compute-sanitizer/compute-sanitizer")


def timing(us):
    return {"us": us, "p10": us, "p90": us}


def test_the_report_gathers_what_is_there(tmp_path):
    races = {"ok": True, "calls": 60, "repeats": 250, "different": {"cuda": {}}, "seconds": 9}
    main.gather(tmp_path, {"races": races})
    row = {
        "case": "sdxl", "dtype": "bf16", "batch": 2, "merge": "add", "floor_us": 4.0, "launched_us": {"cuda": 9.0},
        "cold": {"cuda": timing(8.0), "eager": timing(40.0), "text_only_flash": timing(7.0)}, "launches": {"cuda": 1},
        "warm": {"cuda": timing(6.0)},
    }  # fmt: skip
    row["ratio"] = {"cuda": timings._ratios(row["cold"], "cuda", row["floor_us"])}
    assert row["ratio"]["cuda"] == {"eager": 5.0, "over_text_only_flash": 1.143, "share_of_copy_bandwidth": 0.5}
    decode = {"dtype": "bf16", "ms": {"diffusers": 90.0, "graph": 45.0}, "diffusers_over": {"graph": 2.0}}
    whole = {
        "ok": True,
        "problems": [],
        "copy_gb_per_s": 3000.0,
        "rows": [row],
        "unet": [],
        "ops": [],
        "decode": [decode],
    }
    main.gather(tmp_path, {"timings": whole})
    text = (tmp_path / "gpu.md").read_text()
    assert "| sdxl | bf16 | 2 | add | cuda | 8.0 | 6.0 | 9.0 | 4.0 | 0.5 | 1.143 | 5.0 |  | 1 |" in text
    assert "| bf16 | graph | 45.0 | 2.0 |" in text
    assert "| races | right | 9 |" in text and "| build |" not in text
    assert set(json.loads((tmp_path / "gpu.json").read_text())["parts"]) == {"races", "timings"}
    assert report.markdown({"machine": dict.fromkeys(("gpu", "driver", "torch", "triton", "commit")), "command": "x",
                            "parts": {"build": {"ok": False, "error": "no nvcc"}}}).count("**wrong**") == 1  # fmt: skip


def test_a_fault_in_one_call_leaves_the_others(monkeypatch):
    monkeypatch.setenv(place.DRY, "1")
    monkeypatch.setattr(calls, "warm", lambda *lists, **_: 0)
    right = races.forward_differences

    def sometimes(case, *more):
        if case.name == shapes.RACES[0].name:
            raise RuntimeError("illegal memory access")
        return right(case, *more)

    monkeypatch.setattr(races, "forward_differences", sometimes)
    saved = []
    found = races.run(lambda x: saved.append(json.dumps(x)), 60)
    assert found["different"]["cpu"] == {shapes.RACES[0].name: "RuntimeError: illegal memory access"}
    assert not found["ok"] and len(saved) >= 4
    assert races.run(seconds=-1)["not_run"] == len(place.few(shapes.RACES)) * 2, (
        "late calls are counted, not passed over"
    )


def test_timings_say_what_there_was_no_time_for():
    report = timings.Report(place.nothing_saved, 60)
    report.add("rows", "one", lambda: {"parity": True})
    report.add("ops", "two", lambda: [{"parity": True}] * 2)
    report.add("rows", "bad", lambda: 1 / 0)
    report.end = 0
    report.add("rows", "late", lambda: {"parity": True})
    assert report.found["rows"] == [{"parity": True}] and len(report.found["ops"]) == 2
    assert report.found["not_run"] == ["late"] and report.problems == ["bad: ZeroDivisionError: division by zero"]


def test_graphs_and_calls_run_dry(monkeypatch):
    monkeypatch.setenv(place.DRY, "1")
    if cpu._load()[0] is None:
        pytest.skip(cpu._load()[1])
    with torch.no_grad():
        row = timings.row(SMALL, 100.0, None)
    assert row["parity"] and set(row["cold"]) == {"cpu", "text_only_flash", "eager"} and row["launches"]["cpu"] is None
    assert calls.main(["races_trained", "cpu", "0/1", "bwd"]) == 0
