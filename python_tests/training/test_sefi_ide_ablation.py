"""SeFi-IDE's ablation in small: resumable, and its report."""

import json

import pytest

from idcore.errors import InputError
from idcore.training.sefi_ide import ablation

SMALL = ("loop.steps=1", "loop.batch=1", "words.heads=2", "words.head_dim=8")


def test_ablation_in_small(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "TIMES", (300, 700))
    monkeypatch.setattr(ablation, "GALLERY", 2)
    monkeypatch.setattr(ablation, "VARIANTS", {k: ablation.VARIANTS[k] for k in list(ablation.VARIANTS)[-1:]})
    rows = ablation.run(tmp_path, [0], people=1, changes=SMALL, say=lambda text: None)
    assert [r["run"] for r in rows] == ["one stage"]
    assert all({"distance", "rank1", "adherence", "attention", "seconds"} <= set(r) for r in rows)
    assert all(0 < r["attention"] < 100 and r["found"] in [i / 8 for i in range(9)] for r in rows)
    monkeypatch.setattr(ablation, "train_sefi_ide", lambda *a, **k: pytest.fail("trained again"))
    assert ablation.run(tmp_path, [0], people=1, changes=SMALL, say=lambda text: None) == rows
    written = ablation.report(tmp_path, rows, tmp_path / "docs")
    assert [p.name for p in written] == ["sefi-ablation.json", "sefi-ablation.md", "sefi-ablation.png"]
    assert "| one stage |" in written[1].read_text() and json.loads(written[0].read_text())["runs"] == rows
    with pytest.raises(InputError, match="20 people for each of 1 seeds, there are 2"):
        ablation.run(tmp_path, [0], people=20)
