"""The folder of drawn people: the same for the same seed, whole after an interruption, and faces in it."""

import os

import numpy as np
import pytest
from PIL import Image

from idcore.encoders.analyzer import default_analyzer
from idcore.errors import IdcoreError, InputError
from idcore.training.data.procedural import draw, procedural_folder


def test_folder_is_a_function_of_the_seed_and_goes_on_where_it_stopped(tmp_path):
    a = procedural_folder(tmp_path / "a", 4, seed=3, progress=False)
    assert sorted(p.name for p in a.iterdir()) == [f"{i:06d}.{e}" for i in range(4) for e in ("png", "txt")]
    first = {p.name: p.read_bytes() for p in a.iterdir()}
    (a / "000002.png").unlink()
    kept = (a / "000001.png").stat().st_mtime_ns
    procedural_folder(a, 4, seed=3, progress=False)
    assert {p.name: p.read_bytes() for p in a.iterdir()} == first and (a / "000001.png").stat().st_mtime_ns == kept
    picture, caption = draw(3_000_002)
    assert np.array_equal(picture, Image.open(a / "000002.png")) and caption == (a / "000002.txt").read_text().strip()
    assert not np.array_equal(draw(0)[0], draw(1)[0])


def test_most_faces_are_found():
    found = sum(bool(default_analyzer().detect(draw(seed)[0])) for seed in range(20, 40))
    assert found >= 16


def test_bad_input(tmp_path):
    with pytest.raises(InputError, match="at least 1 person, 96 pixels and 1 worker, got 4, 64 and 1"):
        procedural_folder(tmp_path, 4, size=64)
    (tmp_path / "file").write_text("")
    with pytest.raises(IdcoreError, match="cannot write .*file.*: .*; free some space"):
        procedural_folder(tmp_path / "file" / "sub", 1, progress=False)
    assert not os.path.isdir(tmp_path / "file")
