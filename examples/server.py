"""Text to image with identities over HTTP: people are enrolled once, requests that fit together share a pass.

    python examples/server.py --base SDXL_FOLDER --system pulid-v1.1 --unet sdxl_lightning_4step_unet.safetensors

Without arguments it serves the embedded model (64x64 pictures), so that it runs anywhere. Needs `pip install
"idcore[serve]"`. It listens on this machine alone; put a proxy with TLS and authentication before it for others.

    curl -F photos=@me.jpg localhost:8000/v1/identities            # {"id": "...", ...}
    curl localhost:8000/v1/identities/ID --output me.safetensors   # the identity as a file, and back in:
    curl --data-binary @me.safetensors localhost:8000/v1/identities/import
    curl -H "Content-Type: application/json" -H "Accept: image/png" --output me.png localhost:8000/v1/images \
         -d '{"prompt": "a photo of a person, blue background", "identities": [{"id": "ID", "scale": 1.0}]}'

Without `Accept: image/png` the answer is JSON with the pictures in base64. /health, /metrics (Prometheus) and /docs
tell the rest. Errors are JSON: {"error": {"type", "message"}}, and the message says what to do.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, File, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

import idcore
from idcore.errors import IdcoreError, InputError, WeightsError, told
from idcore.serving import Batcher, Closed, DrawRequest, Engine, IdentityStore, QueueFull, Stopped, Ticket, load_engine
from idcore.serving.body_cap import BodyCap
from idcore.serving.requests import MAX_COUNT, MAX_PEOPLE, MAX_STEPS
from idcore.serving.store import StoreFull, UnknownIdentity, identity_bytes, identity_from_bytes

log = logging.getLogger("idcore.server")


@dataclass(frozen=True)
class Limits:
    """What one client may ask for; all values are our choice."""

    body_bytes: int = 32 << 20
    photo_pixels: int = 64_000_000
    photos: int = 8
    prompt_chars: int = 2000
    identities: int = 1000
    enrolments: int = 8  # at a time, waiting ones included
    batch: int = 8
    window_s: float = 0.02
    queue: int = 64
    grace_s: float = 30.0


class WantedIdentity(BaseModel):
    model_config = ConfigDict(extra="forbid")
    id: Annotated[str, Field(max_length=64)]
    scale: Annotated[float, Field(ge=0, le=5)] = 1.0


class ImagesBody(BaseModel):
    """A request for pictures of a prompt."""

    model_config = ConfigDict(extra="forbid")
    prompt: str
    negative_prompt: str = ""
    identities: Annotated[list[WantedIdentity], Field(max_length=MAX_PEOPLE)] = []
    regions: Annotated[str | None, Field(max_length=200, description='"left, right", "1 1 / 1"')] = None
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 0
    count: Annotated[int, Field(ge=1, le=MAX_COUNT)] = 1
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] = 4
    guidance_scale: Annotated[float, Field(ge=0, le=30)] = 1.0
    width: Annotated[int | None, Field(ge=1)] = None
    height: Annotated[int | None, Field(ge=1)] = None
    id_guidance_start: Annotated[float, Field(ge=0, le=1)] = 0.0
    id_guidance_end: Annotated[float, Field(ge=0, le=1)] = 1.0


class Service:
    """Engine, queue and enrolled people of one server."""

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self.engine, self.limits = engine, limits
        self.people = IdentityStore(limits.identities)
        self.batcher = Batcher(
            engine.draw, key=engine.key, weight=lambda r: r.count, max_batch=limits.batch, window=limits.window_s,
            max_queue=limits.queue,
        )  # fmt: skip
        self.enroller = ThreadPoolExecutor(1, thread_name_prefix="enrol")
        self.enrolling = 0

    def close(self) -> None:
        if not self.batcher.close(self.limits.grace_s):
            log.warning("requests that were not done after %g s were cancelled", self.limits.grace_s)
        self.enroller.shutdown(cancel_futures=True)

    async def enrol(self, files: list[bytes]) -> tuple[str, idcore.Identity]:
        if self.enrolling >= self.limits.enrolments:
            raise QueueFull(self.limits.enrolments, 1.0)
        self.enrolling += 1
        try:
            identity = await asyncio.get_running_loop().run_in_executor(self.enroller, self._encode, files)
        finally:
            self.enrolling -= 1
        return self.people.add(identity), identity

    def _encode(self, files: list[bytes]) -> idcore.Identity:
        return self.engine.encode([idcore.load_image(f, max_pixels=self.limits.photo_pixels) for f in files])

    def read(self, body: ImagesBody) -> DrawRequest:
        if len(body.prompt) > self.limits.prompt_chars or len(body.negative_prompt) > self.limits.prompt_chars:
            raise InputError(f"prompts may have up to {self.limits.prompt_chars} characters; shorten them")
        request = DrawRequest(
            body.prompt, body.negative_prompt, tuple(self.people.get(w.id) for w in body.identities),
            tuple(w.scale for w in body.identities), body.regions, body.seed, body.count, body.steps,
            body.guidance_scale, body.width, body.height, body.id_guidance_start, body.id_guidance_end,
        )  # fmt: skip
        self.engine.check(request)
        return request

    async def draw(self, request: DrawRequest, http: Request) -> tuple[Ticket, list[Image.Image]]:
        ticket = self.batcher.submit(request)
        done = asyncio.wrap_future(ticket)
        done.add_done_callback(lambda f: f.cancelled() or f.exception())  # heard, also where nobody waits any more
        left = asyncio.create_task(_left(http))
        try:
            await asyncio.wait({done, left}, return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                raise Stopped
            return ticket, done.result()
        except asyncio.CancelledError:  # the grace of a shutdown is over
            raise Stopped from None
        finally:
            self.batcher.abandon(ticket)
            left.cancel()


async def _left(http: Request) -> None:
    """Returns when the client has gone."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _error(status: int, kind: str, message: str, **headers: str) -> JSONResponse:
    return JSONResponse({"error": {"type": kind, "message": message}}, status, headers)


