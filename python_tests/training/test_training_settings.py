"""Typed settings: files, `a.b=value`, refusals with the place, printing."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from idcore.errors import InputError
from idcore.training.config import LoopConfig
from idcore.training.settings import load, setting
from idcore.training.settings_out import as_dict, as_text, differences


@dataclass(frozen=True)
class Inner:
    lr: float = setting(1e-3, "Rate", above=0, source="somebody, section 1")
    names: tuple[str, ...] = setting(("a", "b"), "Names", free=True)
    pair: tuple[float, float] = setting((0.5, 0.9), "Two", low=0, below=1)


@dataclass(frozen=True)
class Outer:
    data: Path = setting(doc="Folder")
    mode: Literal["x", "y"] = setting("x", "Mode")
    count: int | None = setting(None, "Count", low=1)
    flag: bool = setting(False, "Flag")
    scales: dict[str, float] = setting(factory=dict, doc="Scales")
    inner: Inner = setting(factory=Inner, doc="Inside")


def test_a_file_is_read_and_texts_win(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("data: some/where\nmode: y\ninner: {lr: 1e-5, names: [q]}\nscales: {a: 1, b: 2.5}\n")
    got = load(Outer, path, ["inner.lr=3e-4", "inner.pair=[0, 0.25]", "flag=true", "count=7", "inner.names=u, v"])
    inner = Inner(3e-4, ("u", "v"), (0.0, 0.25))
    assert got == Outer(Path("some/where"), "y", 7, True, {"a": 1.0, "b": 2.5}, inner)
    assert load(Outer, path).inner.lr == 1e-5  # YAML itself reads 1e-5 as a text
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"data": "d", "inner": {"lr": 2}}))
    assert load(Outer, path).inner.lr == 2.0


@pytest.mark.parametrize(
    "text, words",
    [
        ("inner.lrr=1", r"unknown key 'inner\.lrr'; did you mean 'inner\.lr'\?"),
        ("lr=1", r"unknown key 'lr'; did you mean 'inner\.lr'\?"),
        ("zzz=1", "unknown key 'zzz'; known here: data, mode, count"),
        ("inner.lr=0", r"inner\.lr must be > 0, got 0"),
        ("inner.lr=fast", r"inner\.lr must be a number, got 'fast' \(str\)"),
        ("inner.lr=.nan", r"inner\.lr must be > 0, got nan"),
        ("inner.pair=[0.1]", r"inner\.pair must be 2 values, got \[0.1\]"),
        ("inner.pair=[0.1, 1]", r"inner\.pair must be >= 0 and < 1, got 1"),
        ("inner=3", "inner must be settings below inner, got 3"),
        ("mode=z", "mode must be one of x, y, got 'z'"),
        ("count=1.5", r"count must be a whole number, got 1\.5"),
        ("count=.inf", "count must be a whole number, got inf"),
        ("count=0", "count must be >= 1, got 0"),
        ("flag=1", "flag must be true or false, got 1"),
        ("scales=[1]", "scales must be a mapping"),
        ("nothing", "--set wants KEY=VALUE"),
        ("data.x=1", "unknown key|data must|'data' holds"),
        ("flag=[", "--set flag is not YAML"),
    ],
)
def test_wrong_values_are_refused_with_the_place(text, words):
    with pytest.raises(InputError, match=words):
        load(Outer, None, ["data=d", text])


def test_what_a_file_may_not_be(tmp_path):
    with pytest.raises(InputError, match="no value for data; add it"):
        load(Outer)
    with pytest.raises(InputError, match="cannot be read"):
        load(Outer, tmp_path / "none.yaml")
    for text, words in (("a: [", "is not YAML"), ("- 1", "wanted `key: value` lines, got \\[1\\]")):
        (tmp_path / "b.yaml").write_text(text)
        with pytest.raises(InputError, match=words):
            load(Outer, tmp_path / "b.yaml")


def test_what_is_printed_has_comments_and_reads_back(tmp_path):
    made = Outer(Path("d"), "y", 3, True, {"a": 0.5}, Inner(1e-9))
    (tmp_path / "c.yaml").write_text(as_text(made))
    assert load(Outer, tmp_path / "c.yaml") == made
    text = as_text(made)
    assert "  # Rate (> 0; somebody, section 1)\n  lr: 1e-09\n" in text and "# Mode (x | y; our choice)" in text


def test_every_setting_of_the_loop_says_what_it_is(tmp_path):
    (tmp_path / "d.yaml").write_text(as_text(LoopConfig()))
    assert load(LoopConfig, tmp_path / "d.yaml") == LoopConfig()
    assert all(f.metadata["about"].doc for f in LoopConfig.__dataclass_fields__.values())
    with pytest.raises(InputError, match="warmup must be at most steps, got warmup 20 and steps 10"):
        load(LoopConfig, None, ["steps=10", "warmup=20"])


def test_differences_leave_out_what_does_not_change_a_result():
    old = as_dict(Outer(Path("d"), inner=Inner(names=("z",))))
    assert differences(old, Outer(Path("d"))) == []
    assert differences(old, Outer(Path("e"), inner=Inner(2.0))) == [("data", "d", "e"), ("inner.lr", 1e-3, 2.0)]
    del old["mode"]
    assert differences(old, Outer(Path("d"))) == [("mode", None, "x")]


@dataclass(frozen=True)
class Part:
    a: int = setting(1, "A")
    b: int = setting(2, "B")


@dataclass(frozen=True)
class Whole:
    part: Part = setting(factory=lambda: Part(b=7), doc="A part with defaults of its own")


@dataclass(frozen=True)
class Wider:
    whole: Whole = setting(factory=lambda: Whole(Part(a=5, b=8)), doc="Whose defaults differ again")


def test_what_a_part_is_not_told_stays_as_the_whole_has_it():
    assert load(Whole, None, ["part.a=3"]).part == Part(a=3, b=7)
    assert load(Wider, None, ["whole.part.a=3"]).whole.part == Part(a=3, b=8)
    assert load(Wider).whole.part == Part(a=5, b=8)
