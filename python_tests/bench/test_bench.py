"""The benchmark's JSON, its gate, and the parity rule that it stands on."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import idcore
from idcore.backends import cpu, cpu_tokens, sdpa
from idcore.bench import align_face, kv_bank
from idcore.bench.main import COMMANDS, main
from idcore.bench.main import OPS as NAMED_OPS
from idcore.bench.ops import OPS, OWN_ROWS
from idcore.ops import id_attention
from idcore.testing import Case, assert_parity, check_parity, fuzz, make_inputs, random_case
from idcore.testing.cases import LAYOUTS
from idcore.testing.eager import eager_id_attention
from idcore.testing.timing import interleaved, percentile

SMALL = Case("small", "test", heads=2, lq=20, lt=7, li=(3,), num_zero=2)


@pytest.mark.parametrize("merge", ("none", "add", "ortho", "ortho_v2"))
def test_eager_yardstick_is_the_same_operator(merge):
    case = SMALL.with_(merge=merge, mask=True, li=(3, 6), batch=2, tensor_scale=True)
    given = make_inputs(case)
    want = id_attention(**given, backend="reference")
    assert (eager_id_attention(**given) - want).abs().max() < 2e-5


@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x != "expanded"])
def test_layouts_hold_the_same_values(layout):
    want = make_inputs(SMALL)["q"]
    assert torch.equal(make_inputs(SMALL.with_(layout=layout))["q"], want)


def test_random_cases_repeat():
    assert random_case(7) == random_case(7) != random_case(8)


@pytest.mark.parametrize("flaw", ("shifted", "untouched", "one_row"))
def test_parity_catches_a_wrong_backend(monkeypatch, flaw):
    right = sdpa.forward

    def wrong(a, out):
        if flaw == "untouched":
            return out
        result = right(a, out)
        (result if flaw == "shifted" else result[:, :, -1:])[:] += 1e-3
        return result

    monkeypatch.setattr(sdpa, "forward", wrong)
    assert not check_parity(SMALL, "sdpa").ok
    with pytest.raises(AssertionError, match="reproduce: .*assert_parity\\(Case\\(name='small'"):
        assert_parity(SMALL, "sdpa")


def test_interleaving_takes_turns():
    order = []
    times = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, warmup=1)
    assert order == ["a", "b"] * 4
    assert times["a"].p10 <= times["a"].ms <= times["a"].p90


def test_percentiles_are_samples():
    samples = [5.0, 1.0, 3.0, 2.0, 4.0]
    assert [percentile(samples, share) for share in (0.0, 0.5, 0.9, 1.0)] == [1.0, 3.0, 5.0, 5.0]
    assert percentile([7.0], 0.9) == 7.0


def run(capsys, *arguments):
    code = main([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


SHORT = ("--cases", "sd15-64x1280", "--against", "eager", "--rounds", "2", "--batch", "1")


def test_rows_have_the_documented_form(capsys):
    pytest.importorskip("idcore._C", reason="the compiled module is not built")
    code, report = run(capsys, "id_attention", *SHORT, "--dtype", "fp32,bf16", "--merge", "add,ortho_v2")
    assert code == 0 and len(report["rows"]) == 4
    assert {"cpu", "cores", "isa", "gpu", "driver", "torch", "triton", "commit"} <= set(report["machine"])
    for row in report["rows"]:
        assert row["parity"] is True and row["pass"] == "fwd" and row["op"] == "id_attention"
        assert row["spread"][0] <= row["ms"] <= row["spread"][1]
        assert set(row["ratio"]) == {"eager", "own_text_only"} and min(row["ratio"].values()) > 0
        assert row["share_of_peak"] > 0 and row["floor_ms"] > 0


def test_every_op_is_measured_in_both_directions(capsys, monkeypatch):
    pytest.importorskip("idcore._C", reason="the compiled module is not built")
    for name in OPS:  # the real cases take a minute
        if name != "id_attention":
            monkeypatch.setitem(OPS, name, lambda options, draw=fuzz.DRAW[name]: iter([draw(1, "fp32")]))
    monkeypatch.setattr(align_face, "CASES", [replace(c, photo=(320, 240)) for c in align_face.CASES[:3:2]])
    monkeypatch.setattr(kv_bank, "LAYERS", 1)
    code, report = run(capsys, "ops", *SHORT, "--dtype", "fp32", "--merge", "ortho_v2")
    assert code == 0
    seen = {(row["op"], row["pass"]) for row in report["rows"]}
    assert seen == {(op, p) for op in OPS for p in ("fwd", "bwd")} | {(op, "fwd") for op in OWN_ROWS}
    for row in report["rows"]:
        assert row["parity"] is True and row["ms"] > 0 and row["floor_ms"] > 0 and row["ratio"]["eager"] > 0
        assert row["backend"] == "cpu" or row["op"] in OWN_ROWS or row["why_not"], (
            "another backend than asked for, without a reason"
        )


def test_red_gradients_print_no_time(capsys, monkeypatch):
    pytest.importorskip("idcore._C", reason="the compiled module is not built")
    right = cpu_tokens.backward
    monkeypatch.setattr(cpu_tokens, "backward", lambda *a, **k: [2 * t for t in right(*a, **k)])
    code, report = run(capsys, "stage_tokens", *SHORT, "--dtype", "fp32", "--passes", "bwd")
    assert code == 1
    for row in report["rows"]:
        assert row["parity"] is False and "ms" not in row and row["what"] in ("embeddings", "tokens")


def test_cpu_clock_needs_one_thread(capsys):
    with pytest.raises(SystemExit, match="use it with --threads 1"):
        main(("id_attention", *SHORT, "--clock", "cpu"))


def test_red_parity_prints_no_time(capsys, monkeypatch):
    pytest.importorskip("idcore._C", reason="the compiled module is not built")
    right = cpu.forward
    monkeypatch.setattr(cpu, "forward", lambda a, out=None: right(a, out).mul_(1.01))
    code, report = run(capsys, "id_attention", *SHORT, "--dtype", "fp32", "--merge", "add")
    (row,) = report["rows"]
    assert code == 1 and row["parity"] is False and "ms" not in row and row["error"] > row["limit"]


def test_peak_lists_every_instruction_set(capsys):
    module = pytest.importorskip("idcore._C", reason="the compiled module is not built")
    before = module.cpu_isa()
    code, report = run(capsys, "peak")
    assert code == 0 and {r["isa"] for r in report["rows"] if "isa" in r} == set(module.usable_isas())
    assert all(r.get("gflops", r.get("gb_per_s")) > 0 for r in report["rows"])
    assert module.cpu_isa() == before


@pytest.mark.parametrize("arguments, text", [
    (("id_attention", "--dtype", "int8"), "int8: choose from fp32, bf16, fp16"),
    (("id_attention", "--cases", "nope"), "nope: choose from sdxl-4096x640"),
    (("id_attention", "--against", "magic"), "magic: choose from eager, compiled"),
])  # fmt: skip
def test_wrong_arguments_name_the_choices(capsys, arguments, text):
    with pytest.raises(SystemExit):
        main(arguments)
    assert text in capsys.readouterr().err


def test_a_run_leaves_gradients_and_threads_as_they_were(capsys):
    before = torch.get_num_threads()
    main(["peak", "--threads", str(before + 1), "--json"])
    assert torch.is_grad_enabled() and torch.get_num_threads() == before
    assert json.loads(capsys.readouterr().out)["threads"] == before + 1


def test_help_knows_all_commands_and_imports_none():
    """Who looks for a command does not wait for PyTorch."""
    code = (
        "import sys\nfrom idcore.bench.main import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n"
        "    print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n") and not done.stderr
    assert all(f"    {name} " in done.stdout or f"    {name}\n" in done.stdout for name in COMMANDS)
    assert [n for n in NAMED_OPS if n != "ops"] == [*OPS, *OWN_ROWS]


def test_help_names_files_that_are_there():
    root = Path(idcore.__file__).parents[1]
    for about in NAMED_OPS.values():
        for place in re.findall(r"(?:csrc|kernels|idcore)/[\w./*]+", about):
            assert list(root.glob(place)), place


def test_help_of_a_command_says_choices_and_defaults(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["id_attention", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: sdxl-4096x640,sdxl-1024x1280)" in text and "(default: wall)" in text and "(default: 20)" in text
    for args, wanted in (
        (["id_attention", "--rounds", "0"], "wanted a whole number from 1, got '0'"),
        (["id_attention", "--batch", "1,a"], "wanted a whole number from 1, got 'a'"),
        (["id_attention", "--dtype", "fp8"], "fp8: choose from fp32, bf16, fp16"),
        (["peak", "--threads", "-2"], "--threads"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(args)
        assert wanted in capsys.readouterr().err
