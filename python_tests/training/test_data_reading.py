"""Data folders and shards as people have them, and as nobody should: each bad thing has its reason in the report."""

import io
import json
import os
import struct
import tarfile
import zlib

import numpy as np
import pytest
from data_cases import RedFaces, folder, picture
from PIL import Image

from idcore.errors import InputError
from idcore.training.data import reading
from idcore.training.data.options import PrepareConfig
from idcore.training.data.prepare import prepare
from idcore.training.data.reading import read_bytes, scan
from idcore.training.data.source import PreparedSource


def outcome(data, tmp_path, **options):
    """Captions of what is kept and (reason, in full) of what is dropped, by id."""
    config = PrepareConfig(**{**dict(resolution=64, multiple=16, min_face=16, max_upscale=4.0), **options})
    report = prepare(data, tmp_path / "out", config, RedFaces(), progress=False)
    return {r.id: r.caption for r in report.records}, {d.id: (d.reason, d.detail) for d in report.dropped}


def content(image, **options):
    out = io.BytesIO()
    image.save(out, **{"format": "PNG", **options})
    return out.getvalue()


def shard(path, members):
    """A tar of (name, bytes) or ready TarInfos."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_sidecars_metadata_and_nested_folders(tmp_path):
    data = folder(tmp_path / "data", 1)
    for i, name in enumerate(("meta/a.png", "meta/deep/b.png", "csv/c.png", "meta/both.png", "noise/d.PNG"), 1):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(data / name, format="PNG")
    rows = [{"file_name": "a.png", "text": "  of\tmetadata\n"}, {"file_name": "deep/b.png", "caption": "from above"}]
    rows.append({"file_name": "both.png", "text": "metadata wins"})
    (data / "meta" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (data / "meta" / "both.txt").write_text("sidecar")
    (data / "csv" / "metadata.csv").write_text('file_name,text\nc.png,"with, comma"\n')
    (data / "noise" / "d.txt").write_bytes("\ufeffümläut".encode())
    (data / "noise" / "readme.md").write_text("not a picture")
    (data / ".hidden").mkdir()
    picture(9).save(data / ".hidden" / "x.png")
    kept, dropped = outcome(data, tmp_path)
    assert dropped == {} and kept == {
        "p000.png": "picture number 0", "meta/a.png": "of metadata", "meta/deep/b.png": "from above",
        "csv/c.png": "with, comma", "meta/both.png": "metadata wins", "noise/d.PNG": "ümläut",
    }  # fmt: skip


def test_shards_are_read_in_place_and_give_what_a_folder_gives(tmp_path):
    pictures = {f"{i:03d}": picture(i) for i in range(4)}
    members = []
    for key, p in pictures.items():
        members.append((f"set/{key}.jpg" if key == "003" else f"set/{key}.png", content(p)))
        if key == "000":
            members.append((f"set/{key}.txt", b"from text"))
        elif key == "001":
            members.append((f"set/{key}.json", b'{"caption": "from json", "width": 96}'))
        elif key == "003":
            members.append((f"set/{key}.original.txt", b"other name"))
            members.append((f"set/{key}.txt", b"three"))
    shard(tmp_path / "data" / "s-0.tar", members)
    shard(tmp_path / "data" / "s-1.tar", [("000.png", content(picture(8))), ("000.txt", b"same key")])
    kept, dropped = outcome(tmp_path / "data", tmp_path)
    assert kept == {
        "s-0.tar/set/000.png": "from text", "s-0.tar/set/001.png": "from json", "s-0.tar/set/003.jpg": "three",
        "s-1.tar/000.png": "same key",
    }  # fmt: skip
    assert {k: v[0] for k, v in dropped.items()} == {"s-0.tar/set/002.png": "no caption"}
    source = PreparedSource(tmp_path / "out")
    (batch,) = source.micro_batches(0, 0, 0, 1, 4, 1)
    assert sorted(batch.ids) == sorted(kept) and batch.pixels.shape == (4, 3, 64, 64)
    one, _ = outcome(tmp_path / "data" / "s-1.tar", tmp_path / "alone")
    assert one == {"s-1.tar/000.png": "same key"}


def png_header(width, height):
    """A PNG that claims a size and holds nothing."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = lambda kind, d: struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d))  # noqa: E731
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_every_kind_of_picture(tmp_path):
    data, p = tmp_path / "data", picture(3)
    data.mkdir()
    deep = np.asarray(p.convert("L")).astype(np.uint16) * 257
    turned = Image.Exif()
    turned[274] = 6
    files = {
        "alpha.png": content(p.convert("RGBA")), "palette.png": content(p.quantize(64)),
        "cmyk.jpg": content(picture(4).convert("CMYK"), format="JPEG", quality=95),
        "turned.jpg": content(picture(5, (160, 96)), format="JPEG", quality=95, subsampling=0, exif=turned),
        "moving.webp": content(
            picture(6), format="WEBP", save_all=True, append_images=[picture(7)], lossless=True, duration=50
        ),
        "deep.png": content(Image.fromarray(deep)),
        "bomb.png": png_header(50_000, 50_000),
        "large.png": png_header(11_000, 11_000), "cut.png": content(picture(8))[:300], "empty.png": b"",
        "text.jpg": b"<html>not found</html>", "one.png": content(picture(9, (1, 1), faces=())),
        "flat.gif": b"GIF89a...", "scan.tiff": b"II*\0",
    }  # fmt: skip
    for name, c in files.items():
        (data / name).write_bytes(c)
        (data / name).with_suffix(".txt").write_text(name)
    kept, dropped = outcome(data, tmp_path)
    assert set(kept) == {"alpha.png", "cmyk.jpg", "moving.webp", "palette.png", "turned.jpg"}
    sizes = {r.id: r.size for r in PreparedSource(tmp_path / "out").records}
    assert sizes["turned.jpg"] == [96, 160]
    assert dropped["deep.png"][0] == "no face"  # grey: read, and there is no red in it
    for name, text in {
        "bomb.png": "more pixels than PIL decodes", "large.png": "= 121,000,000 pixels",
        "cut.png": "damaged or cut off",
        "empty.png": "is an empty file", "text.jpg": "not a picture that is known here",
    }.items():  # fmt: skip
        reason, detail = dropped[name]
        assert reason == "unreadable" and text in detail
    assert dropped["flat.gif"] == ("format", ".gif is not read; save it as JPEG, PNG or WEBP")
    assert dropped["scan.tiff"][0] == "format" and dropped["one.png"][0] == "picture too small"


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/secret.png", "..\\secret.png", "a/../../secret.png", "C:/secret.png", "x\0.png"]
)
def test_metadata_that_leads_out_of_the_folder(tmp_path, name):
    data = folder(tmp_path / "data", 1)
    picture(5).save(tmp_path / "secret.png")
    (data / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "mine now"}))
    kept, dropped = outcome(data, tmp_path)
    assert kept == {"p000.png": "picture number 0"} and len(dropped) == 1
    ((reason, detail),) = dropped.values()
    assert reason == "outside" and "metadata.jsonl line 1 names a file outside of its folder" in detail


