"""The roofline plot: points under the roof that the report measured, and the table beside it."""

import json

import pytest
from PIL import Image

from idcore.bench import roofline
from idcore.bench.main import main

ROW = {
    "op": "id_attention", "case": "sdxl-4096x640", "backend": "cpu", "dtype": "fp32", "merge": "add", "batch": 1,
    "pass": "fwd", "parity": True, "flops": 1_000_000_000, "bytes": 20_000_000, "ms": 4.0, "floor_ms": 2.0,
    "ratio": {"eager": 3.5, "compiled": 3.1},
}  # fmt: skip
REPORT = {
    "machine": {"cpu": "some CPU", "gpu": None, "isa": "avx2", "commit": "abc"}, "threads": 2,
    "peak_gflops": {"fp32": 500.0, "bf16": 1000.0}, "copy_gb_per_s": 30.0,
}  # fmt: skip


def test_a_row_becomes_a_point():
    red = {**ROW, "parity": False}
    del red["ms"]
    copied = {**ROW, "op": "stage_tokens", "flops": 0}
    (point,) = roofline.points([ROW, red, copied])
    assert point["intensity"] == 50.0 and point["gflops"] == pytest.approx(250.0)


def test_the_command_draws_and_prints(tmp_path, capsys):
    path, out = tmp_path / "r.json", tmp_path / "r.png"
    path.write_text(json.dumps({**REPORT, "rows": [ROW, {**ROW, "pass": "bwd", "dtype": "bf16", "ms": 9.0}]}))
    assert main(["roofline", str(path), "--out", str(out)]) == 0
    image = Image.open(out).convert("RGB")
    assert image.size == roofline.SIZE
    low, high = 1000.0 / 30.0 / 10, 50.0 * 2
    axes = roofline.Axes((low, high), (1e9 / 9e-3 * 1e-9 / 3, 1600.0))
    x, y = map(round, axes.at(50.0, 250.0))
    blue = tuple(int(roofline.COLOURS["id_attention"][i : i + 2], 16) for i in (1, 3, 5))
    assert image.getpixel((x, y)) == blue, "no disc where the row stands"
    text = capsys.readouterr().out
    assert (
        "| id_attention fwd | sdxl-4096x640 | fp32 | add | cpu | 20.00 | 1.00 | 2.00 | 4.00 | 50% | 3.5 | 3.1 |" in text
    )
