"""A memory over HTTP: a router for any FastAPI app, and the app of `holdfast memory serve`.

Every request names its space; bad input is answered with 4xx and a body that says what to do.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response, Security
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from fastapi.security import HTTPBearer
from starlette.middleware.trustedhost import TrustedHostMiddleware

from holdfast.longterm.language.shapes import LLMError
from holdfast.longterm.memory import Memory
from holdfast.longterm.records import Item, Space
from holdfast.longterm.service.http_models import (
    After,
    Correction,
    Erasure,
    Error,
    Graph,
    History,
    Hits,
    Id,
    Ids,
    Limit,
    Name,
    New,
    Packed,
    Page,
    Prompt,
    Question,
    Spaces,
    Stored,
    When,
)
from holdfast.longterm.service.plain import plain
from holdfast.longterm.store import maintain
from holdfast.serve import errors, metrics
from holdfast.serve.errors import Refusal
from holdfast.serve.gate import BODY_BYTES, HEALTH, Gate, Rates

WEB = Path(__file__).parent / "web"
# The page holds no data: it asks for them with the token that its user types in.
PAGE = {"/": "index.html"} | {f"/{name}": name for name in ("memory.js", "memory.css", "icon.svg")}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def _whose(user: Name = "", agent: Name = "", run: Name = "", tenant: Name = "") -> Space:
    return Space(tenant, user, agent, run)


SpaceOf = Annotated[Space, Depends(_whose)]


_REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": Error, "description": "Bad input."},
    401: {"model": Error, "description": "A token is needed."},
    413: {"model": Error, "description": "The body is too large."},
    422: {"model": Error, "description": "A field is not as it should be."},
    429: {"model": Error, "description": "Too many requests; Retry-After says when to come back."},
}
_ABSENT: dict[int | str, dict[str, Any]] = {
    404: {"model": Error, "description": "There is no such memory in this space."}
}


def router(memory: Memory) -> APIRouter:
    """The API of a memory; each call runs in a thread of its own."""
    api = APIRouter(responses=_REFUSALS, tags=["memory"])

    @api.post("/memories", status_code=201, response_model=Ids)
    def add(new: New) -> dict[str, Any]:
        """Remember a text or messages; what is known already is not stored twice."""
        told = {"when": new.when, "session": new.session, "kind": new.kind,
                "metadata": new.metadata, "space": new.space()}  # fmt: skip
        content = new.text
        if new.messages is not None:
            content = [m.model_dump(exclude_none=True) for m in new.messages]
        return {"ids": memory.add(content, **told)}

    @api.get("/memories", response_model=Page)
    def page(
        space: SpaceOf,
        limit: Limit = 100,
        after: After = 0,
        newest: bool = False,
        kind: Name | None = None,
        session: Name | None = None,
    ) -> dict[str, Any]:
        """A page of current memories, oldest or newest first."""
        return _page(memory.get_all(kind=kind, session=session, limit=limit, after=after,
                                    newest=newest, space=space), limit)  # fmt: skip

    @api.get("/memories/{id}", response_model=Stored, responses=_ABSENT)
    def get(id: Id, space: SpaceOf) -> dict[str, Any]:
        """A memory as it is now."""
        return plain(_current(id, space))

    @api.patch("/memories/{id}", response_model=Stored, responses=_ABSENT)
    def update(id: Id, correction: Correction) -> dict[str, Any]:
        """Correct a memory; what it said before stays in its history."""
        space = correction.space()
        _current(id, space)
        memory.update(id, correction.text, space=space)
        with memory.reading(space=space) as view:
            # A policy may have put another memory in its place.
            return plain(view.versions(id)[-1])

    @api.delete("/memories/{id}", response_model=Ids, responses=_ABSENT)
    def delete(id: Id, space: SpaceOf, why: Name = "deleted") -> dict[str, Any]:
        """Retire a memory: no longer found, still in the history."""
        _current(id, space)
        memory.delete(id, why=why, space=space)
        return {"ids": [id]}

    @api.get("/memories/{id}/history", response_model=History, responses=_ABSENT)
    def history(id: Id, space: SpaceOf) -> dict[str, Any]:
        """All that happened to a memory, oldest first; also to one that is gone."""
        events = memory.history(id, space=space)
        if not events:
            raise _absent(id)
        return {"events": plain(events)}

    @api.post("/memories/{id}/purge", response_model=Ids, responses=_ABSENT)
    def purge(id: Id, erasure: Erasure) -> dict[str, Any]:
        """Erase a memory and all that was made from it, out of the log and the file too."""
        space = erasure.space()
        with memory.reading(space=space) as view:
            known = bool(view.versions(id))
        if not known:
            raise _absent(id)
        return {"ids": memory.purge(id, why=erasure.why, space=space)}

    @api.post("/search", response_model=Hits)
    def search(question: Question) -> dict[str, Any]:
        """The memories that answer a question best, best first."""
        hits = memory.search(
            question.query, limit=question.limit, filters=question.filters or None,
            kinds=question.kinds, valid=question.valid, recorded=question.recorded,
            space=question.space(),
        )  # fmt: skip
        return {"hits": plain(hits)}

    @api.post("/context", response_model=Packed)
    def context(prompt: Prompt) -> dict[str, Any]:
        """Memories for a prompt, as one text of at most `budget` words and marks."""
        return plain(memory.context(prompt.query, prompt.budget, space=prompt.space()))

    @api.get("/as-of", response_model=Page)
    def as_of(
        space: SpaceOf,
        valid: When | None = None,
        recorded: When | None = None,
        limit: Limit = 100,
        after: After = 0,
    ) -> dict[str, Any]:
        """A page of what held in the world at `valid`, as it was known at `recorded`."""
        items = memory.as_of(valid, recorded, limit=limit, after=after, space=space)
        return _page(items, limit)

    @api.get("/graph", response_model=Graph)
    def graph(space: SpaceOf, limit: Limit = 100, after: After = 0) -> dict[str, Any]:
        """A page of memories and all edges that begin at them."""
        with memory.reading(space=space) as view:
            items = view.items(limit=limit, after=after)
            edges = [edge for item in items for edge in view.edges(src=item.id)]
        return {**_page(items, limit), "edges": plain(edges)}

    @api.get("/spaces", response_model=Spaces)
    def spaces(limit: Limit = 100, after: After = 0) -> dict[str, Any]:
        """A page of whose memories are here, and how many."""
        rows = maintain.spaces(memory, limit=limit, after=after)
        return {
            "spaces": [{**plain_space(space), "memories": count} for _, space, count in rows],
            "next": rows[-1][0] if len(rows) == limit else None,
        }

    @api.get("/stats")
    def stats() -> dict[str, Any]:
        """Counts, bytes and what the language model has cost."""
        return memory.stats()

    def _current(id: str, space: Space) -> Item:
        item = memory.get(id, space=space)
        if item is None:
            raise _absent(id)
        return item

    return api


def plain_space(space: Space) -> dict[str, str]:
    return {name: getattr(space, name) for name in ("user", "agent", "run", "tenant")}


def _absent(id: str) -> Refusal:
    return Refusal(
        404, f"there is no memory {id} in this space; GET /memories lists them", "absent"
    )


def _page(items: Sequence[Item], limit: int) -> dict[str, Any]:
    return {
        "memories": plain(items),
        "next": items[-1].position if len(items) == limit else None,
    }


def create_app(
    memory: Memory,
    *,
    token: str | None = None,
    rate: float | None = None,
    cors: Collection[str] = (),
    hosts: Collection[str] | None = None,
    body_bytes: int = BODY_BYTES,
) -> FastAPI:
    """The app of `holdfast memory serve`: the API, a page to browse, health and metrics.

    Args:
        token: what clients send as `Authorization: Bearer TOKEN`; None lets everybody in.
        rate: requests a second of each client, on the average; None is without limit.
        cors: origins whose pages may ask.
        hosts: names under which clients may ask, so that no other site's name can be pointed here.
        body_bytes: of a request at most.
    """
    app = FastAPI(title="Holdfast memory", docs_url=None, redoc_url=None)
    requests = metrics.Requests()

    @app.get(HEALTH, tags=["server"])
    def health() -> dict[str, str]:
        """Whether the store answers."""
        with memory.store.read() as transaction:
            transaction.rows("SELECT 1")
        return {"status": "ok"}

    @app.get("/metrics", tags=["server"], response_class=PlainTextResponse)
    def numbers() -> Response:
        """Numbers in Prometheus' text format."""
        text = "\n".join([*_numbers(memory), *requests.lines()]) + "\n"
        return PlainTextResponse(text, media_type=metrics.CONTENT_TYPE)

    @app.exception_handler(LLMError)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return Refusal(502, f"the language model failed: {error}", "llm").response()

    # The gate asks for the token; this says so in the schema.
    app.include_router(router(memory), dependencies=[Security(HTTPBearer(auto_error=False))])
    for path, name in PAGE.items():
        app.add_api_route(path, _file(WEB / name), include_in_schema=False)
    errors.install(app)
    app.add_middleware(
        Gate, token=token, body_bytes=body_bytes, requests=requests, paths=(*PAGE, "/metrics"),
        public=PAGE, rates=None if rate is None else Rates(rate),
    )  # fmt: skip
    if cors:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(cors), allow_headers=["Authorization"],
            allow_methods=["GET", "POST", "PATCH", "DELETE"],
        )  # fmt: skip
    if hosts is not None:
        local = {"127.0.0.1", "localhost", "::1", "[::1]", *hosts}
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=sorted(local))
    return app


def _file(path: Path) -> Any:
    async def send() -> FileResponse:
        return FileResponse(path, headers=PAGE_HEADERS)

    return send


def _numbers(memory: Memory) -> list[str]:
    counts = memory.stats()
    gauges = {
        "memories": ("Current memories.", counts["memories"]),
        "memory_versions": ("Versions of memories, past ones too.", counts["versions"]),
        "memory_edges": ("Current edges.", counts["edges"]),
        "memory_spaces": ("Spaces.", counts["spaces"]),
        "memory_store_bytes": ("Bytes of the store.", counts["bytes"]["store"]),
        "memory_index_bytes": ("Bytes of indexes in RAM.", counts["bytes"]["index"]),
    }
    llm = counts["llm"] or {}
    totals = {
        "memory_events_total": ("Events in the log.", counts["events"]),
        "llm_calls_total": ("Calls of the language model.", llm.get("calls", 0)),
        "llm_cost_total": ("What they have cost.", llm.get("cost", 0.0)),
    }
    return [*metrics.numbers("gauge", gauges), *metrics.numbers("counter", totals)]