@pytest.mark.parametrize("name", ["../../secret.png", "/etc/secret.png", "a/../../../secret.png"])
def test_shard_members_that_lead_out(tmp_path, name):
    shard(tmp_path / "data" / "s.tar", [(name, content(picture(1))), ("ok.png", content(picture(2))), ("ok.txt", b"k")])
    kept, dropped = outcome(tmp_path / "data", tmp_path)
    assert kept == {"s.tar/ok.png": "k"}
    ((reason, detail),) = dropped.values()
    assert reason == "outside" and detail == "its name leads out of the archive"
    assert not list(tmp_path.rglob("secret.png"))


def test_links_in_folders_and_shards(tmp_path):
    data = folder(tmp_path / "data", 1)
    picture(5).save(tmp_path / "secret.png")
    (data / "link.png").symlink_to(tmp_path / "secret.png")
    (data / "inside.png").symlink_to(data / "p000.png")
    (data / "inside.txt").write_text("a copy")
    (data / "dangling.png").symlink_to(data / "nothing.png")
    info = tarfile.TarInfo("evil.png")
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    shard(data / "s.tar", [(info, b"")])
    kept, dropped = outcome(data, tmp_path)
    assert set(kept) == {"inside.png"}  # first in the order of names; p000.png has the same pixels
    assert dropped["link.png"] == ("outside", "a link that leads out of the data folder; copy the file there")
    assert dropped["dangling.png"][0] == "unreadable" and dropped["p000.png"][0] == "duplicate"
    assert dropped["s.tar/evil.png"] == ("unreadable", "it is a link or a special file in the archive")