def _status(e: IdcoreError) -> int:
    known = [(UnknownIdentity, 404), (QueueFull, 429), (Closed, 503), (StoreFull, 507)]
    known += [(InputError, 422), (WeightsError, 422)]  # weights: of a file that was sent
    return next((status for kind, status in known if isinstance(e, kind)), 500)


def create_app(engine: Engine, limits: Limits | None = None) -> FastAPI:
    """The server of an engine; its queue ends with the app's lifespan."""
    service = Service(engine, limits or Limits())

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> Any:
        yield
        await asyncio.get_running_loop().run_in_executor(None, service.close)

    app = FastAPI(title="idcore", version=idcore.__version__, lifespan=lifespan)
    app.state.service = service
    app.add_middleware(BodyCap, limit=service.limits.body_bytes)
    _answer_errors(app)
    _routes_of_people(app, service)
    _routes_of_pictures(app, service)
    return app


def _answer_errors(app: FastAPI) -> None:
    @app.exception_handler(IdcoreError)
    async def ours(http: Request, e: IdcoreError) -> JSONResponse:
        more = {"Retry-After": f"{e.retry_after:.0f}"} if isinstance(e, QueueFull) else {}
        return _error(_status(e), type(e).__name__, str(e), **more)

    @app.exception_handler(RequestValidationError)
    async def invalid(http: Request, e: RequestValidationError) -> JSONResponse:
        parts = [f"{'.'.join(map(str, p['loc'][1:])) or 'body'}: {p['msg']}" for p in e.errors()[:5]]
        return _error(422, "InvalidRequest", "; ".join(parts) + "; /docs shows the form of a request")

    @app.exception_handler(HTTPException)
    async def plain(http: Request, e: HTTPException) -> JSONResponse:
        return _error(e.status_code, "HTTPException", f"{e.detail}; /docs lists what there is", **(e.headers or {}))

    @app.exception_handler(Stopped)
    async def gone(http: Request, e: Stopped) -> JSONResponse:
        return _error(503, "Stopped", "cancelled before it was done; send it again")  # heard only at a shutdown

    @app.exception_handler(Exception)
    async def unexpected(http: Request, e: Exception) -> JSONResponse:
        log.error("request failed", exc_info=e)
        return _error(500, "InternalError", "the server failed; its log says why")


