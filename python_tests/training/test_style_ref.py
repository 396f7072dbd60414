"""The mix of StyleRef images: sorted by faces that the shipped detector finds in drawn people and in walls."""

import numpy as np
import pytest
from PIL import Image

from idcore.encoders.analyzer import EmbeddedAnalyzer
from idcore.errors import InputError
from idcore.metrics.gate import Judge, gate_people
from idcore.training.data.style_ref import check_style_ref


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("style")
    person = gate_people(Judge(), 1)[0][0]
    rng = np.random.default_rng(0)
    for i in range(8):
        person.save(path / f"person{i}.png")
        Image.fromarray(rng.integers(90, 130, (64, 64, 3), dtype=np.uint8)).resize((256, 256)).save(
            path / f"wall{i}.jpg"
        )
    return path


@pytest.fixture(scope="module")
def analyzer():
    return EmbeddedAnalyzer(min_score=0.8)


def test_people_and_backgrounds_are_told_apart(folder, analyzer):
    mix = check_style_ref(folder, analyzer)
    assert [p.name for p in mix.people] == [f"person{i}.png" for i in range(8)]
    assert [p.name for p in mix.backgrounds] == [f"wall{i}.jpg" for i in range(8)]
    assert mix.warnings == () and str(mix) == "StyleRef: 8 with people, 8 without"


def test_mixes_that_are_doubtful(folder, analyzer, tmp_path):
    people, walls = sorted(folder.glob("person*")), sorted(folder.glob("wall*"))
    assert "15 to 20" in check_style_ref(people[:2] + walls[:2], analyzer).warnings[0]
    assert "with people alone" in check_style_ref(people * 2, analyzer).warnings[0]
    assert "with backgrounds alone" in check_style_ref(walls * 2, analyzer).warnings[0]
    assert (
        "2 of 15 show people; mix more evenly" in check_style_ref(people[:2] + (walls * 2)[:13], analyzer).warnings[0]
    )
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no")
    mix = check_style_ref([*people, *walls, broken], analyzer)
    assert list(mix.unreadable) == [broken] and "cannot be read" in str(mix)


def test_folders_that_are_refused(tmp_path):
    with pytest.raises(InputError, match="is no folder; wanted one with 15 to 20 pictures"):
        check_style_ref(tmp_path / "none")
    with pytest.raises(InputError, match="no pictures"):
        check_style_ref(tmp_path)
