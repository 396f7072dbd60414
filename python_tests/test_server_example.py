"""examples/server.py: batches equal serial answers, bad requests get 4xx and words, queue and bodies are bounded."""

import asyncio
import base64
import importlib.util
import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from naive_attention import one_thread  # noqa: F401
from PIL import Image

import idcore
from idcore.demo import PHOTO
from idcore.identity import Identity
from idcore.serving import SdxlEngine, Stopped, TinyEngine
from idcore.serving.store import identity_bytes
from idcore.systems.base import AttentionOptions
from idcore.testing.tiny_models import TinySystem, tiny_pipeline, tiny_unet

for needed in ("fastapi", "uvicorn", "httpx"):
    pytest.importorskip(needed, reason=f"{needed} is not installed: pip install 'idcore[serve]'")
import httpx  # noqa: E402
from fastapi.testclient import TestClient  # noqa: E402

SCRIPT = Path(__file__).parent.parent / "examples" / "server.py"
SMALL = {"layers_per_block": 1, "block_out_channels": (16, 32), "transformer_layers_per_block": 1}


def load_example():
    spec = importlib.util.spec_from_file_location("idcore_example_server", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


server = load_example()


def sdxl_engine():
    stock = tiny_pipeline("sdxl", unet=tiny_unet("sdxl", **SMALL))
    return SdxlEngine(idcore.IDPipeline(stock, TinySystem(stock.unet, options=AttentionOptions("ortho_v2", 4, 3))))


@pytest.fixture(scope="module")
def tiny():
    app = server.create_app(TinyEngine(), server.Limits(prompt_chars=200, body_bytes=4 << 20, identities=200))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def enrolled(client, identity):
    answer = client.post("/v1/identities/import", content=identity_bytes(identity))
    assert answer.status_code == 201, answer.text
    return answer.json()["id"]


def pictures(answer):
    assert answer.status_code == 200, answer.text
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(b)))).astype(int) for b in answer.json()["images"]]


def test_a_photo_to_a_picture_and_the_identity_as_a_file(tiny):
    answer = tiny.post("/v1/identities", files=[("photos", ("me.png", PHOTO.read_bytes()))])
    assert answer.status_code == 201
    me = answer.json()
    assert (me["system"], me["photos"], me["tokens"]) == ("tiny", 1, 260)
    wanted = {"prompt": "a photo of a person, blue background", "identities": [{"id": me["id"]}], "seed": 3}
    first = pictures(tiny.post("/v1/images", json=wanted))[0]
    file = tiny.get(f"/v1/identities/{me['id']}").content
    again = tiny.post("/v1/identities/import", content=file).json()["id"]
    wanted["identities"] = [{"id": again}]
    png = tiny.post("/v1/images", json=wanted, headers={"Accept": "image/png"})
    assert png.headers["content-type"] == "image/png"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png.content))), first)
    pipe = tiny.app.state.service.engine.pipe
    alone = pipe(wanted["prompt"], pipe.encode(PHOTO), seed=3, output_type="np")[0]
    assert np.abs(alone.astype(int) - first).max() <= 1
    assert tiny.delete(f"/v1/identities/{again}").status_code == 204
    assert tiny.post("/v1/images", json=wanted).status_code == 404