def _routes_of_people(app: FastAPI, service: Service) -> None:
    @app.post("/v1/identities", status_code=201)
    async def enrol(photos: Annotated[list[UploadFile], File(description="photos of one person")]) -> dict:
        if len(photos) > service.limits.photos:
            raise InputError(f"up to {service.limits.photos} photos of one person, got {len(photos)}; leave some out")
        name, identity = await service.enrol([await p.read() for p in photos])
        return {"id": name, "system": identity.system, "photos": len(photos), "tokens": identity.tokens.shape[1]}

    @app.post("/v1/identities/import", status_code=201)
    async def take_in(http: Request) -> dict:
        data = await http.body()
        identity = await asyncio.get_running_loop().run_in_executor(None, identity_from_bytes, data)
        service.engine.check_person(identity)
        return {"id": service.people.add(identity), "system": identity.system, "tokens": identity.tokens.shape[1]}

    @app.get("/v1/identities/{name}", response_class=Response)
    def give_out(name: str) -> Response:
        return Response(identity_bytes(service.people.get(name)), media_type="application/octet-stream")

    @app.delete("/v1/identities/{name}", status_code=204)
    def forget(name: str) -> None:
        service.people.remove(name)


def _routes_of_pictures(app: FastAPI, service: Service) -> None:
    @app.post("/v1/images", response_model=None)
    async def images(body: ImagesBody, http: Request) -> Response | dict:
        request = service.read(body)
        as_file = "image/png" in http.headers.get("accept", "")
        if as_file and request.count > 1:
            raise InputError(f"a PNG holds one picture, got count {request.count}; accept application/json")
        ticket, pictures = await service.draw(request, http)
        files = await asyncio.get_running_loop().run_in_executor(None, lambda: [_png(p) for p in pictures])
        if as_file:
            return Response(files[0], media_type="image/png")
        return {
            "images": [base64.b64encode(f).decode() for f in files],
            "seeds": [request.seed + i for i in range(request.count)],
            "batch": ticket.batch_size,
            "waited_s": round(ticket.waited, 4),
            "took_s": round(ticket.took, 4),
        }

    @app.get("/health")
    async def health() -> dict:
        return {"status": "ok", "engine": service.engine.name, "version": idcore.__version__}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        values = service.batcher.stats() | {"identities": len(service.people)}
        names = {"weight": "pictures", "busy": "busy_seconds"}
        lines = []
        for key, value in values.items():
            kind = "gauge" if key in ("waiting", "running", "identities") else "counter"
            name = f"idcore_{names.get(key, key)}" + ("_total" if kind == "counter" else "")
            lines += [f"# TYPE {name} {kind}", f"{name} {value:g}"]
        return Response("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="tiny", help='"tiny", or a folder with SDXL in diffusers\' layout')
    parser.add_argument("--system", default="auto", help="a fetched recipe (pulid-v1.1), or what --weights holds")
    for name in ("weights", "vision", "parsing", "retinaface", "unet"):
        parser.add_argument(f"--{name}", type=Path, help="file; see `idcore generate --help`")
    parser.add_argument("--faces", default="embedded", help="face models, see `idcore generate --help`")
    parser.add_argument("--no-photos", action="store_true", help="identity files only: no face models are loaded")
    parser.add_argument("--device", help="default: CUDA where it is usable")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; there is no authentication")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000")
    parser.add_argument("--batch", type=int, default=Limits.batch, help="pictures in one pass")
    parser.add_argument("--window", type=float, default=Limits.window_s, help="seconds that a request waits for others")
    parser.add_argument("--queue", type=int, default=Limits.queue, help="requests that may wait")
    args = parser.parse_args()
    names = ("system", "weights", "vision", "parsing", "retinaface", "faces", "unet", "device")
    engine = load_engine(args.base, **{n: getattr(args, n) for n in names}, for_photos=not args.no_photos)
    limits = Limits(batch=args.batch, window_s=args.window, queue=args.queue)
    uvicorn.run(
        create_app(engine, limits), host=args.host, port=args.port, timeout_graceful_shutdown=int(limits.grace_s)
    )


if __name__ == "__main__":
    raise SystemExit(told(main))
