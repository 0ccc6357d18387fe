"""The HTTP server: token, limits, errors, metrics and the log around what rooms offer."""

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from holdfast.serve import errors, metrics
from holdfast.serve.errors import Refusal
from holdfast.serve.openai_api import Served, router

BODY_BYTES, BODY_SECONDS = 4 << 20, 30.0
# Whoever watches over the server asks this without a token.
HEALTH = "/health"
# Paths that are counted one by one; all others are one, or clients could fill the memory.
_PATHS = (HEALTH, "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")

access = logging.getLogger("holdfast.serve.access")


def create_app(
    served: Served, *, token: str | None = None, body_bytes: int = BODY_BYTES
) -> FastAPI:
    """An app that starts the engine when it starts and stops it when it stops.

    Args:
        token: what clients send as `Authorization: Bearer TOKEN`; None lets everybody in.
        body_bytes: of a request at most.
    """
    engine = served.engine

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            await asyncio.to_thread(engine.stop)

    app = FastAPI(title="Holdfast", lifespan=lifespan, docs_url=None, redoc_url=None,
                  openapi_url=None)  # fmt: skip
    requests = metrics.Requests()

    @app.get(HEALTH)
    async def health() -> dict[str, str]:
        if not engine.alive:
            raise Refusal(503, "the engine has stopped; restart the server", "stopped")
        return {"status": "ok"}

    @app.get("/metrics")
    async def numbers() -> Response:
        text = metrics.exposition(engine, requests)
        return PlainTextResponse(text, media_type=metrics.CONTENT_TYPE)

    app.include_router(router(served))
    errors.install(app)
    app.add_middleware(Gate, token=token, body_bytes=body_bytes, requests=requests)
    return app


class Gate:
    """Lets in who has the token and sends no more than is allowed, and writes the log."""

    def __init__(
        self, app: ASGIApp, *, token: str | None, body_bytes: int, requests: metrics.Requests
    ):
        self.app, self.body_bytes, self.requests = app, body_bytes, requests
        self._token = None if token is None else token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status, answered = time.perf_counter(), 500, 0

        async def noted(message: Message) -> None:
            nonlocal status, answered
            if message["type"] == "http.response.start":
                status = message["status"]
            answered += len(message.get("body", b""))
            await send(message)

        try:
            try:
                self._check_token(scope)
                body = await self._body(scope, receive)
            except Refusal as refusal:
                await refusal.response()(scope, receive, noted)
                return
            if body is None:
                status = 499  # as nginx says of a client that left before it had said all
                return
            await self.app(scope, _replayed(body, receive), noted)
        finally:
            seconds = time.perf_counter() - start
            path = scope["path"] if scope["path"] in _PATHS else "other"
            self.requests.add(path, status, seconds)
            client = scope.get("client")
            line = {
                "time": time.time(), "client": client and client[0], "method": scope["method"],
                "path": scope["path"], "status": status, "seconds": round(seconds, 4),
                "bytes": answered,
            }  # fmt: skip
            access.info("%s", json.dumps(line))

    def _check_token(self, scope: Scope) -> None:
        if self._token is None or scope["path"] == HEALTH:
            return
        given = next((v for name, v in scope["headers"] if name == b"authorization"), b"")
        scheme, _, found = given.partition(b" ")
        # In constant time: how long it takes must not tell how much of a guess is right.
        same = hmac.compare_digest(found.strip(), self._token)
        if scheme.lower() != b"bearer" or not same:
            raise Refusal(
                401, "a token is needed: send the header Authorization: Bearer TOKEN with the one "
                "that the server was started with", "invalid_api_key",
            )  # fmt: skip

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None if the client left before it had sent it."""
        refusal = Refusal(
            413, f"the body is larger than {self.body_bytes} bytes; send a shorter prompt",
            "body_too_large",
        )  # fmt: skip
        length = next((v for name, v in scope["headers"] if name == b"content-length"), b"0")
        if length.isdigit() and int(length) > self.body_bytes:
            raise refusal
        parts, size, more = [], 0, True
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    more, size = message.get("more_body", False), size + len(parts[-1])
                    if size > self.body_bytes:
                        raise refusal
        except TimeoutError:
            raise Refusal(
                408, f"the body took longer than {BODY_SECONDS:g} seconds; send it again", "slow"
            ) from None
        return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
