"""What is shown of PuLID's training: the demo and the ablation, in small."""

import json

import pytest

from idcore.training.pulid import ablation, demo, exam

SMALL = (
    "stage1.steps=1", "stage2.steps=1", "stage3.steps=1", "loop.batch=2", "stage2.batch=2", "stage3.batch=2",
    "loop.warmup=0", "loop.trackers=", "encoder.width=16", "encoder.output_dim=24", "loop.validate_every=0",
)  # fmt: skip


@pytest.fixture(autouse=True)
def small_exam(monkeypatch):
    monkeypatch.setattr(exam, "GALLERY", 2)
    monkeypatch.setattr(exam, "PEOPLE", 2)
    monkeypatch.setattr(exam, "PROMPTS", (0,))


def test_train_demo_in_small(tmp_path):
    result = demo.run_demo(tmp_path, SMALL, pictures=4, base="tiny-sd", say=lambda text: None)
    assert set(result["stages"]) == {"no identity", "stage 1", "stage 2", "stage 3"}
    assert json.loads((tmp_path / "demo.json").read_text())["stages"] == result["stages"]
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("curves.png", "stages.png"))
    assert "stage 3: identity distance" in demo.words(result) and "no independent" in demo.words(result)
    assert "semantic" in result["stages"]["stage 3"] and "semantic" not in result["stages"]["no identity"]


def test_ablation_in_small(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "PICTURES", 4)
    branches = ["naive one-step ID loss", "stage 2", "stage 3"]
    monkeypatch.setattr(ablation, "BRANCHES", {k: ablation.BRANCHES[k] for k in branches})
    more = {"base": "tiny-sd", "one_start": True, "say": lambda text: None}
    rows = ablation.run(tmp_path / "run", [0, 1], SMALL, **more)
    assert [r["run"] for r in rows] == ["stage 1", *branches, *branches]
    assert all({"distance", "rank1", "found", "adherence", "semantic", "layout"} <= set(r) for r in rows)
    monkeypatch.setattr(ablation, "train_pulid", lambda *a, **k: pytest.fail("trained again"))
    assert ablation.run(tmp_path / "run", [0, 1], SMALL, **more) == rows
    starts = {
        "naive-one-step-ID-loss/stage2": "seed0/first",
        "stage-2/stage2": "seed0/first",
        "stage-3/stage3": "seed1/stage-2",
    }
    for at, start in starts.items():
        assert f"run/{start}/model/" in (tmp_path / "run/seed1" / at / "model/README.md").read_text()
    written = ablation.report(tmp_path / "run", rows, tmp_path / "docs")
    assert [p.name for p in written] == [
        "pulid-ablation.json", "pulid-ablation.md", "pulid-ablation-people.png", "pulid-ablation.png",
    ]  # fmt: skip
    text = written[1].read_text()
    assert "| stage 3 |" in text and "| no identity |" in text and "stage 1 1, naive one-step ID loss 2" in text


def test_report_says_what_stage_3_keeps_of_each_seed():
    far = {("stage 2", 0): 0.4, ("stage 3", 0): 0.42, ("stage 2", 1): 0.44, ("stage 3", 1): 0.46, ("stage 2", 2): 0.6}
    rows = [{"seed": seed, "run": name, "distance": d} for (name, seed), d in far.items()]
    assert ablation._kept(rows, {"distance": 0.5})[-1].endswith("over no identity: stage 3 0.733 ± 0.067.")
    assert ablation._kept(rows[4:], {"distance": 0.5}) == []  # nothing was gained
