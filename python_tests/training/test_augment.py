"""Self-augmented pairs: what is drawn, what is kept and why, and what a second run does."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from augment_cases import COLOURS, Painted

from idcore.encoders.images import load_image
from idcore.errors import IdcoreError, InputError
from idcore.files import file_hash
from idcore.training.augment.lists import read_names, read_prompts
from idcore.training.augment.options import AugmentConfig, Prompt
from idcore.training.augment.run import augment
from idcore.training.augment.setup import Job
from idcore.training.augment.store import Folder, key_of
from idcore.training.augment.unit import seed_of

PROMPTS = (
    Prompt("{person} on the left", {"side": "left"}),
    Prompt("{person} on the right", {"side": "right"}),
    Prompt("{person} as a painting"),
)
CONFIG = AugmentConfig(size=32, batch=4)


def job(prompts=PROMPTS, models=None, **config):
    return Job(models or Painted(), replace(CONFIG, **config), prompts)


def lines(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def everything(folder):
    """All files with their content and time of change."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock")
    return {p.relative_to(folder).as_posix(): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def contents(folder):
    return {k: v for k, (v, _) in everything(folder).items()}


def test_pairs_show_one_person_and_the_prompt(tmp_path):
    report = augment(["ada", "bea"], tmp_path, job(), progress=False)
    assert (report.used, report.reused) == (2, 0)
    assert report.drawn == 2 * (4 + 3)  # four source pictures, and each prompt at the first try
    rows = lines(tmp_path, "index.jsonl")
    assert len(rows) == 2 * 3 * 2  # names x prompts x sources
    assert len({r["id"] for r in rows}) == len(rows)
    for r in rows:
        for key in ("source", "edited"):
            assert file_hash(tmp_path / r[key]) == r[f"{key}_hash"]
            a = np.asarray(load_image(tmp_path / r[key]), np.float32)[16:, 16:].reshape(-1, 3).mean(0) / 127.5 - 1
            assert np.abs(a - COLOURS[r["name"]]).max() < 0.02  # it is the person of this name
        corner = np.asarray(load_image(tmp_path / r["edited"]))[:4, :4].mean()
        assert (corner > 200) == ("left" in r["prompt"]) and (corner < 50) == ("right" in r["prompt"])
        assert r["identity"] < 0.01 and r["text"] == (None if "painting" in r["prompt"] else 1.0)
        assert r["seeds"][1] == seed_of(0, r["name"], r["prompt"], 0) and "{person}" in r["prompt"]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["pairs"], manifest["names"], manifest["used"]) == (12, 2, 2)
    assert manifest["index"] == file_hash(tmp_path / "index.jsonl")
    assert load_image(tmp_path / "examples.png").size == (4 * 160, 2 * 200)
    assert not lines(tmp_path, "dropped.jsonl")


def test_what_is_not_kept_is_told(tmp_path):
    names = ["ada", "ghost", "blank", "fading", "stubborn"]
    report = augment(names, tmp_path, job(), progress=False)
    reasons = {(d["what"].split(":")[0], d["reason"]) for d in lines(tmp_path, "dropped.jsonl")}
    assert ("ghost", "not known") in reasons  # every picture another colour
    assert ("blank", "no source") in reasons and ("blank", "no face") in reasons
    assert ("fading", "another person") in reasons
    assert ("stubborn", "not the prompt") in reasons
    assert {p.name for p in report.pairs} == {"ada", "stubborn"}
    assert {p.prompt for p in report.pairs if p.name == "stubborn"} == {"{person} as a painting"}
    assert not any((tmp_path / "pictures" / key_of(n)).exists() for n in ("ghost", "blank", "fading"))
    stubborn = {p.name for p in (tmp_path / "pictures" / key_of("stubborn")).iterdir()}
    assert stubborn == {"source-0.png", "source-1.png", "edited-002-0.png"}
    said = report.table()
    for text in ("dropped: not known", "1 of 4 source pictures show one person", "5  2 used, 0 stood already"):
        assert text in said
    # Failed prompts are tried again with other noise, and no more often than asked for.
    assert json.loads((tmp_path / "names" / f"{key_of('stubborn')}.json").read_text())["drawn"] == 4 + 3 + 2


