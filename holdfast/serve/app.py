"""The HTTP server: token, limits, errors, metrics and the log around what rooms offer."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse, Response

from holdfast.serve import errors, metrics
from holdfast.serve.errors import Refusal
from holdfast.serve.gate import BODY_BYTES, HEALTH, Gate
from holdfast.serve.openai_api import Served, router

_PATHS = ("/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")


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
    app.add_middleware(
        Gate, token=token, body_bytes=body_bytes, requests=requests, paths=_PATHS
    )  # fmt: skip
    return app
