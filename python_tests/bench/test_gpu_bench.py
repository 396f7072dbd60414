"""The GPU command on a machine without a GPU: it says so, and its parts' bookkeeping is right."""

import json
import subprocess
import sys

import pytest
import torch

from idcore.backends import cpu, sdpa
from idcore.bench.gpu import build, calls, main, place, races, report, sanitize, shapes, tests, timings
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


def test_counts_of_the_test_processes():
    xml = (
        '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1">'
        '<testcase name="a"/><testcase name="b"><failure message="no">line 3: assert</failure></testcase>'
        '<testcase name="c"><skipped/></testcase></testsuite></testsuites>'
    )
    found = tests.counted(xml)
    assert (found["tests"], found["failures"], found["skipped"], found["failed"]) == (
        3,
        1,
        1,
        ["b: no\nline 3: assert"],
    )


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


@pytest.mark.parametrize("script, error", [("raise SystemExit(3)", "ended with status 3"),
                                           ("import time; time.sleep(60)", "stopped after 1 s")])  # fmt: skip
def test_a_part_that_dies_or_hangs_becomes_a_result(tmp_path, monkeypatch, script, error):
    monkeypatch.setattr(main, "_command", lambda name, out, seconds: [sys.executable, "-c", script])
    monkeypatch.setattr(main, "TICK", 0.2)
    result = main.part("races", tmp_path, 1)
    assert not result["ok"] and error in result["error"]


def test_what_a_part_found_before_it_was_stopped_is_kept(tmp_path, monkeypatch):
    script = (
        "import sys, time; from pathlib import Path; print('began', flush=True);"
        'Path(sys.argv[1], \'timings.json\').write_text(\'{"rows": [], "problems": ["one"]}\'); time.sleep(60)'
    )
    monkeypatch.setattr(main, "_command", lambda name, out, seconds: [sys.executable, "-c", script, str(out)])
    monkeypatch.setattr(main, "TICK", 0.2)
    seen = []
    right = main.gather
    monkeypatch.setattr(main, "gather", lambda out, found, *more: seen.append(right(out, found, *more)))
    result = main.part("timings", tmp_path, 3)
    assert result["problems"] == ["one"] and not result["ok"] and "stopped after 3 s\nbegan" in result["error"]
    under_way = seen[-1]["parts"]["timings"]
    assert under_way["problems"] == ["one"] and under_way["error"] == "under way", "also while it runs"


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
