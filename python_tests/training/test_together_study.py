"""The study of all systems together, whole, with few steps: resumable, and it tells what it made."""

import json

import numpy as np
from PIL import Image

from idcore.training.together import study
from idcore.training.together.pieces import Settings, photos, style_pictures


def test_the_study_makes_judges_and_tells(tmp_path):
    few = ("loop.steps=2", "loop.batch=1", "loop.validate_every=0", "loop.save_every=2")
    settings = Settings(
        people=2, seeds=(0,), style_changes=(*few, "tune.rank=2", "pictures.mix=false"), person_changes=few
    )
    said = []
    rows, exam = study.pictures(settings, tmp_path, said.append)
    carriers = ["nobody", "own word", "SeFi-IDE", "own word + own word", "SeFi-IDE + own word"]
    assert sorted({r["carrier"] for r in rows}) == sorted(carriers) and len(rows) == 3 * (3 * 2 * 2 + 2 * 2)
    sizes = {r["carrier"]: Image.open(tmp_path / r["file"]).size for r in rows}
    assert sizes == dict.fromkeys(carriers[:3], (64, 64)) | dict.fromkeys(carriers[3:], (128, 64))
    by = {(r["carrier"], r["look"]): tmp_path / r["file"] for r in rows if r["person"] == 0}
    read = {k: np.asarray(Image.open(f)) for k, f in by.items()}
    for name in ("own word", "SeFi-IDE"):
        assert not np.array_equal(read[name, study.PLAIN], read["nobody", study.PLAIN])
    assert not np.array_equal(read["own word", study.LORA], read["own word", study.PLAIN])
    before = len(said)
    study.pictures(settings, tmp_path, said.append)
    assert len(said) == before, "nothing is made twice"
    seeds = photos(settings, tmp_path)[0]
    told = study.report(settings, rows, exam, seeds, tmp_path)
    assert len(told["lines"]) == 15 and all(0 <= x["found"] <= 1 for x in told["lines"])
    json.dumps(told)
    text = study.table(told["lines"])
    assert text.count("\n") == 16 and "| SeFi-IDE + own word | StyleForge |" in text
    assert study.montage(rows, tmp_path, 0).size == (8 * 96, 5 * 96)


def test_pictures_of_a_style():
    *people, wall = (np.asarray(p, np.float32) for p in style_pictures("pencil", 4))
    assert wall.shape == (64, 64, 3) and np.ptp(wall, -1).max() < 2, "pencil is grey"
    assert all(np.ptp(p[28:36, 28:36], -1).max() < 20 for p in people)
    assert np.ptp(np.asarray(style_pictures("oil", 1)[0], np.float32)[28:36, 28:36], -1).max() > 30
