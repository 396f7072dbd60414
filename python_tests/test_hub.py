"""Fetching published weights: pinned, resumable, checked; nothing here needs a network."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from typer.testing import CliRunner

from idcore import cli, hub, recipes
from idcore.doctor import examine
from idcore.errors import IdcoreError, InputError, WeightsError
from idcore.hub import fetch, read_manifest, usable
from idcore.recipes import File, Recipe
from idcore.transport import Remote

BIG, SMALL = bytes(range(256)) * 4000, b'{"a": 1}\n'
COMMIT = "c" * 40


def sha(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def toy(monkeypatch):
    """A recipe of a pinned large file, a file whose commit is not known, and what it needs."""
    files = (File("sub/big.bin", "who/what", "deep/big.bin", "a" * 40, sha(BIG)), File("small.json", "who/what"))
    other = Recipe("other", "another", "MIT", (File("x.bin", url="https://there/x.bin"),), (), True)
    monkeypatch.setitem(recipes.RECIPES, "toy", Recipe("toy", "a toy", "MIT", files, ("other",)))
    monkeypatch.setitem(recipes.RECIPES, "other", other)


class Fake:
    """Another side that counts what is asked of it, and may break off or lie."""

    def __init__(self, content=None, stop_at=None, size=True):
        self.content = content or {"deep/big.bin": BIG, "small.json": SMALL, "https://there/x.bin": b"x"}
        self.stop_at, self.size, self.sent, self.asked = stop_at, size, 0, []

    def commit(self, repo):
        self.asked.append(repo)
        return COMMIT

    def look(self, file):
        key = file.url or file.source or file.path
        self.asked.append((key, file.revision))
        return Remote(key, file.revision, len(self.content[key]) if self.size else None)

    def get(self, remote, part):
        data = self.content[remote.url]
        with open(part, "ab") as f:
            end = len(data) if self.stop_at is None else self.stop_at
            self.sent += f.write(data[f.tell() : end])
        if self.stop_at is not None:
            raise ConnectionError("the line broke")


def test_fetch_once_and_what_is_noted(toy, tmp_path):
    fake = Fake()
    folder = fetch("toy", home=tmp_path, transport=fake)
    assert folder == tmp_path / "toy"
    assert (folder / "sub/big.bin").read_bytes() == BIG and (folder / "small.json").read_bytes() == SMALL
    assert fake.asked == [("deep/big.bin", "a" * 40), "who/what", ("small.json", COMMIT)]
    noted = read_manifest(folder)
    assert noted["small.json"]["sha256"] == sha(SMALL) and noted["small.json"]["commit"] == COMMIT
    assert noted["sub/big.bin"]["size"] == len(BIG)
    fake.asked = []
    fetch("toy", home=tmp_path, transport=fake)
    assert fake.asked == []
    assert not [p for p in (tmp_path / ".parts").rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_a_broken_line_is_taken_up_where_it_broke(toy, tmp_path):
    with pytest.raises(WeightsError, match="ConnectionError: the line broke.*1,000 bytes are kept and the next fetch"):
        fetch("toy", home=tmp_path, transport=Fake(stop_at=1000))
    assert not (tmp_path / "toy/sub/big.bin").exists()
    fake = Fake()
    fetch("toy", home=tmp_path, transport=fake)
    assert fake.sent == len(BIG) - 1000 + len(SMALL)
    assert (tmp_path / "toy/sub/big.bin").read_bytes() == BIG


def test_another_file_than_the_pinned_one_never_gets_its_name(toy, tmp_path):
    fetch("toy", home=tmp_path, transport=Fake())
    target = tmp_path / "toy/sub/big.bin"
    target.write_bytes(BIG[:-1])  # damaged on the disk: fetched anew
    wrong = Fake({"deep/big.bin": BIG[::-1], "small.json": SMALL})
    with pytest.raises(WeightsError, match=f"the pinned SHA-256 is {sha(BIG)}, what came .* it was thrown away"):
        fetch("toy", home=tmp_path, transport=wrong)
    assert target.read_bytes() == BIG[:-1]
    fetch("toy", home=tmp_path, transport=Fake())
    assert target.read_bytes() == BIG


def test_the_hubs_own_hashes_are_checked(toy, tmp_path):
    class Lying(Fake):
        def look(self, file):
            remote = super().look(file)
            return Remote(remote.url, "", None, git="0" * 40) if "small" in remote.url else remote

    with pytest.raises(WeightsError, match="the hub's git hash is 0000"):
        fetch("toy", home=tmp_path, transport=Lying())


def test_terms_and_names_and_space(toy, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="MIT. Read the publishers' terms.*--accept-licence"):
        fetch("other", home=tmp_path, transport=Fake())
    assert (fetch("other", home=tmp_path, transport=Fake(), accept_licence=True) / "x.bin").read_bytes() == b"x"
    with pytest.raises(InputError, match="there is no recipe 'tyo'; there are pulid-v1, "):
        fetch("tyo", home=tmp_path)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda p: type("U", (), {"free": 10})())
    with pytest.raises(WeightsError, match="1 MB are still to come, 0 MB are free in .*set IDCORE_HOME"):
        fetch("toy", home=tmp_path, transport=Fake())
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match="cannot write into .*IDCORE_HOME"):
        fetch("toy", home=tmp_path / "file", transport=Fake())


def test_two_processes_do_not_fetch_one_recipe_at_once(toy, tmp_path):
    from filelock import FileLock

    (tmp_path / ".parts").mkdir()
    with FileLock(tmp_path / ".parts/toy.lock"), pytest.raises(WeightsError, match="being fetched by another process"):
        fetch("toy", home=tmp_path, transport=Fake())


def test_pickles_are_converted_when_asked(tmp_path, monkeypatch):
    file = File("w.bin", "who/what", converted="w.safetensors")
    monkeypatch.setitem(recipes.RECIPES, "toy", Recipe("toy", "a toy", "MIT", (file,)))
    torch.save({"image_proj": {"proj.weight": torch.ones(2, 3)}}, tmp_path / "w.bin")
    fake = Fake({"w.bin": (tmp_path / "w.bin").read_bytes()})
    fetch("toy", home=tmp_path, transport=fake)
    assert usable("toy", "w.bin", tmp_path) is None
    (report,) = examine(["toy"], home=tmp_path)
    assert report.files[0].state == "to convert" and "idcore fetch toy --convert" in report.files[0].advice
    # detection wants keys and values of a layer for a known layout
    monkeypatch.setitem(recipes.RECIPES, "toy", Recipe("toy", "a toy", "MIT", (file,)))
    state = {"image_proj": {"latents": torch.ones(1, 2, 3), "proj_in.weight": torch.ones(3, 2)},
             "ip_adapter": {"1.to_k_ip.weight": torch.ones(4, 2)}}  # fmt: skip
    torch.save(state, tmp_path / "w.bin")
    fetch("toy", home=tmp_path / "b", transport=Fake({"w.bin": (tmp_path / "w.bin").read_bytes()}), convert=True)
    assert usable("toy", "w.bin", tmp_path / "b") == tmp_path / "b/toy/w.safetensors"
    assert examine(["toy"], home=tmp_path / "b")[0].complete
    with pytest.raises(InputError, match="toy has no file 'v.bin'; it has w.bin"):
        usable("toy", "v.bin", tmp_path)


def test_doctor_names_every_state(toy, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    home = tmp_path / "home"
    report = examine(["toy"], home=home)
    assert [r.name for r in report] == ["toy", "other"] and not report[0].complete
    assert [f.state for f in report[0].files] == ["missing", "missing"]
    assert report[0].files[0].looked == [str(home / "toy/sub/big.bin"), f"{tmp_path}/cache (who/what)"]
    cached = tmp_path / "cache/models--who--what/snapshots" / ("a" * 40) / "deep"
    cached.mkdir(parents=True)
    (cached / "big.bin").write_bytes(BIG)
    assert examine(["toy"], home=home)[0].files[0].state == "elsewhere"
    fetch("toy", home=home, transport=Fake())
    assert examine(["toy"], home=home, verify=True)[0].complete
    flipped = b"\1" + BIG[1:]
    (home / "toy/sub/big.bin").write_bytes(flipped)
    assert examine(["toy"], home=home)[0].complete  # the same size: only hashing shows it
    (bad,) = [f for f in examine(["toy"], home=home, verify=True)[0].files if f.state == "damaged"]
    assert "its SHA-256 is" in bad.advice and "idcore fetch toy" in bad.advice


def test_command_line(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "HubTransport", Fake)

    def run(*args):
        result = CliRunner().invoke(cli.app, [str(a) for a in args])
        return result.exit_code, result.stdout, result.exception

    assert "pulid-v1.1" in run("fetch")[1] and "sdxl-lightning" in run("fetch")[1]
    assert run("doctor", "toy", "--home", tmp_path)[0] == 1
    refused = run("fetch", "toy", "--needs", "--home", tmp_path)[2]
    assert "other: MIT. Read the publishers' terms" in str(refused) and not (tmp_path / "toy").exists()
    assert run("fetch", "toy", "--needs", "--accept-licence", "--home", tmp_path)[1].split() == [
        str(tmp_path / "other"), str(tmp_path / "toy")]  # fmt: skip
    status, out, _ = run("doctor", "toy", "--json", "--home", tmp_path)
    assert status == 0 and [r["complete"] for r in json.loads(out)["recipes"]] == [True, True]
    assert run("doctor", "--home", tmp_path)[0] == 0
    status, out, _ = run("fetch", "toy", "--bundle", tmp_path / "b.tar", "--home", tmp_path)
    assert status == 0 and out.strip() == str(tmp_path / "b.tar")
    assert run("fetch", "--from-bundle", tmp_path / "b.tar", "--home", tmp_path / "new")[1].split() == ["toy"]
    error = run("fetch", "toy", "--from-bundle", tmp_path / "b.tar")[2]
    assert isinstance(error, IdcoreError) and "give it alone" in str(error)


def test_recipes_are_sound():
    known = recipes.RECIPES
    for r in known.values():
        assert r.files and r.licence and all(n in known for n in r.needs), r.name
        assert len({f.path for f in r.files}) == len(r.files)
        for f in r.files:
            assert bool(f.repo) != bool(f.url) and len(f.revision) in (0, 40) and len(f.sha256) in (0, 64), f
            assert set(f.revision + f.sha256) <= set("0123456789abcdef"), f
            assert not f.url or f.url.startswith("https://") and f.sha256, "without a hub a hash must be pinned"
            assert bool(f.converted) == f.path.endswith((".bin", ".pt", ".pth")), f
            assert not f.path.startswith("/") and ".." not in f.path


def test_looking_opens_no_socket(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "socket", lambda *a, **k: pytest.fail("a socket was opened"))
    assert not any(r.complete for r in examine(home=tmp_path))


# -- huggingface_hub itself, against a server on this machine -------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """The answers of the hub that fetching needs; the first download breaks off, and then nothing goes until `up`."""

    protocol_version = "HTTP/1.1"
    broken, up, ranges = False, False, []

    def log_message(self, *a):
        pass

    def _head(self, data, status=200, **extra):
        self.send_response(status)
        big = len(data) > 1000
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        head = {"X-Repo-Commit": COMMIT, "ETag": f'"{sha(data) if big else git}"', "Accept-Ranges": "bytes", **extra}
        for k, v in head.items():
            self.send_header(k.replace("_", "-"), v)

    def do_HEAD(self):
        data = BIG if "big" in self.path else SMALL
        self._head(data, Content_Length=str(len(data)))
        self.end_headers()

    def do_GET(self):
        if self.path.startswith("/api/models/who/what"):
            body = json.dumps({"id": "who/what", "modelId": "who/what", "sha": COMMIT}).encode()
            self._head(body, Content_Length=str(len(body)), Content_Type="application/json")
            self.end_headers()
            self.wfile.write(body)
            return
        data = BIG if "big" in self.path else SMALL
        start = int(self.headers.get("Range", "bytes=0-").split("=")[1].split("-")[0])
        Hub.ranges.append((self.path.split("/")[-1], start))
        if Hub.broken and not Hub.up:
            self._head(b"", 404, Content_Length="0")
            self.end_headers()
            return
        part = data[start:]
        extra = {"Content_Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        self._head(data, 206 if start else 200, Content_Length=str(len(part)), **extra)
        self.end_headers()
        if "big" in self.path and not Hub.broken:
            Hub.broken = True
            self.wfile.write(part[:300_000])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.wfile.write(part)


CHILD = """
import sys
from huggingface_hub import constants
from idcore import recipes
from idcore.hub import fetch
from idcore.recipes import File, Recipe
constants.DOWNLOAD_CHUNK_SIZE = 65536
files = (File("big.bin", "who/what", "deep/big.bin"), File("small.json", "who/what"))
recipes.RECIPES["toy"] = Recipe("toy", "a toy", "MIT", files)
fetch("toy", home=sys.argv[1])
"""


def test_through_huggingface_hub_with_a_break(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    env = dict(os.environ, HF_ENDPOINT=url, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_PROGRESS_BARS="1", NO_PROXY="*",
               HF_HOME=str(tmp_path / "hf"), HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1")  # fmt: skip
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    try:
        first = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
        Hub.up = True
        second = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    finally:
        server.shutdown()
    assert first.returncode != 0 and "bytes are kept and the next fetch goes on from there" in first.stderr
    assert second.returncode == 0, second.stderr[-2000:]
    assert (tmp_path / "toy/big.bin").read_bytes() == BIG and (tmp_path / "toy/small.json").read_bytes() == SMALL
    assert read_manifest(tmp_path / "toy")["big.bin"]["commit"] == COMMIT
    starts = [s for name, s in Hub.ranges if name == "big.bin"]
    assert starts[0] == 0 and starts[-1] >= 65536, starts
    offline = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "none")], env=dict(env, HF_HUB_OFFLINE="1"),
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert offline.returncode != 0 and "HF_HUB_OFFLINE" in offline.stderr and "import a bundle" in offline.stderr
