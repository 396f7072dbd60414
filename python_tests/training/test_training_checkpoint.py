"""Checkpoint folders: what is damaged is told and passed over; what cannot be written leaves the last one intact."""

import errno
import json
import os
import resource
import shutil
import signal

import pytest
import torch

from idcore import files
from idcore.errors import IdcoreError, WeightsError
from idcore.files import write_safetensors
from idcore.training import checkpoint


def tensors(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {"empty": {}, "module": {"w": torch.randn(50, 40, generator=g)}, "optimiser": {"step.w": torch.tensor(3.0)}}


def saved(folder, *steps, keep=9):
    for step in steps:
        checkpoint.save(folder, step, tensors(step), {"note": step}, keep)
    return folder


def test_what_is_saved_is_read(tmp_path):
    got = checkpoint.newest(saved(tmp_path / "deep" / "er", 5, 10))
    assert got.step == 10 and got.state == {"format": 1, "step": 10, "note": 10}
    assert torch.equal(got.tensors("module")["w"], tensors(10)["module"]["w"]) and got.tensors("empty") == {}
    assert sorted(p.name for p in got.folder.iterdir()) == [
        "manifest.json", "module.safetensors", "optimiser.safetensors", "state.json",
    ]  # fmt: skip


def test_old_ones_go_after_the_new_one_stands(tmp_path, monkeypatch):
    saved(tmp_path, 1, 2, 3, keep=2)
    assert [f.name for f in checkpoint.folders(tmp_path)] == ["step-00000003", "step-00000002"]
    monkeypatch.setattr(checkpoint, "damage", lambda folder: "module.safetensors is missing")
    with pytest.raises(IdcoreError, match="step-00000004 did not reach the disk whole: module.safetensors is missing"):
        checkpoint.save(tmp_path, 4, tensors(), {}, 1)
    assert (tmp_path / "step-00000002").exists() and (tmp_path / "step-00000003").exists()


def test_a_damaged_later_one_is_never_kept_in_place_of_a_whole_one(tmp_path):
    saved(tmp_path, 1, 5, keep=2)
    (tmp_path / "step-00000005" / "manifest.json").unlink()
    saved(tmp_path, 3, keep=1)
    assert checkpoint.newest(tmp_path).step == 3 and not (tmp_path / "step-00000001").exists()
    saved(tmp_path, 5, 6, keep=1)
    assert [f.name for f in checkpoint.folders(tmp_path)] == ["step-00000006"]


def test_files_have_the_usual_permissions(tmp_path):
    old = os.umask(0o027)
    try:
        folder = saved(tmp_path, 1) / "step-00000001"
        assert {p.stat().st_mode & 0o777 for p in folder.iterdir()} == {0o640}
    finally:
        os.umask(old)
    write_safetensors(tmp_path / "x.safetensors", {"a": torch.ones(1)})
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o666 & ~old


def _flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def _edit_manifest(folder, change):
    value = json.loads((folder / "manifest.json").read_text())
    change(value)
    (folder / "manifest.json").write_text(json.dumps(value))


DAMAGES = {
    "manifest.json is missing": lambda f: (f / "manifest.json").unlink(),
    "manifest.json is damaged": lambda f: (f / "manifest.json").write_text('{"format": 1, "fil'),
    "manifest.json cannot be read": lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe"),
    "manifest.json is of format 99, this version reads 1": lambda f: _edit_manifest(f, lambda m: m.update(format=99)),
    "optimiser.safetensors is missing": lambda f: (f / "optimiser.safetensors").unlink(),
    "module.safetensors has 100 bytes, the manifest says 8,": lambda f: os.truncate(f / "module.safetensors", 100),
    "module.safetensors is not what was written: its SHA-256": lambda f: _flip(f / "module.safetensors"),
    "state.json is not what was written": lambda f: _flip(f / "state.json"),
    "state.json cannot be read": lambda f: [(f / "state.json").unlink(), (f / "state.json").mkdir()],
}


@pytest.mark.parametrize("words", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_its_damage(tmp_path, words):
    saved(tmp_path, 1, 2)
    folder = tmp_path / "step-00000002"
    if words == "state.json cannot be read":
        size = (folder / "state.json").stat().st_size
        DAMAGES[words](folder)
        _edit_manifest(folder, lambda m: m["files"]["state.json"].update(bytes=(folder / "state.json").stat().st_size))
        assert size
    else:
        DAMAGES[words](folder)
    said = []
    assert checkpoint.newest(tmp_path, said.append).step == 1
    assert len(said) == 1 and said[0].startswith(f"passing over a damaged checkpoint, step-00000002: {words}")
    shutil.rmtree(tmp_path / "step-00000001")
    with pytest.raises(WeightsError, match=f"no whole checkpoint in .*step-00000002: {words[:20]}.*Start anew"):
        checkpoint.newest(tmp_path)
    saved(tmp_path, 2)  # in the damaged one's place
    assert checkpoint.damage(folder) is None and checkpoint.newest(tmp_path).step == 2


def test_a_manifest_cannot_point_outside(tmp_path):
    saved(tmp_path, 1)
    _edit_manifest(tmp_path / "step-00000001", lambda m: m["files"].update({"../x": {"bytes": 0, "sha256": ""}}))
    assert checkpoint.damage(tmp_path / "step-00000001") == "manifest.json is damaged"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("where", ["write", "fsync", "rename"])
def test_a_disk_that_fails_leaves_the_last_checkpoint(tmp_path, monkeypatch, code, where):
    saved(tmp_path, 1)

    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    if where == "write":
        monkeypatch.setattr(files, "write_safetensors", fail)
    else:
        monkeypatch.setattr(os, {"fsync": "fsync", "rename": "replace"}[where], fail)
    with pytest.raises(IdcoreError) as e:
        saved(tmp_path, 2)
    text = str(e.value)
    assert f"the checkpoint of step 2 was not saved in {tmp_path}" in text and os.strerror(code) in text
    assert "the last good checkpoint, step-00000001, is intact. Free some space or make the folder writable" in text
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"] and checkpoint.newest(tmp_path).step == 1


def test_a_write_that_the_kernel_stops_halfway(tmp_path):
    saved(tmp_path, 1)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
        with pytest.raises(IdcoreError, match="step 2 was not saved .*File too large.*step-00000001, is intact"):
            saved(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    saved(tmp_path, 2)


def test_what_a_killed_save_left_is_removed(tmp_path):
    saved(tmp_path, 1)
    (tmp_path / ".aside-step-00000002.abcd").mkdir()
    (tmp_path / ".aside-step-00000002.abcd" / "module.safetensors").write_bytes(b"half")
    checkpoint.clean(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
