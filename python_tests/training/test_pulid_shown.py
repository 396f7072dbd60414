"""What is shown of PuLID's training: the demo and the ablation, in small."""

import json

import pytest

from idcore.errors import InputError
from idcore.training.pulid import ablation, demo

SMALL = (
    "stage1.steps=1", "stage2.steps=1", "stage3.steps=1", "loop.batch=2", "stage2.batch=2", "stage3.batch=2",
    "loop.warmup=0", "loop.trackers=", "encoder.width=16", "encoder.output_dim=24", "loop.validate_every=1",
)  # fmt: skip


def test_train_demo_in_small(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "UNSEEN", 1)
    result = demo.run_demo(tmp_path, SMALL, pictures=4, say=lambda text: None)
    assert set(result["stages"]) == {"stage 1", "stage 2", "stage 3"}
    assert json.loads((tmp_path / "demo.json").read_text())["stages"] == result["stages"]
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("curves.png", "stages.png"))
    assert "stage 3: identity distance" in demo.words(result) and "no independent" in demo.words(result)
    again = demo.run_demo(tmp_path, SMALL, pictures=4, say=lambda text: None)  # nothing is trained twice
    assert again["stages"] == result["stages"] and again["cpu_seconds"] < result["cpu_seconds"]


def test_train_demo_needs_measures(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "UNSEEN", 1)
    monkeypatch.setattr(demo, "run_command", lambda **k: None)
    with pytest.raises(InputError, match="validate_every must not be 0"):
        demo.run_demo(tmp_path, SMALL, pictures=1, say=lambda text: None)


def test_ablation_in_small(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "PEOPLE", 1)
    monkeypatch.setattr(ablation, "PROMPTS", (0,))
    monkeypatch.setattr(ablation, "PICTURES", 4)
    small = [*SMALL, "loop.validate_every=0"]
    rows = ablation.run(tmp_path / "run", [0], small, say=lambda text: None)
    assert [r["run"] for r in rows] == ["stage 1", "naive one-step ID loss", "stage 2", "stage 3"]
    assert all({"distance", "found", "semantic", "layout", "background"} <= set(r) for r in rows)
    monkeypatch.setattr(ablation, "train_pulid", lambda *a, **k: pytest.fail("trained again"))
    assert ablation.run(tmp_path / "run", [0], small, say=lambda text: None) == rows
    written = ablation.report(tmp_path / "run", rows, tmp_path / "docs")
    assert [p.name for p in written] == ["pulid-ablation.json", "pulid-ablation.md", "pulid-ablation.png"]
    text = written[1].read_text()
    assert "| stage 3 |" in text and "| no identity |" in text
