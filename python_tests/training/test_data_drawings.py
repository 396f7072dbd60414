"""Folders of drawn pictures: `idcore draw`."""

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from idcore.cli import app
from idcore.errors import InputError
from idcore.metrics.gate import Judge
from idcore.training.data.drawings import draw_folder
from idcore.training.tiny.prompts import BACKGROUNDS


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"), np.float32)


def test_the_same_seed_draws_the_same_and_captions_tell_the_wall(tmp_path):
    first = draw_folder(tmp_path / "a", "people", 6, seed=3)
    again = draw_folder(tmp_path / "b", "people", 6, seed=3)
    other = draw_folder(tmp_path / "c", "people", 6, seed=4)
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in again] != [p.read_bytes() for p in other]
    for path in first:
        caption = path.with_suffix(".txt").read_text()
        colour = next(c for c in BACKGROUNDS if c in caption.replace("grey", "gray"))
        assert np.abs(pixels(path)[:4, :4].mean((0, 1)) - BACKGROUNDS[colour]).max() < 40
        assert Image.open(path).size == (128, 128)


def test_one_person_is_one_person_to_the_recogniser(tmp_path):
    judge = Judge()
    views = [judge.embed(Image.open(p)) for p in draw_folder(tmp_path / "one", "person", 4, seed=1)]
    others = [judge.embed(Image.open(p)) for p in draw_folder(tmp_path / "more", "people", 4, seed=2)]
    views, others = ([e for e in some if e is not None] for some in (views, others))
    same = [np.linalg.norm(views[0] - v) for v in views[1:]]
    apart = [np.linalg.norm(views[0] - v) for v in others]
    assert len(same) >= 2 and len(apart) >= 2 and np.median(same) < np.median(apart)


def test_styles_and_backgrounds(tmp_path):
    photo = pixels(draw_folder(tmp_path / "p", "people", 1)[0])
    pencil = pixels(draw_folder(tmp_path / "d", "people", 1, style="pencil")[0])
    assert np.ptp(photo, -1).mean() > 20 and np.ptp(pencil, -1).max() < 4  # grey, up to rounding
    assert len(draw_folder(tmp_path / "walls", "backgrounds", 3, size=64)) == 3


def test_what_cannot_be_drawn_is_said(tmp_path):
    with pytest.raises(InputError, match="wanted person, people, backgrounds in photo, .*got 'cats' in 'photo'"):
        draw_folder(tmp_path, "cats")
    with pytest.raises(InputError, match="wanted 1..10000 pictures of 64..1024 pixels, got 0 of 128"):
        draw_folder(tmp_path, "people", 0)


def test_the_command_line(tmp_path):
    run = CliRunner().invoke(app, ["draw", str(tmp_path / "x"), "--kind", "people", "--count", "2", "--style", "oil"])
    assert run.exit_code == 0 and "2 pictures in" in run.stdout
    assert len(list((tmp_path / "x").glob("*.png"))) == len(list((tmp_path / "x").glob("*.txt"))) == 2


def test_a_folder_holds_one_seed_of_a_kind(tmp_path):
    """Two people in a folder would be learned as one."""
    first = draw_folder(tmp_path, "person", 2, seed=1)
    assert draw_folder(tmp_path, "person", 3, seed=1)[:2] == first, "more of the same"
    draw_folder(tmp_path, "backgrounds", 1, seed=9)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    for changed in ({"seed": 2}, {"style": "pencil"}, {"size": 96}):
        with pytest.raises(InputError, match="holds drawings of another seed, style or size already .person-0000.png"):
            draw_folder(tmp_path, "person", 1, **{"seed": 1} | changed)
    assert before == {p: p.read_bytes() for p in tmp_path.iterdir()}
