"""Drawn styles, their judge, and the experiment's tables."""

import json

import numpy as np
import pytest
from PIL import Image

from idcore.training.styleforge import experiment
from idcore.training.styleforge.drawn import ALL, Styles, person, place


@pytest.fixture(scope="module")
def styles():
    return Styles(people=40, unseen=8)


def test_the_judge_knows_styles_of_people_it_never_saw(styles):
    assert styles.names == list(ALL) and styles.right > 0.75
    assert styles(person(6_900_000, ["duotone", "pencil"])) == ["duotone", "pencil"]


def test_drawings_hang_on_their_seed_alone():
    one, two = person(5, ["oil", "duotone"], "blue")
    assert one.size == (64, 64) and np.asarray(one)[1, 1].tolist() == np.asarray(two)[1, 1].tolist()  # the same wall
    assert np.array_equal(np.asarray(one), np.asarray(person(5, ["oil"], "blue")[0]))
    assert np.array_equal(np.asarray(place(3, "pencil")), np.asarray(place(3, "pencil")))
    assert np.asarray(place(3, "pencil")).std() > 1


def test_sets_of_pictures_by_method(monkeypatch):
    for name, count in (("PEOPLE", 2), ("PLACES", 1), ("AUX", 2)):
        monkeypatch.setattr(experiment, name, count)
    mixed = experiment.data_of("duotone", 0, multi=False)
    apart = experiment.data_of("duotone", 0, multi=True)
    assert len(mixed.style_ref) == 3 and len(mixed.aux) == 2 and not mixed.multi
    assert (len(apart.people), len(apart.backgrounds)) == (2, 1)
    assert np.array_equal(np.asarray(mixed.style_ref[0]), np.asarray(apart.people[0]))
    other = experiment.data_of("duotone", 1, multi=False)
    assert not np.array_equal(np.asarray(mixed.style_ref[0]), np.asarray(other.style_ref[0]))


def test_the_report_shows_means_over_seeds_and_their_spread(tmp_path):
    rows = []
    for seed in (0, 1):
        for method in (*experiment.METHODS, *(["no training"] if seed == 0 else [])):
            folder = tmp_path / f"seed{seed}" / "duotone" / method.replace(" ", "-")
            folder.mkdir(parents=True)
            Image.new("RGB", (128, 64), (seed * 90, 0, 0)).save(folder / "pictures.png")
            figures = {"style": seed / 2, "background": 1.0, "face": 1.0, "nobody": 1.0, "plain": 0.25}
            rows.append({"seed": seed, "target": "duotone", "method": method, **figures})
    found = {"judge": {"right": 0.951}, "rows": rows}
    written = experiment.report(tmp_path, found, ["loop.lr=1"], tmp_path / "docs")
    page = written[1].read_text()
    assert "| StyleForge | 0.25 ± 0.25 | 1.00 ± 0.00 |" in page and "| no training | 0.00 | 1.00 |" in page
    assert "right for 95.1%" in page and "loop.lr=1" in page
    assert json.loads(written[0].read_text())["rows"] == rows
    assert Image.open(written[2]).size == (128, 14 + 4 * 64)