def test_sixteen_people_at_once_get_what_each_gets_alone():
    engine = sdxl_engine()
    limits = server.Limits(batch=16, window_s=20)
    with TestClient(server.create_app(engine, limits)) as client:
        names = [enrolled(client, engine.pipe.system.identity(i)) for i in range(16)]
        bodies = [
            {
                "prompt": f"a dog number {i}", "negative_prompt": "bad" * (i % 2), "seed": i, "guidance_scale": 1.5,
                "identities": [{"id": names[i], "scale": 0.5 + i / 16}]
                + ([{"id": names[i - 1], "scale": 0.7}] if i % 3 == 0 else []),
                "regions": "left, right" if i % 6 == 0 else None,
            }
            for i in range(16)
        ]  # fmt: skip

        async def at_once():
            transport = httpx.ASGITransport(app=client.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as c:
                return await asyncio.gather(*[c.post("/v1/images", json=b) for b in bodies])

        together = asyncio.run(at_once())
        sizes = [a.json()["batch"] for a in together]
        client.app.state.service.batcher.window = 0.0
        serial = [client.post("/v1/images", json=b) for b in bodies]
        assert sizes == [16] * 16 and all(a.json()["batch"] == 1 for a in serial)
        alone = [pictures(a)[0] for a in serial]
        for i, (a, b) in enumerate(zip(together, alone)):
            assert np.abs(pictures(a)[0] - b).max() <= 1
            assert all(np.abs(b - c).max() > 1 for c in alone[:i])
        metrics = client.get("/metrics").text
        assert "idcore_pictures_total 32" in metrics and "idcore_identities 16" in metrics


class Held:
    """An engine that works until it is let go."""

    name = "held"

    def __init__(self):
        self.free, self.entered, self.stopped = threading.Event(), threading.Event(), threading.Event()

    def check(self, request):
        pass

    def key(self, request):
        return 0

    def draw(self, requests, stop):
        self.entered.set()
        while not self.free.wait(0.01):
            if stop():
                self.stopped.set()
                raise Stopped
        return [[Image.new("RGB", (8, 8))] for _ in requests]


def test_the_queue_is_bounded_and_the_answer_says_when_to_retry():
    engine = Held()
    with TestClient(server.create_app(engine, server.Limits(batch=1, queue=2))) as client:
        answers = []
        ask = [
            threading.Thread(target=lambda: answers.append(client.post("/v1/images", json={"prompt": "a"})))
            for _ in "abc"
        ]
        ask[0].start()
        assert engine.entered.wait(60)
        for thread in ask[1:]:
            thread.start()
        while client.app.state.service.batcher.stats()["waiting"] < 2:
            time.sleep(0.01)
        refused = client.post("/v1/images", json={"prompt": "a"})
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["message"].startswith("2 requests are waiting already; try again in")
        engine.free.set()
        for thread in ask:
            thread.join(60)
        assert [a.status_code for a in answers] == [200] * 3
        assert "idcore_refused_total 1" in client.get("/metrics").text


def test_who_goes_away_is_not_drawn():
    engine = Held()
    app = server.create_app(engine, server.Limits(batch=1))

    async def go():
        body = [{"type": "http.request", "body": b'{"prompt": "a"}', "more_body": False}]
        left = asyncio.Event()

        async def receive():
            if body:
                return body.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            pass

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": "/v1/images",
            "raw_path": b"/v1/images", "query_string": b"", "headers": [(b"content-type", b"application/json")],
            "scheme": "http", "server": ("localhost", 80), "client": ("127.0.0.1", 1), "root_path": "",
        }  # fmt: skip
        request = asyncio.create_task(app(scope, receive, send))
        await asyncio.to_thread(engine.entered.wait, 5)
        left.set()
        await asyncio.wait_for(request, 5)

    asyncio.run(go())
    assert engine.stopped.wait(60)
    assert app.state.service.batcher.stats()["abandoned"] == 1
    app.state.service.close()


@pytest.mark.parametrize("lies", [False, True])
def test_bodies_are_capped_by_header_and_by_what_comes(tiny, lies):
    def parts():
        for _ in range(10):
            yield b"x" * (1 << 20)

    for path in ("/v1/identities/import", "/v1/images"):
        answer = tiny.post(path, content=parts() if lies else b"x" * (10 << 20))
        assert answer.status_code == 413
        assert answer.json()["error"]["message"] == "the body may have up to 4,194,304 bytes; send less"


def test_errors_say_what_to_do(tiny):
    def ask(**how):
        answer = tiny.post("/v1/images", json={"prompt": "a photo"} | how)
        return answer.status_code, answer.json()["error"]["message"]

    assert ask(prompt="x" * 201) == (422, "prompts may have up to 200 characters; shorten them")
    assert ask(identities=[{"id": "nobody"}])[0] == 404
    assert ask(seeds=1) == (422, "seeds: Extra inputs are not permitted; /docs shows the form of a request")
    assert "leave the size out" in ask(width=512)[1]
    status, text = ask(count=9)
    assert status == 422 and text == "a request may ask for 1 to 8 pictures, got 9; split it"
    no_face = io.BytesIO()
    Image.new("RGB", (64, 64)).save(no_face, "PNG")
    answer = tiny.post("/v1/identities", files=[("photos", ("me.png", no_face.getvalue()))])
    assert answer.status_code == 422 and answer.json()["error"]["type"] == "NoFaceError"
    assert "Use a photo in which a face is upright" in answer.json()["error"]["message"]
    missing = tiny.get("/nowhere")
    assert missing.status_code == 404 and "/docs lists what there is" in missing.json()["error"]["message"]


