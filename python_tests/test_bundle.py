"""Offline bundles: round trip, and archives that lie."""

import io
import json
import tarfile

import pytest
from test_hub import BIG, SMALL, Fake, sha, toy  # noqa: F401

from idcore.bundle import HEAD, export_bundle, import_bundle
from idcore.errors import InputError, WeightsError
from idcore.hub import fetch, read_manifest


@pytest.fixture
def home(toy, tmp_path):  # noqa: F811
    fetch("toy", home=tmp_path / "home", transport=Fake())
    return tmp_path / "home"


def test_round_trip(home, tmp_path):
    out = export_bundle(["toy"], tmp_path / "b.tar", home)
    assert import_bundle(out, tmp_path / "new") == ["toy"]
    assert (tmp_path / "new/toy/sub/big.bin").read_bytes() == BIG
    assert read_manifest(tmp_path / "new/toy")["small.json"]["sha256"] == sha(SMALL)
    fake = Fake()
    fetch("toy", home=tmp_path / "new", transport=fake)
    assert fake.asked == []
    assert export_bundle(["toy"], tmp_path / "c.tar", home).read_bytes() == out.read_bytes()


def test_incomplete_and_damaged_recipes_are_not_bundled(home, tmp_path):
    with pytest.raises(InputError, match="at least one recipe"):
        export_bundle([], tmp_path / "b.tar", home)
    (home / "toy/sub/big.bin").write_bytes(b"\1" + BIG[1:])
    with pytest.raises(WeightsError, match="big.bin is damaged: its SHA-256"):
        export_bundle(["toy"], tmp_path / "b.tar", home)
    (home / "toy/sub/big.bin").unlink()
    with pytest.raises(WeightsError, match="toy is not complete, sub/big.bin is missing; run `idcore fetch toy`"):
        export_bundle(["toy"], tmp_path / "b.tar", home)
    assert not (tmp_path / "b.tar").exists()


def archive(path, entries, members):
    with tarfile.open(path, "w") as tar:
        head = json.dumps({"format": "idcore-bundle", "files": entries}).encode()
        for name, data in [(HEAD, head), *members]:
            info = tarfile.TarInfo(name)
            if isinstance(data, str):
                info.type, info.linkname = tarfile.SYMTYPE, data
                tar.addfile(info)
                continue
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def entry(path="small.json", recipe="toy", data=SMALL):
    return {"recipe": recipe, "path": path, "sha256": sha(data), "size": len(data)}


@pytest.mark.parametrize("entries,members,text", [
    ([entry("../../evil")], [("toy/../../evil", b"x")], "no recipe of this idcore has 'toy/../../evil'"),
    ([entry("/etc/evil")], [("toy//etc/evil", b"x")], "no recipe of this idcore has"),
    ([entry(recipe="..")], [("../small.json", SMALL)], "no recipe of this idcore has"),
    ([entry()], [("../evil", b"x")], "'../evil' is not among the files"),
    ([entry()], [("toy/small.json", "/etc/passwd")], "is not among the files"),
    ([entry()], [("toy/small.json", b"other")], "toy/small.json has SHA-256"),
    ([entry("sub/big.bin", data=b"x")], [("toy/sub/big.bin", b"x")], "wanted " + sha(BIG)),
    ([entry(), entry("sub/big.bin", data=BIG)], [("toy/small.json", SMALL)], "ends early: toy/sub/big.bin did not"),
    ([{"recipe": "toy"}], [], "list of files is damaged"),
])  # fmt: skip
def test_archives_that_lie(toy, tmp_path, entries, members, text):  # noqa: F811
    path = archive(tmp_path / "b.tar", entries, members)
    with pytest.raises(WeightsError, match=text):
        import_bundle(path, tmp_path / "home")
    left = {p.name for p in (tmp_path / "home").rglob("*") if p.is_file()} if (tmp_path / "home").exists() else set()
    assert left <= {"small.json", "manifest.json"} and not (tmp_path / "evil").exists()


def test_other_files_and_cut_ones(home, tmp_path):
    out = export_bundle(["toy"], tmp_path / "b.tar", home)
    (tmp_path / "cut.tar").write_bytes(out.read_bytes()[:200_000])
    with pytest.raises(WeightsError, match="cannot be unpacked|ends early"):
        import_bundle(tmp_path / "cut.tar", tmp_path / "new")
    (tmp_path / "text").write_bytes(b"hello" * 500)
    with pytest.raises(WeightsError, match="cannot be unpacked as a bundle"):
        import_bundle(tmp_path / "text", tmp_path / "new")
    with pytest.raises(WeightsError, match="cannot be unpacked as a bundle"):
        import_bundle(tmp_path / "none", tmp_path / "new")
    with tarfile.open(tmp_path / "plain.tar", "w") as tar:
        tar.add(tmp_path / "text", "text")
    with pytest.raises(WeightsError, match="is no bundle of `idcore fetch NAME --bundle`"):
        import_bundle(tmp_path / "plain.tar", tmp_path / "new")
