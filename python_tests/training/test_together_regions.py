"""The measurement of regions, whole, with few steps: resumable, and its page says what was found."""

import json

import numpy as np
import pytest
from PIL import Image

from idcore.metrics.gate import Judge
from idcore.training.styleforge.drawn import Styles, place
from idcore.training.together import regions
from idcore.training.together.walls import WallStyles, wall_colour


@pytest.fixture(scope="module")
def walls():
    return WallStyles(40, 10)


def test_it_trains_draws_judges_and_tells(tmp_path, monkeypatch, walls):
    monkeypatch.setattr(regions, "_judges", lambda: [Judge(), Styles(20, 5), walls])
    monkeypatch.setattr(regions, "STYLES", {"pencil, duotone": ("pencil", "duotone")})
    few = [f"--set={s}" for s in ("loop.steps=2", "loop.batch=3", "loop.save_every=2", "tune.rank=2")]
    monkeypatch.setattr(regions, "NOISES", range(1))
    monkeypatch.setattr(regions, "REDRAWN", 2)
    args = ["--out", str(tmp_path / "out"), "--docs", str(tmp_path / "docs"), "--seeds", "0", *few]
    assert regions.main(args) == 0
    told = json.loads((tmp_path / "docs/results/together-regions.json").read_text())
    rows = {r["run"]: r for r in told["runs"]}
    assert len(rows) == len(regions.WAYS) + len(regions.PAIRS) + 4 and told["seeds"] == [0]
    assert "loop.steps=2" in told["settings"]
    alone, passes = (rows[f"pencil, duotone: {way}"] for way in (regions.ALONE, "a pass each, margin 0"))
    assert alone["reached"] == pytest.approx(0, abs=0.02) and passes["reached"] > 0.05
    assert 0 < passes["found"] <= 1
    two = [rows[way] for way in regions.PAIRS]
    assert all(0 <= r[side] <= 1 for r in two for side in ("left", "right")) and max(r["right"] for r in two) > 0
    weak, strong = rows["strength 0.25"], rows["strength 1.0"]
    assert weak["layout"] > 0.9 > strong["layout"] and strong["style"] > weak["style"]
    page = (tmp_path / "docs/together-regions.md").read_text()
    assert f"| a pass for each person | {two[-1]['left']:.2f} |" in page and "1 seed(s)" in page
    assert Image.open(tmp_path / "docs/together-regions.jpg").size == (4 * 64, 5 * 64)
    assert Image.open(tmp_path / "docs/together-regions-two.jpg").size == (3 * 128, 5 * 64)
    monkeypatch.setattr(regions, "_draw", None)
    monkeypatch.setattr(regions, "_judges", None)
    assert regions.main(args) == 0, "nothing is made twice"


def test_walls(walls):
    assert walls.right > 0.6
    picture = Image.new("RGB", (64, 64), (200, 30, 10))
    picture.paste((0, 0, 0), (12, 0, 52, 64))
    picture.paste((0, 0, 0), (0, 40, 64, 64))
    assert np.allclose(wall_colour(picture), (200, 30, 10))
    assert walls([place(1, "duotone")]) == ["duotone"]