def test_limits_are_settings(tmp_path):
    loose = augment(["fading", "ghost"], tmp_path / "loose", job(identity=9.0, text=0.0), progress=False)
    assert {p.name for p in loose.pairs} == {"fading", "ghost"}
    strict = augment(["ada"], tmp_path / "strict", job(identity=0.0), progress=False)
    assert not strict.pairs and strict.drops[-1]["reason"] == "not known"


def test_more_edits_than_one(tmp_path):
    report = augment(["ada"], tmp_path, job(edits=2, tries=3, sources=1), progress=False)
    assert len(report.pairs) == 3 * 2 and len({p.edited_hash for p in report.pairs}) == 6


def test_the_batch_changes_nothing(tmp_path):
    augment(["ada", "bea"], tmp_path / "a", job(), progress=False)
    augment(["bea", "ada"], tmp_path / "b", job(batch=1), progress=False)
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert set(a) == set(b)
    assert {k: v for k, v in a.items() if "/" in k or k == "settings.json"} == {
        k: v for k, v in b.items() if "/" in k or k == "settings.json"
    }


def test_a_second_run_writes_nothing_twice(tmp_path):
    augment(["ada", "bea"], tmp_path, job(), progress=False)
    before = everything(tmp_path)
    report = augment(["ada", "cy", "bea"], tmp_path, job(), progress=False)
    assert (report.reused, report.used) == (2, 3)
    after = everything(tmp_path)
    kept = [k for k in before if k.startswith(("pictures/", "names/"))]
    assert kept and all(after[k] == before[k] for k in kept)
    assert [r["name"] for r in lines(tmp_path, "index.jsonl")] == ["ada"] * 6 + ["cy"] * 6 + ["bea"] * 6
    fewer = augment(["cy"], tmp_path, job(), progress=False)  # what stands is not thrown away
    assert len(fewer.pairs) == 6 and (tmp_path / "names" / f"{key_of('ada')}.json").exists()


def test_half_written_and_damaged_names_are_made_anew(tmp_path):
    augment(["ada", "bea"], tmp_path, job(), progress=False)
    whole = contents(tmp_path)
    (tmp_path / "names" / f"{key_of('ada')}.json").write_text("{")
    half = tmp_path / "pictures" / f".{key_of('cy')}.0000.part"
    half.mkdir()
    (half / "source-0.png").write_bytes(b"half")
    next((tmp_path / "pictures" / key_of("bea")).glob("edited*")).unlink()
    report = augment(["ada", "bea"], tmp_path, job(), progress=False)
    assert report.reused == 0 and not half.exists() and contents(tmp_path) == whole


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import idcore.training.augment.store as store
from test_augment import augment, job, COLOURS

calls, real = 0, getattr(store, {name!r})
def counted(*args, **kwargs):
    global calls
    calls += 1
    if calls == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
