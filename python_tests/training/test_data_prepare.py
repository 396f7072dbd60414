"""`idcore prepare`: what is kept, what is dropped and why, and that it can be stopped anywhere."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from data_cases import RedFaces, folder, picture

from idcore.errors import IdcoreError, InputError, WeightsError
from idcore.files import read_safetensors
from idcore.training.data import prepare as module
from idcore.training.data.options import PrepareConfig
from idcore.training.data.prepare import prepare
from idcore.training.data.source import PreparedSource

SMALL = dict(resolution=64, multiple=16, min_face=16, chunk=2)


def run(data, out, faces=None, workers=1, **options):
    config = PrepareConfig(**{**SMALL, **options})
    return prepare(data, out, config, faces or RedFaces(), workers=workers, progress=False)


def content(out):
    """Every file of a prepared folder but where the data was."""
    files = {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
    del files[".lock"]
    manifest = json.loads(files.pop("manifest.json"))
    return files, {k: v for k, v in manifest.items() if k != "data"}


def test_what_is_written(tmp_path):
    data = folder(tmp_path / "data", 5, sizes=((96, 96), (160, 96)))
    report = run(data, tmp_path / "out")
    assert (report.found, len(report.records), report.dropped) == (5, 5, [])
    lines = [json.loads(x) for x in (tmp_path / "out" / "index.jsonl").read_text().splitlines()]
    assert [x["id"] for x in lines] == [f"p{i:03d}.png" for i in range(5)]
    first, wide = lines[0], lines[1]
    assert first["caption"] == "picture number 0" and first["size"] == [96, 96] and first["bucket"] == [64, 64]
    assert first["box"] == [20, 20, 59, 69] and first["hash"].startswith("sha256:")
    assert wide["bucket"] == [80, 48] and len(first["points"]) == 5
    tensors, _ = read_safetensors(tmp_path / "out" / "faces" / f"{first['chunk']}.safetensors")
    assert tensors["x"].dtype == torch.float16 and float(tensors["x"][first["row"]]) == 20
    assert (tmp_path / "out" / "dropped.jsonl").read_text() == ""


def test_every_drop_has_its_reason(tmp_path):
    data = folder(tmp_path / "data", 2)
    cases = {
        "no face": picture(10, faces=()),
        "several faces": picture(11, faces=((5, 5, 40, 40), (50, 50, 80, 80))),
        "face too small": picture(12, faces=((30, 30, 40, 44),)),
        "picture too small": picture(13, (40, 40), faces=((5, 5, 35, 35),)),
        "dark": picture(14),
        "duplicate": picture(0),
    }
    cases["dark"].putdata([(160, 0, 0) if p[0] > 200 else p for p in cases["dark"].get_flattened_data()])
    for name, p in cases.items():
        p.save(data / f"z {name}.png", compress_level=9)
        (data / f"z {name}.txt").write_text("text")
    picture(20).save(data / "z no caption.png")
    nan = picture(21)
    nan.putpixel((0, 0), (9, 9, 9))
    nan.save(data / "z no features.png")
    (data / "z no features.txt").write_text("text")
    report = run(data, tmp_path / "out", min_light=60.0)
    told = {d["id"]: d for d in map(json.loads, (tmp_path / "out" / "dropped.jsonl").read_text().splitlines())}
    for name in [*cases, "no caption", "no features"]:
        assert told[f"z {name}.png"]["reason"] == name
    assert len(report.records) == 2 and report.counts["duplicate"] == 1 and report.found == 10
    assert "9x13 pixels" in told["z face too small.png"]["detail"]
    assert "2, the largest 1.4 times the next" in told["z several faces.png"]["detail"]
    assert "40x40 would be enlarged 1.60 times to 64x64; at most 1.25" in told["z picture too small.png"]["detail"]
    assert "gave NaN or infinity in x" in told["z no features.png"]["detail"]
    assert "the same pixels as p000.png" in told["z duplicate.png"]["detail"]
    table = report.table()
    assert "dropped" in table and "several faces" in table and "e.g. z no face.png" in table


def test_policies(tmp_path):
    data = folder(tmp_path / "data", 1)
    picture(1, faces=((5, 5, 65, 65), (70, 70, 90, 90))).save(data / "two.png")
    (data / "two.txt").write_text("two")
    picture(2).save(data / "mute.png")
    near = picture(0)
    near.putpixel((90, 90), (0, 150, 150))
    near.save(data / "q.png")
    (data / "q.txt").write_text("q")
    ids = {}
    for name, options in {
        "strict": {}, "largest": dict(several="largest"), "dominant": dict(several="dominant", dominance=8.0),
        "too dominant": dict(several="dominant", dominance=12.0), "empty": dict(captions="empty"),
        "near": dict(duplicates="near"),
    }.items():  # fmt: skip
        report = run(data, tmp_path / name, **options)
        ids[name] = {r.id for r in report.records} - {"p000.png"}
        assert report.no_caption == (name == "empty")
    assert ids == {
        "strict": {"q.png"}, "largest": {"q.png", "two.png"}, "dominant": {"q.png", "two.png"},
        "too dominant": {"q.png"}, "empty": {"q.png", "mute.png"}, "near": set(),
    }  # fmt: skip


def test_the_number_of_workers_changes_nothing(tmp_path):
    data = folder(tmp_path / "data", 7)
    run(data, tmp_path / "one")
    run(data, tmp_path / "two", workers=2)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_killed_anywhere_it_goes_on(tmp_path):
    """SIGKILL at moments that differ; the result equals an undisturbed run's, and no chunk is made twice."""
    data = folder(tmp_path / "data", 12)
    run(data, tmp_path / "whole")
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[3]); import idcore.training.data.prepare as m; from data_cases "
        "import RedFaces; from idcore.training.data.options import PrepareConfig\n"
        "was = m._do\n"
        "def slow(out, name, *rest):\n"
        "    print(name, flush=True); r = was(out, name, *rest); print('done', flush=True); time.sleep(.03); return r\n"
        "m._do = slow\n"
        f"m.prepare(sys.argv[1], sys.argv[2], PrepareConfig(**{SMALL!r}), RedFaces(), progress=False)"
    )
    made, out = [], tmp_path / "out"
    for lines in (2, 3, 99):
        p = subprocess.Popen(
            [sys.executable, "-c", code, str(data), str(out), str(Path(__file__).parent)], stdout=subprocess.PIPE
        )
        for i, line in enumerate(p.stdout, 1):
            if line.strip() != b"done":
                made.append(line.strip())
            if i == lines:
                time.sleep(0.002 * lines)
                p.send_signal(signal.SIGKILL)
                break
        p.wait()
        p.stdout.close()
        if lines == 2:  # what a kill in the middle of a save leaves
            part = out / "faces" / ".x.safetensors.1234.part"
            part.write_bytes(b"half")
            with pytest.raises(InputError, match="was not prepared to the end; run the same `idcore prepare` again"):
                PreparedSource(out)
    assert not part.exists() and content(out) == content(tmp_path / "whole")
    assert len(made) <= len(set(made)) + 1  # the chunk under the knife alone may be begun twice


