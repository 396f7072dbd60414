"""The folder of drawn people: the same for the same seed, whole after an interruption, and faces in it."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from idcore.encoders.analyzer import default_analyzer
from idcore.errors import IdcoreError, InputError
from idcore.training.bases.opening import face_points
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


def test_without_zoom_faces_stand_where_the_shipped_models_draw_them():
    found = [default_analyzer().detect(draw(seed, zoom=0)[0]) for seed in range(20, 32)]
    points = np.median([f[0].points for f in found if f], 0)
    assert np.abs(points - face_points(SimpleNamespace(faces_in_one_place=True), 128)).max() < 4


def test_bad_input(tmp_path):
    with pytest.raises(InputError, match="at least 1 person, 96 pixels and 1 worker, got 4, 64 and 1"):
        procedural_folder(tmp_path, 4, size=64)
    with pytest.raises(InputError, match=r"zoom must be 0 to 1 .*, got 1.5"):
        procedural_folder(tmp_path, 4, zoom=1.5)
    (tmp_path / "file").write_text("")
    with pytest.raises(IdcoreError, match="cannot write .*file.*: .*; free some space"):
        procedural_folder(tmp_path / "file" / "sub", 1, progress=False)
    assert not os.path.isdir(tmp_path / "file")