setattr(store, {name!r}, counted)
augment(list(COLOURS), {folder!r}, job(), progress=False)
"""


@pytest.mark.parametrize(
    "name, call, done",
    [
        ("_write_flushed", 8, 1),  # among the pictures of the second name
        ("replace_text", 2, 1),  # its pictures stand, its record does not
    ],
)
def test_killed_at_any_moment_it_goes_on(tmp_path, name, call, done):
    folder = tmp_path / "killed"
    script = KILLED.format(tests=str(Path(__file__).parent), name=name, call=call, folder=str(folder))
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert len(list((folder / "names").glob("*.json"))) == done and not (folder / "index.jsonl").exists()
    stood = everything(folder)
    report = augment(list(COLOURS), folder, job(), progress=False)
    augment(list(COLOURS), tmp_path / "whole", job(), progress=False)
    assert report.reused == done and contents(folder) == contents(tmp_path / "whole")
    first = [k for k in stood if key_of("ada") in k and not k.endswith(".part")]
    assert all(everything(folder)[k] == stood[k] for k in first)


def test_killed_before_anything_stands(tmp_path):
    Folder(tmp_path, job().fingerprint())
    for name in ("names", "pictures"):
        (tmp_path / name).rmdir()
    assert len(augment(["ada"], tmp_path, job(), progress=False).pairs) == 6


def test_other_settings_are_refused(tmp_path):
    augment(["ada"], tmp_path, job(), progress=False)
    with pytest.raises(InputError, match="was made with other settings: seed = 0, now 7; choose another --out"):
        augment(["ada"], tmp_path, job(seed=7), progress=False)
    with pytest.raises(InputError, match="other settings: prompts = "):
        augment(["ada"], tmp_path, job(PROMPTS[:1]), progress=False)
    with pytest.raises(InputError, match="painted = 1, now 2"):
        augment(["ada"], tmp_path, job(models=Painted(version=2)), progress=False)
    augment(["ada"], tmp_path, job(batch=2), progress=False)  # changes nothing


def test_bad_input_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match="wanted a list of names, got \\[\\]"):
        augment([], tmp_path / "a", job(), progress=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("x")
    with pytest.raises(InputError, match="holds other things and no settings.json; choose an empty folder for --out"):
        augment(["ada"], tmp_path / "other", job(), progress=False)
    with pytest.raises(InputError, match="sources 5 of source_tries 4, edits 1 of tries 2"):
        augment(["ada"], tmp_path / "b", job(sources=5), progress=False)
    folder = Folder(tmp_path / "c", {})
    (folder.out / "settings.json").write_text("no")
    with pytest.raises(InputError, match="settings.json cannot be read: .* choose another --out"):
        Folder(tmp_path / "c", {})


def test_nan_stops_the_run_and_keeps_what_stands(tmp_path, monkeypatch):
    from augment_cases import PaintBase

    real = PaintBase.decode
    monkeypatch.setattr(PaintBase, "decode", lambda self, x: real(self, x) * (float("nan") if self.bad else 1))
    said = PaintBase.text

    def text(self, prompts, *sizes):
        self.bad = any("bea" in p for p in prompts)
        return said(self, prompts, *sizes)

    monkeypatch.setattr(PaintBase, "text", text)
    with pytest.raises(IdcoreError, match="paint drew NaN or infinity; draw in float32"):
        augment(["ada", "bea"], tmp_path, job(), progress=False)
    assert Folder(tmp_path, job().fingerprint()).stands("ada")


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    import idcore.training.augment.store as store

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "_write_flushed", full)
    with pytest.raises(IdcoreError, match="No space left on device; free some space .* what stands is kept"):
        augment(["ada"], tmp_path, job(), progress=False)
    assert not list((tmp_path / "pictures").iterdir())


def test_lists(tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("Ada Lovelace\n\n  Bea   Smith \nAda Lovelace\n")
    assert read_names(names) == ["Ada Lovelace", "Bea Smith"]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("{person} as a nurse\na photo of {person}\n{person} as a nurse\n")
    assert [p.text for p in read_prompts(prompts)] == ["{person} as a nurse", "a photo of {person}"]
    prompts.write_text("{person} as a nurse\na nurse\n")
    with pytest.raises(InputError, match="1 of 2 prompts in .* do not say {person}.*'a nurse'"):
        read_prompts(prompts)
    shipped = read_prompts("dreamidentity-edits")
    assert shipped[0].text == "{person} as nurse" and shipped[0].labels == {"kind": "role"}
    assert all(set(p.labels) >= {"style", "background"} for p in read_prompts("tiny-augment"))
    assert key_of("Ada Lovelace") != key_of("ada lovelace") and key_of("Zoë/..").startswith("zo-")


def test_seeds_differ_by_all_that_they_hang_on():
    seeds = {seed_of(s, n, t, k) for s in (0, 1) for n in ("a", "b") for t in ("x", "y") for k in (0, 1)}
    assert len(seeds) == 16 and all(0 <= s < 2**56 for s in seeds)


def test_one_run_at_a_time(tmp_path):
    from idcore.training.data.claiming import alone

    folder = Folder(tmp_path, job().fingerprint())
    with alone(folder.out), pytest.raises(InputError, match="another idcore augment is writing into"):
        augment(["ada"], tmp_path, job(), progress=False)
