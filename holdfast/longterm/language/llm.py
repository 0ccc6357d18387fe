"""Language models that policies may call: an endpoint, a script or a recording; all optional.

`complete` is the free form. Policies use the typed calls of `Judgement` instead, which `Rules`
implements without any model and `Prompted` with one.
"""

import hashlib
import json
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from holdfast.errors import UsageError
from holdfast.longterm.language.judgement import (
    APPEND,
    DELETE,
    PASS,
    RELATIONS,
    REPLACE,
    FallbackWarning,
    Judgement,
    Rules,
)
from holdfast.longterm.language.prompted import Prompted
from holdfast.longterm.language.shapes import LLMError, parse, problem

if TYPE_CHECKING:
    import httpx

__all__ = [
    "APPEND",
    "DELETE",
    "LLM",
    "PASS",
    "RELATIONS",
    "REPLACE",
    "FallbackWarning",
    "Judgement",
    "LLMError",
    "OpenAI",
    "Prompted",
    "Replay",
    "Rules",
    "Scripted",
    "Usage",
]

Messages = Sequence[Mapping[str, str]]
_ROLES = ("system", "user", "assistant")
_PAUSE, _LONGEST_PAUSE = 0.5, 20.0  # seconds


@dataclass
class Usage:
    """What a model was asked so far; `cost` stays 0.0 where no prices are known."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, prompt_tokens: int, completion_tokens: int, cost: float = 0.0) -> None:
        """Count one answered call."""
        with self._lock:
            self.calls += 1
            self.prompt_tokens += prompt_tokens
            self.completion_tokens += completion_tokens
            self.cost += cost


class LLM(Protocol):
    """Anything that completes a chat."""

    usage: Usage

    def complete(
        self, messages: Messages, schema: Mapping[str, Any] | None = None
    ) -> str | dict[str, Any]:
        """The reply: text, or with a `schema` the JSON value that satisfies it.

        Args:
            messages: dicts with `role` (system, user, assistant) and `content`.

        Raises:
            LLMError: no reply, or none that satisfies the schema.
        """
        ...


class OpenAI:
    """A model behind any endpoint that speaks OpenAI's `/chat/completions`.

    Asks for JSON by schema; a server that refuses gets a JSON object, then plain text, and what
    worked is remembered. A reply that breaks the schema is sent back once with the reason. Answers
    429 and 5xx are repeated after a pause. Tokens are those the server reports.

    Args:
        base_url: up to and including the version, for example http://localhost:8000/v1.
        key: sent as a bearer token.
        timeout: seconds for one request.
        retries: repetitions of a request that the server was too busy for.
        prices: dollars for a million prompt tokens and a million completion tokens.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        key: str | None = None,
        timeout: float = 60.0,
        *,
        retries: int = 2,
        prices: tuple[float, float] | None = None,
    ):
        if not base_url.startswith(("http://", "https://")):
            raise UsageError(
                f"base_url={base_url!r} is no HTTP address; give one such as "
                "http://localhost:8000/v1"
            )
        if timeout <= 0 or retries < 0:
            raise UsageError(f"timeout={timeout} must be positive and retries={retries} at least 0")
        self.url = base_url.rstrip("/") + "/chat/completions"
        self.model, self.timeout, self.retries, self.prices = model, timeout, retries, prices
        self.usage = Usage()
        self._key = key
        self._mode = 0  # index into _MODES of the strictest form that this server accepts

    def __repr__(self) -> str:
        return f"OpenAI({self.url!r}, {self.model!r})"

    def complete(
        self, messages: Messages, schema: Mapping[str, Any] | None = None
    ) -> str | dict[str, Any]:
        messages = _checked(messages)
        if schema is None:
            return self._text(self._post(self._body(messages)))
        problem({}, schema)  # a schema that cannot be checked is the caller's mistake
        reply = self._ask(messages, schema)
        value, wrong = _read(reply, schema)
        if wrong is None:
            return value
        repair = [
            *messages,
            {"role": "assistant", "content": reply},
            {"role": "user", "content": f"Not valid: {wrong}. Send only the corrected JSON."},
        ]
        value, wrong = _read(self._ask(repair, schema), schema)
        if wrong is None:
            return value
        raise LLMError(f"{self.model} sent twice what the schema refuses: {wrong}")

    def _ask(self, messages: list[dict[str, str]], schema: Mapping[str, Any]) -> str:
        for mode in range(self._mode, len(_MODES)):
            try:
                reply = self._text(self._post(_MODES[mode](self._body(messages), schema)))
            except _Refused:
                if mode + 1 == len(_MODES):
                    raise
                continue
            self._mode = mode
            return reply
        raise AssertionError("the last form either answers or raises")

    def _body(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        return {"model": self.model, "messages": messages, "temperature": 0}

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        import httpx

        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        for attempt in range(self.retries + 1):
            pause = _PAUSE * 2**attempt
            try:
                response = httpx.post(self.url, json=body, headers=headers, timeout=self.timeout)
            except httpx.TimeoutException:
                raise LLMError(
                    f"{self.url} sent no answer within {self.timeout:g} s; raise timeout= or use a "
                    "faster model"
                ) from None
            except httpx.HTTPError as error:
                failed = f"{self.url} cannot be reached: {error}; is the server running?"
            else:
                if response.status_code == 200:
                    return self._counted(response)
                failed = f"{self.url} answered {response.status_code}: {response.text[:300]}"
                if response.status_code in (400, 415, 422, 501):
                    raise _Refused(failed)
                if response.status_code != 429 and response.status_code < 500:
                    raise LLMError(failed)
                pause = max(pause, _retry_after(response))
            if attempt < self.retries:
                time.sleep(min(pause, _LONGEST_PAUSE))
        raise LLMError(f"{failed} ({self.retries + 1} attempts)")

    def _counted(self, response: "httpx.Response") -> dict[str, Any]:
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise LLMError(f"{self.url} answered 200 without JSON: {response.text[:120]!r}")
        used = answer.get("usage") or {}
        spent = [int(used.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        cost = sum(n * price for n, price in zip(spent, self.prices or (0, 0), strict=True)) / 1e6
        self.usage.add(*spent, cost)
        return answer

    def _text(self, answer: dict[str, Any]) -> str:
        try:
            text = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise LLMError(f"{self.url} sent no message: {json.dumps(answer)[:200]}") from None
        if not isinstance(text, str):
            raise LLMError(f"{self.model} sent no text: {json.dumps(answer['choices'][0])[:200]}")
        return text


class Scripted:
    """A model that answers from a list, in order, or by a function of (messages, schema).

    An exception in the list is raised. Tokens are counted in words.
    """

    def __init__(
        self,
        replies: Iterable[str | dict[str, Any] | Exception]
        | Callable[[Messages, Mapping[str, Any] | None], str | dict[str, Any]],
    ):
        self.usage = Usage()
        self.requests: list[list[dict[str, str]]] = []
        self._call = replies if callable(replies) else None
        self._list = [] if callable(replies) else list(replies)

    def complete(
        self, messages: Messages, schema: Mapping[str, Any] | None = None
    ) -> str | dict[str, Any]:
        messages = _checked(messages)
        self.requests.append(messages)
        if self._call is not None:
            reply = self._call(messages, schema)
        elif len(self.requests) <= len(self._list):
            reply = self._list[len(self.requests) - 1]
        else:
            raise LLMError(
                f"the script holds {len(self._list)} replies, this is call {len(self.requests)}"
            )
        if isinstance(reply, Exception):
            raise reply
        words = [sum(len(m["content"].split()) for m in messages), len(str(reply).split())]
        self.usage.add(*words)
        if schema is None:
            return reply
        value, wrong = _read(reply, schema)
        if wrong is not None:
            raise LLMError(f"the scripted reply breaks the schema: {wrong}")
        return value


class Replay:
    """Replies recorded in a JSON Lines file, by hash of the request.

    A request that the file lacks goes to `llm` and is appended in one write; without `llm` it
    raises. A replayed call counts as a call, with the tokens that it took when recorded.
    """

    def __init__(self, file: str | os.PathLike[str], llm: LLM | None = None):
        self.path, self.llm, self.usage = Path(file), llm, Usage()
        self._replies: dict[str, dict[str, Any]] = {}
        self._torn = False
        if self.path.exists():
            self._load()
        elif llm is None:
            raise UsageError(f"no recording at {self.path}; pass llm= to record one")

    def _load(self) -> None:
        text = self.path.read_text()
        # A crash may leave half a line: the next append must not continue it.
        self._torn = bool(text) and not text.endswith("\n")
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                self._replies[entry["request"]] = entry
            except (ValueError, KeyError, TypeError):
                warnings.warn(
                    f"{self.path}:{number} is not a recorded reply; skipped", stacklevel=3
                )

    def complete(
        self, messages: Messages, schema: Mapping[str, Any] | None = None
    ) -> str | dict[str, Any]:
        messages = _checked(messages)
        request = json.dumps([messages, schema], sort_keys=True, ensure_ascii=False)
        digest = hashlib.sha256(request.encode()).hexdigest()
        if digest not in self._replies:
            self._replies[digest] = self._record(digest, messages, schema)
        entry = self._replies[digest]
        self.usage.add(entry["prompt_tokens"], entry["completion_tokens"], entry["cost"])
        return entry["reply"]

    def _record(
        self, digest: str, messages: Messages, schema: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        if self.llm is None:
            raise LLMError(
                f"{self.path} has {len(self._replies)} replies, none for this request "
                f"({digest[:12]}); record it with llm="
            )
        used = self.llm.usage
        before = used.prompt_tokens, used.completion_tokens, used.cost
        reply = self.llm.complete(messages, schema)
        entry = {
            "request": digest,
            "reply": reply,
            "prompt_tokens": used.prompt_tokens - before[0],
            "completion_tokens": used.completion_tokens - before[1],
            "cost": used.cost - before[2],
        }
        line = ("\n" if self._torn else "") + json.dumps(entry, ensure_ascii=False) + "\n"
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)
        self._torn = False
        return entry


class _Refused(LLMError):
    """The server understood the request and does not want it in this form."""


def _by_schema(body: dict[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    form = {"name": "reply", "schema": schema, "strict": _strict(schema)}
    return body | {"response_format": {"type": "json_schema", "json_schema": form}}


def _by_object(body: dict[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    return _by_words(body, schema) | {"response_format": {"type": "json_object"}}


def _by_words(body: dict[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    rule = "Reply only with JSON that satisfies this schema:\n" + json.dumps(schema)
    return body | {"messages": [{"role": "system", "content": rule}, *body["messages"]]}


_MODES = (_by_schema, _by_object, _by_words)


def _strict(schema: Any) -> bool:
    """Whether OpenAI's strict mode takes it: each object closed, each property required."""
    if isinstance(schema, list):
        return all(map(_strict, schema))
    if not isinstance(schema, Mapping):
        return True
    if schema.get("type") == "object" and (
        schema.get("additionalProperties") is not False
        or set(schema.get("required", [])) != set(schema.get("properties", {}))
    ):
        return False
    return all(map(_strict, schema.values()))


def _read(reply: Any, schema: Mapping[str, Any]) -> tuple[Any, str | None]:
    """The value of a reply, and what is wrong with it."""
    if isinstance(reply, str):
        try:
            reply = parse(reply)
        except ValueError as error:
            return None, str(error)
    return reply, problem(reply, schema)


def _checked(messages: Messages) -> list[dict[str, str]]:
    if isinstance(messages, str | Mapping) or not messages:
        raise UsageError(
            f"messages={messages!r:.80} is no conversation; pass "
            '[{"role": "user", "content": "..."}]'
        )
    for one in messages:
        if one.get("role") not in _ROLES or not isinstance(one.get("content"), str):
            raise UsageError(
                f"message {one!r:.80} needs a role among {', '.join(_ROLES)} and a text content"
            )
    return [{"role": one["role"], "content": one["content"]} for one in messages]


def _retry_after(response: "httpx.Response") -> float:
    try:
        return float(response.headers.get("retry-after", 0))
    except ValueError:  # the header's other form, a date
        return 0.0
