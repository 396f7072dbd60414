"""The table of systems that learn a person from one photo: every row is made, kept, and told."""

import json

import pytest
from PIL import Image

from idcore.errors import InputError
from idcore.training.experiments import cell, deviation
from idcore.training.personal.table import CHANGES, COMMON, run
from idcore.training.personal.table_page import report

SHORT = {name: (*COMMON, "loop.steps=1", "loop.batch=2") for name in CHANGES}
SHORT["DreamBooth-LoRA"] += ("prior.count=2", "tune.rank=1")


def test_a_table_of_one_step(tmp_path):
    said = []
    rows = run(tmp_path / "run", [3], people=1, changes=SHORT, say=said.append)
    assert [r["run"] for r in rows] == ["a person", "word made from the drawing", *CHANGES] and len(said) == 5
    assert all(0 <= r["adherence"] <= 1 and r["distance"] > 0 for r in rows)
    assert [r["seconds"] is None for r in rows] == [True, True, False, False, False]
    assert rows[2]["kilobytes"] < rows[4]["kilobytes"] < rows[3]["kilobytes"]
    nobody, oracle = rows[:2]
    assert oracle["distance"] < nobody["distance"]
    kept = run(tmp_path / "run", [3], people=1, changes=SHORT, say=said.append)
    assert kept == rows
    report(tmp_path / "run", rows, tmp_path / "docs")
    page = (tmp_path / "docs" / "personal.md").read_text()
    assert all(f"| {r['run']} |" in page for r in rows) and "three systems" in page
    assert len(json.loads((tmp_path / "docs" / "results" / "personal.json").read_text())["runs"]) == 5
    assert Image.open(tmp_path / "docs" / "personal.png").size == (130 + 9 * 96, 6 * 96)
    with pytest.raises(InputError, match="9 people for each of 2 seeds are more than the 16 there are"):
        run(tmp_path / "x", [0, 1], people=9)


def test_cells_say_the_spread():
    assert cell([0.5, 0.7, 0.6]) == "0.60 ± 0.10" and cell([None]) == "–" and cell([12.4]) == "12"
    assert cell([0.5, 0.5]) == "0.50 ± 0.00"
    assert cell([0.5, None, 0.7], 3, deviation) == "0.600 ± 0.100" and cell([0.2], 3, deviation) == "0.200"