def test_again_is_nothing_and_a_new_picture_is_little(tmp_path):
    data, out, marker = folder(tmp_path / "data", 40), tmp_path / "out", tmp_path / "built"
    run(data, out, chunk=4)
    before = {p: p.stat().st_mtime_ns for p in (out / "faces").iterdir()}
    index = (out / "index.jsonl").read_bytes()
    report = run(data, out, RedFaces(str(marker)), chunk=4)
    assert report.reused == 40 and not marker.exists() and (out / "index.jsonl").read_bytes() == index
    picture(99).save(data / "a new one.png")
    (data / "a new one.txt").write_text("new")
    (data / "p039.txt").write_text("another caption")
    report = run(data, out, chunk=4)
    kept = [p for p in (out / "faces").iterdir() if before.get(p) == p.stat().st_mtime_ns]
    assert len(report.records) == 41 and len(kept) >= len(before) - 3 and report.reused > 15
    assert report.records[-1].caption == "another caption"
    assert {p.stem for p in (out / "faces").iterdir()} == {r.chunk for r in report.records}  # the old ones are gone
    next(iter((out / "faces").iterdir())).write_bytes(b"short")
    assert run(data, out, chunk=4).reused < 41
    PreparedSource(out, data=data)


def test_other_settings_are_refused_by_name(tmp_path):
    data, out = folder(tmp_path / "data", 2), tmp_path / "out"
    run(data, out)
    with pytest.raises(InputError, match="was prepared with other settings: min_face = 16, now 20; choose another"):
        run(data, out, min_face=20)
    with pytest.raises(InputError, match="faces red = 1, now 2"):
        run(data, out, RedFaces(version=2))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.doc").write_text("")
    with pytest.raises(InputError, match="holds other things and no settings.json; choose an empty folder"):
        run(data, tmp_path / "other")


def test_two_at_once_are_refused(tmp_path):
    data, out = folder(tmp_path / "data", 2), tmp_path / "out"
    run(data, out)
    with module.alone(out):
        with pytest.raises(InputError, match="another idcore prepare is writing into .*; wait for it"):
            run(data, out)
    run(data, out)


def test_dry_run_writes_nothing(tmp_path):
    data = folder(tmp_path / "data", 3)
    picture(9, faces=()).save(data / "x.png")
    (data / "x.txt").write_text("x")
    report = prepare(data, tmp_path / "out", PrepareConfig(**SMALL), RedFaces(), dry_run=True, progress=False)
    assert len(report.records) == 3 and report.counts == {"no face": 1} and not (tmp_path / "out").exists()


def test_disk_full_and_read_only(tmp_path, monkeypatch):
    data, out = folder(tmp_path / "data", 6), tmp_path / "out"
    real, left = module.write_safetensors, [2]

    def full(path, tensors, *rest):
        if not left[0]:
            raise WeightsError(f"could not write {path}: No space left on device; found 0.0 MiB free there")
        left[0] -= 1
        return real(path, tensors, *rest)

    monkeypatch.setattr(module, "write_safetensors", full)
    with pytest.raises(IdcoreError, match="No space left on device"):
        run(data, out, chunk=1)
    monkeypatch.undo()
    stood = {p.name for p in (out / "chunks").iterdir()}
    assert len(stood) == 2
    assert run(data, out, chunk=1).reused >= 2 and stood <= {p.name for p in (out / "chunks").iterdir()}
    (tmp_path / "file").write_text("")
    with pytest.raises(IdcoreError, match="cannot write into .*; choose another --out folder"):
        run(data, tmp_path / "file" / "out")
    if os.path.exists("/dev/full"):  # what replace_text says of a full disk
        with pytest.raises(WeightsError, match="could not write .*; wanted a writable folder"):
            module.replace_text("/dev/full/x", "text")
    shutil.rmtree(out)


def test_a_worker_that_dies_is_told(tmp_path, monkeypatch):
    data = folder(tmp_path / "data", 4)

    def dead(*args, **kwargs):
        raise module.BrokenProcessPool("gone")

    monkeypatch.setattr(module, "wait", dead)
    with pytest.raises(IdcoreError, match="a worker process ended by itself; most often there was too little memory"):
        run(data, tmp_path / "out", workers=2)