def bad_requests(seed, count):
    """Malformed requests: JSON of wrong types and values, no JSON, damaged photos and identity files."""
    r = random.Random(seed)
    good = {"prompt": "a photo", "seed": 1, "count": 1, "steps": 2}
    values = [None, -1, 0, 1e400, float("nan"), 2**70, "x", "\ud800", [], {}, [[]], True, "x" * 300, [{"id": 3}], " "]
    names = [
        *good,
        "width",
        "height",
        "identities",
        "regions",
        "guidance_scale",
        "id_guidance_end",
        "id_guidance_start",
    ]
    files = [PHOTO.read_bytes(), identity_bytes(Identity(torch.zeros(1, 260, 128), None, "tiny"))]
    for _ in range(count):
        kind = r.randrange(5)
        if kind < 3:
            body = good | {name: r.choice(values) for name in r.sample(names, r.randrange(1, 4))}
            text = json.dumps(body)
            if kind == 2:
                at = r.randrange(len(text))
                text = text[:at] + r.choice(["", "\x00", "}", "\xff"]) + text[at + r.randrange(3) :]
            yield (
                "/v1/images",
                {"content": text.encode("latin-1", "replace"), "headers": {"Content-Type": "application/json"}},
            )
        else:
            data = bytearray(r.choice(files))
            data = data[: r.randrange(len(data))] if r.random() < 0.3 else data
            for _ in range(r.randrange(1, 30)):
                if data:
                    data[r.randrange(min(len(data), 2000))] = r.randrange(256)
            if kind == 3:
                yield "/v1/identities/import", {"content": bytes(data)}
            else:
                field = r.choice(["photos", "photo", ""])
                yield "/v1/identities", {"files": [(field, ("../../me", bytes(data)))] * r.choice([1, 1, 9])}


def test_malformed_requests_never_give_5xx(tiny):
    answers = [(path, how, tiny.post(path, **how)) for path, how in bad_requests(0, 80)]
    for path, how, answer in answers:
        assert answer.status_code < 500, (path, str(how)[:300], answer.text)
        if answer.status_code >= 400:
            assert set(answer.json()["error"]) == {"type", "message"}
    refused = [a for _, _, a in answers if 400 <= a.status_code < 500]
    assert len(refused) > 50
    assert tiny.get("/health").json()["status"] == "ok"


def test_a_failing_engine_is_a_500_without_details_and_the_server_goes_on(tiny, monkeypatch):
    service = tiny.app.state.service
    monkeypatch.setattr(service.batcher, "_run", lambda requests, stop: 1 / 0)
    answer = tiny.post("/v1/images", json={"prompt": "a photo"})
    assert answer.status_code == 500 and "division" not in answer.text
    monkeypatch.undo()
    assert tiny.post("/v1/images", json={"prompt": "a photo"}).status_code == 200


def test_the_script_serves_and_shuts_down_gracefully(tmp_path):
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--port", "0", "--window", "1.0"], cwd=tmp_path, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    try:
        for line in process.stderr:
            if "running on" in line.lower():
                url = line.split("running on ")[1].split()[0]
                break
        assert url.startswith("http://127.0.0.1:")
        assert httpx.get(f"{url}/health", timeout=60).json()["engine"] == "tiny"
        answers = []
        ask = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{url}/v1/images", json={"prompt": "a photo"}, timeout=60))
        )
        ask.start()
        while "idcore_requests_total 1" not in httpx.get(f"{url}/metrics", timeout=60).text:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        ask.join(60)
        assert answers[0].status_code == 200  # what was taken is finished
        process.communicate(timeout=60)
        assert process.returncode in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.wait()