def test_names_that_stand_twice(tmp_path):
    data = folder(tmp_path / "data", 2)
    rows = [{"file_name": "p000.png", "text": "one"}, {"file_name": "./p000.png", "text": "two"}]
    rows.append({"file_name": "gone.png", "text": "three"})
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    twice = [("a.png", content(picture(7))), ("a.png", content(picture(8))), ("a.txt", b"twice")]
    shard(data / "s.tar", twice)
    kept, dropped = outcome(data, tmp_path)
    assert kept == {"p000.png": "one", "p001.png": "picture number 1", "s.tar/a.png": "twice"}
    assert dropped["s.tar/a.png"][0] == dropped["p000.png (metadata.jsonl line 2)"][0] == "duplicate id"
    assert len(dropped) == 3
    assert dropped["gone.png"] == ("missing file", "metadata names it, and there is no such picture")
    assert PreparedSource(tmp_path / "out").records[-1].length == len(twice[0][1])  # the first of the two


def test_captions_that_are_none(tmp_path):
    data = folder(tmp_path / "data", 3)
    (data / "p000.txt").write_text(" \n\t ")
    (data / "p001.txt").write_bytes(b"\xff\xfe\x00broken")
    (data / "p002.txt").write_bytes(b"x" * (1 << 17))
    kept, dropped = outcome(data, tmp_path)
    assert kept == {} and dropped["p000.png"][0] == "no caption"
    assert "p001.txt is not UTF-8 text" in dropped["p001.png"][1]
    assert "its caption file has 131,072 bytes; at most 65,536 are read" in dropped["p002.png"][1]


def test_metadata_and_shards_that_cannot_be_read_at_all(tmp_path):
    data = folder(tmp_path / "data", 1)
    metadata = data / "metadata.jsonl"
    for text, told in {
        '{"file_name": "p000.png"': "metadata.jsonl cannot be read: .*; wanted one object a line",
        "[1, 2]": "line 1 is not an object",
        '{"path": "p000.png", "text": "x"}': "metadata.jsonl line 1 has no file_name; it has path, text",
    }.items():
        metadata.write_text(text)
        with pytest.raises(InputError, match=told):
            scan(data)
    metadata.unlink()
    whole = shard(tmp_path / "s.tar", [(f"{i}.png", content(picture(i))) for i in range(3)]).read_bytes()
    for name, bad in {"cut": whole[:700], "html": b"<html>" * 300, "gz": b"\x1f\x8b" * 700, "empty": b""}.items():
        (data / f"{name}.tar").write_bytes(bad)
        with pytest.raises(InputError, match=f"{name}.tar cannot be read: .*; wanted an uncompressed tar"):
            scan(data)
        (data / f"{name}.tar").unlink()


def test_no_data(tmp_path):
    with pytest.raises(InputError, match="is no folder and no .tar; wanted a folder of pictures or WebDataset shards"):
        scan(tmp_path / "nowhere")
    with pytest.raises(InputError, match="there is no picture in .*; wanted .jpg, .jpeg, .png, .webp beside .txt"):
        scan(tmp_path)
    with pytest.raises(InputError, match="x.png cannot be read: No such file"):
        read_bytes(tmp_path, "x.png", None, None)
    (tmp_path / "x.png").write_bytes(b"1234")
    with pytest.raises(InputError, match="is cut off: wanted 10 bytes from 2 on, got 2"):
        read_bytes(tmp_path, "x.png", 2, 10)
    for read in (reading._metadata, lambda path: list(reading._shard(tmp_path, path))):  # gone since it was listed
        with pytest.raises(InputError, match="gone cannot be read: .*No such file"):
            read(tmp_path / "gone")
    os.truncate(tmp_path / "x.png", (1 << 29) + 1)
    with pytest.raises(InputError, match="has 536,870,913 bytes; at most 536,870,912 are read as a picture"):
        read_bytes(tmp_path, "x.png", None, None)


def test_a_linked_folder_is_told_and_not_followed(tmp_path):
    folder(tmp_path / "data", 1)
    folder(tmp_path / "elsewhere", 1)
    (tmp_path / "data" / "more").symlink_to(tmp_path / "elsewhere")
    kept, dropped = outcome(tmp_path / "data", tmp_path)
    assert set(kept) == {"p000.png"} and dropped["more"][0] == "linked folder" and "not followed" in dropped["more"][1]
