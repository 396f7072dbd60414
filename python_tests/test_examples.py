"""The examples run, without arguments and without weights."""

import json
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run an example as a script in an empty folder; returns what it prints."""

    def go(name, *more):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *more])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return go


def test_every_example_is_run_here():
    text = Path(__file__).read_text()
    elsewhere = {"server.py"}  # test_server_example.py
    assert all(f'"{path.name}"' in text for path in EXAMPLES.glob("*.py") if path.name not in elsewhere)


@pytest.mark.parametrize(
    "name, says, writes",
    [
        ("my_system.py", "changed while attached: True  as before afterwards: True", None),
        ("diffusers_two_lines.py", "changed while attached: True  as before afterwards: True", "two_lines.png"),
        ("two_people.py", "changed by the second person: True", "two_people.png"),
        ("controlnet.py", "changed while attached: True", "controlnet.png"),
    ],
)
def test_example_runs(run, tmp_path, name, says, writes):
    assert says in run(name)
    assert writes is None or (tmp_path / writes).stat().st_size > 100


@pytest.mark.parametrize("name", ["diffusers_two_lines.py", "two_people.py", "controlnet.py", "latency.py"])
def test_a_base_alone_is_not_enough(run, capsys, name):
    with pytest.raises(SystemExit, match="2"):
        run(name, "--base", "folder")
    assert "--base needs" in capsys.readouterr().err


def test_latency(run):
    report = json.loads(run("latency.py", "--repeat", "3", "--steps", "2", "--batch", "2"))
    warm, parts = report["warm_ms"], report["parts_ms"]
    assert 0 < warm["least"] <= warm["p50"] <= warm["p90"] and set(parts) == {"encode", "sample", "decode"}
    assert report["pictures_per_s"] == pytest.approx(2e3 / warm["p50"])
