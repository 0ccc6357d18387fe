"""In front of a server: token, rates and sizes of requests, and the log."""

import asyncio
import hmac
import json
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from holdfast.serve import metrics
from holdfast.serve.errors import Refusal

BODY_BYTES, BODY_SECONDS = 4 << 20, 30.0
# Whoever watches over the server asks this without a token.
HEALTH = "/health"

access = logging.getLogger("holdfast.serve.access")


class Rates:
    """Token buckets: each caller may send `rate` requests a second, and `burst` at once.

    Args:
        callers: buckets that are held at most; those used longest ago are dropped, and full again.
    """

    def __init__(
        self,
        rate: float,
        burst: int | None = None,
        *,
        callers: int = 10_000,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.rate, self.burst = rate, max(1, math.ceil(2 * rate)) if burst is None else burst
        self._callers, self._clock = callers, clock
        self._buckets: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, caller: Hashable) -> float:
        """Seconds until the caller may send; 0.0 if it may now, which is then counted."""
        now = self._clock()
        with self._lock:
            left, then = self._buckets.pop(caller, (float(self.burst), now))
            left = min(float(self.burst), left + (now - then) * self.rate)
            wait = 0.0 if left >= 1 else (1 - left) / self.rate
            self._buckets[caller] = (left if wait else left - 1, now)
            if len(self._buckets) > self._callers:
                self._buckets.popitem(last=False)
        return wait


class Gate:
    """Lets in who has the token and sends no more than is allowed, and writes the log.

    Args:
        token: what clients must send; None lets everybody in.
        body_bytes: of a request at most.
        paths: paths that are counted by name even where no route was asked; others count under
            their route, or as one, or clients could fill the memory.
        public: paths that need no token, besides `HEALTH`.
        rates: how often a client may come, with the token and without; None is without limit.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        token: str | None,
        body_bytes: int,
        requests: metrics.Requests,
        paths: Collection[str] = (),
        public: Collection[str] = (),
        rates: Rates | None = None,
    ):
        self.app, self.body_bytes, self.requests = app, body_bytes, requests
        self._token = None if token is None else token.encode()
        self._public = {HEALTH, *public}
        self._paths, self._rates = {HEALTH, *paths}, rates

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
                self._check_caller(scope)
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
            path = scope["path"]
            if path not in self._paths:
                path = getattr(scope.get("route"), "path", "other")
            self.requests.add(path, status, seconds)
            client = scope.get("client")
            line = {
                "time": time.time(), "client": client and client[0], "method": scope["method"],
                "path": scope["path"], "status": status, "seconds": round(seconds, 4),
                "bytes": answered,
            }  # fmt: skip
            access.info("%s", json.dumps(line))

    def _check_caller(self, scope: Scope) -> None:
        if scope["path"] == HEALTH:
            return
        known = self._has_token(scope)
        client = scope.get("client")
        # Whoever guesses tokens shares one bucket, however many it tries.
        wait = self._rates.take((client and client[0], known)) if self._rates else 0.0
        if wait:
            raise Refusal(
                429, f"more than {self._rates.rate:g} requests a second; come back in "  # type: ignore[union-attr]
                f"{wait:.1f} seconds", "rate_limit", retry=math.ceil(wait),
            )  # fmt: skip
        if not known and scope["path"] not in self._public:
            raise Refusal(
                401, "a token is needed: send the header Authorization: Bearer TOKEN with the one "
                "that the server was started with", "invalid_api_key",
            )  # fmt: skip

    def _has_token(self, scope: Scope) -> bool:
        if self._token is None:
            return True
        given = next((v for name, v in scope["headers"] if name == b"authorization"), b"")
        scheme, _, found = given.partition(b" ")
        # In constant time: how long it takes must not tell how much of a guess is right.
        same = hmac.compare_digest(found.strip(), self._token)
        return scheme.lower() == b"bearer" and same

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None if the client left before it had sent it."""
        refusal = Refusal(
            413, f"the body is larger than {self.body_bytes} bytes; send less at once",
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
