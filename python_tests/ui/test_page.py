"""The page in headless Chromium: a photo chosen, pictures drawn, a message without a face, all from here."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import chromium
import pytest
from PIL import Image

from idcore.demo import PHOTO
from idcore.errors import InputError, MissingDependencyError
from idcore.identity import Identity
from idcore.serving import TinyEngine
from idcore.ui import page as page_module
from idcore.ui.studio import Studio

HAS_GRADIO = importlib.util.find_spec("gradio") is not None
needs_gradio = pytest.mark.skipif(not HAS_GRADIO, reason="gradio is not installed: pip install 'idcore[ui]'")
needs_chromium = pytest.mark.skipif(chromium.BINARY is None, reason="no chromium on this machine")


@pytest.fixture(scope="module")
def served():
    studio = Studio(TinyEngine())
    page = page_module.launch(studio, block=False)
    yield page
    page.close()


@needs_gradio
@needs_chromium
def test_a_photo_to_a_gallery_in_a_browser(served, tmp_path):
    assert urlsplit(served.local_url).hostname == "127.0.0.1"
    no_face = tmp_path / "wall.png"
    Image.new("RGB", (200, 200), "grey").save(no_face)
    with chromium.Chromium(tmp_path / "profile") as browser:
        browser.send("Page.navigate", url=served.local_url)
        browser.wait("!!document.querySelector('#photos input[type=file]')")
        message = "(document.querySelector('#message textarea')?.value ?? '')"
        browser.choose_files("#photos input[type=file]", no_face)
        text = browser.wait(f"{message}.includes('No face') && {message}")
        assert "No face was found in wall.png. Choose a photo in which a face is upright" in text
        browser.evaluate("document.querySelector('#photos button[aria-label=\"Clear\"]').click()")
        browser.wait(f"{message}.includes('Nobody is chosen')")
        browser.wait("!!document.querySelector('#photos input[type=file]')")
        browser.choose_files("#photos input[type=file]", PHOTO)
        browser.wait(f"{message} == 'A person from 1 photo.'")
        browser.evaluate("HTMLAnchorElement.prototype.click = function () { window.link = this.href }; 0")
        browser.evaluate("document.querySelector('#save').click()")
        link = browser.wait("window.link", 20)
        assert Identity.load(_fetched(link, tmp_path)).system == "tiny"
        browser.evaluate("document.querySelector('#draw').click()")
        browser.wait(f"{message} == '8 of 8 drawn.'")
        done = "i => i.complete && i.naturalWidth >= 256"
        loaded = f"[...document.querySelectorAll('#pictures img')].filter({done}).length"
        browser.wait(f"{loaded} == 8")
        captions = browser.evaluate("document.querySelector('#pictures').innerText")
        assert captions.count("same person") >= 6 and "seed 7" in captions
        shot = tmp_path / "app.png"
        browser.screenshot(shot)
        hosts = {urlsplit(url).hostname for url in browser.requests if url.startswith("http")}
    assert hosts == {"127.0.0.1"}  # no fonts, scripts or telemetry from elsewhere
    assert len(Image.open(shot).convert("RGB").getcolors(1 << 24)) > 3000
    if os.environ.get("IDCORE_KEEP_SCREENSHOT"):
        Image.open(shot).convert("RGB").quantize(256).save(os.environ["IDCORE_KEEP_SCREENSHOT"], optimize=True)


def _fetched(link, folder):
    import httpx

    path = folder / "fetched.safetensors"
    path.write_bytes(httpx.get(link).raise_for_status().content)
    return path


@needs_gradio
def test_files_of_the_machine_are_not_served(served):
    import httpx

    for path in ("/etc/passwd", str(Path(__file__)), "../../etc/passwd", str(PHOTO)):
        for route in ("/gradio_api/file=", "/file="):
            assert httpx.get(served.local_url.rstrip("/") + route + path).status_code in (403, 404)


@needs_gradio
def test_uploads_are_capped(served):
    import httpx

    files = {"files": ("big.png", b"x" * (21 << 20))}
    answer = httpx.post(f"{served.local_url}gradio_api/upload", files=files)
    assert answer.status_code in (400, 413) and "size" in answer.text.lower()


@needs_gradio
def test_the_command_serves_until_interrupted_and_names_a_port_that_is_taken(served, tmp_path):
    import httpx

    run = [sys.executable, "-m", "idcore.cli", "ui"]
    process = subprocess.Popen(
        run, cwd=tmp_path, text=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        # a shell's background jobs ignore SIGINT, and so would this child
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        line = next(line for line in process.stderr if line.startswith("idcore ui: "))
        assert httpx.get(line.split()[2], timeout=60).status_code == 200
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    taken = urlsplit(served.local_url).port
    with pytest.raises(InputError, match=f"cannot listen on 127.0.0.1:{taken} .* choose another --port"):
        page_module.launch(Studio(TinyEngine()), port=taken, block=False)


def test_without_gradio_or_with_an_old_one(monkeypatch):
    import types

    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'idcore\[ui\]'"):
        page_module.build(None)
    old = types.ModuleType("gradio")
    old.__version__ = "6.6.0"
    monkeypatch.setitem(sys.modules, "gradio", old)
    with pytest.raises(MissingDependencyError, match="needs gradio 6.7 or newer .* 6.6.0 is installed"):
        page_module.build(None)
