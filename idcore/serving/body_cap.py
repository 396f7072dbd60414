"""ASGI middleware: no request body beyond a number of bytes is read."""

from __future__ import annotations

import json
from typing import Any


class _TooLarge(Exception):
    pass


class BodyCap:
    """Answers 413 to bodies beyond `limit` bytes: by their header, or while they come in."""

    def __init__(self, app: Any, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        said = dict(scope["headers"]).get(b"content-length", b"0")
        came = 0
        over = not said.isdigit() or int(said) > self.limit
        begun = False

        async def counted() -> dict:
            nonlocal came, over
            message = await receive()
            came += len(message.get("body", b""))
            over = over or came > self.limit
            if over:
                raise _TooLarge
            return message

        async def watched(message: dict) -> None:
            nonlocal begun
            if over and not begun:
                raise _TooLarge  # whatever the app makes of a body that broke off
            begun = True
            await send(message)

        try:
            if not over:
                await self.app(scope, counted, watched)
        except _TooLarge:
            pass
        if over and not begun:
            await self._refuse(send)

    async def _refuse(self, send: Any) -> None:
        message = f"the body may have up to {self.limit:,} bytes; send less"
        body = json.dumps({"error": {"type": "BodyTooLarge", "message": message}}).encode()
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        headers.append((b"content-length", str(len(body)).encode()))
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": body})
