"""What clients of the OpenAI API send and get: completions and chat completions, whole or streamed.

What would change an answer and is not supported is refused; nothing is ignored in silence.
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from holdfast.context.answer import Answer
from holdfast.context.sampling import Sampler
from holdfast.longterm.recollection import Recollection
from holdfast.longterm.records import Space
from holdfast.serve import errors
from holdfast.serve.engine import Engine, Job, Reason, Stopped
from holdfast.serve.errors import Refusal
from holdfast.serve.text import Text

# Tokens of an answer where a client does not say; the first is OpenAI's own number.
COMPLETION_TOKENS, CHAT_TOKENS = 16, 1024
# Characters at the end of a prompt from which the length of its answer is guessed.
SOURCE = 4096
# Values of fields that ask for nothing beyond a plain answer.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "presence_penalty": (0, 0.0), "frequency_penalty": (0, 0.0),
    "logprobs": (False,), "top_logprobs": (), "logit_bias": ({},), "echo": (False,),
    "suffix": ("",), "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
    "function_call": ("none", "auto"), "response_format": ({"type": "text"},),
}  # fmt: skip
# Of no effect on an answer; `user` names whose memories are meant where there is a memory.
_IGNORED = ("metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
            "parallel_tool_calls")  # fmt: skip


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class Ask(BaseModel):
    """What both kinds of request have in common."""

    model_config = ConfigDict(extra="forbid")
    model: str
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=256)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_supported(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, plain in _PLAIN.items():
            value = data.get(name)
            same = any(type(value) is type(known) and value == known for known in plain)
            if value is not None and not same:
                raise ValueError(f"{name} is not supported by this server; leave it out")
        return {key: x for key, x in data.items() if key not in _PLAIN and key not in _IGNORED}

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, stop: Any) -> list[str]:
        found = [stop] if isinstance(stop, str) else stop or []
        if len(found) > 4 or any(not s for s in found):
            raise ValueError("stop takes up to 4 strings, none of them empty")
        return found

    def sampler(self) -> Sampler:
        temperature = 1.0 if self.temperature is None else self.temperature
        # Below this, logits divided by it are beyond what fp32 can hold.
        temperature = 0.0 if temperature < 1e-5 else temperature
        return Sampler(temperature, 1.0 if self.top_p is None else self.top_p, self.seed)


class CompletionAsk(Ask):
    prompt: str | list[int] | list[str]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part]

    @model_validator(mode="before")
    @classmethod
    def _drop_what_is_empty(cls, data: Any) -> Any:
        # Clients send answers back as they got them, with fields that hold nothing.
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None}

    def plain(self) -> dict[str, str]:
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatAsk(Ask):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None


@dataclass
class Served:
    """A model under a name, with the engine that runs it, and what it remembers of its users."""

    name: str
    engine: Engine
    text: Text
    created: int
    past: Recollection | None = None


class Delivery:
    """One request on its way: the engine's thread gives text, an event loop takes it."""

    def __init__(
        self, served: Served, ask: Ask, request: Request, ids: list[int], *, shared: int = 0,
        source: str, wanted: int | None, default: int,
    ):  # fmt: skip
        output = served.engine.sizes.output(len(ids), wanted, default)
        self._answer = Answer(served.text.decoder, ask.stop or ())
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[tuple[str, Reason | None]] = asyncio.Queue()
        self._engine = served.engine
        self.reason: Reason | None = None
        self.job = Job(ids, output, ask.sampler(), self._on_token, self._on_end,
                       source[-SOURCE:], shared)  # fmt: skip
        served.engine.submit(self.job)
        self._watcher = asyncio.create_task(self._watch(request))

    def _on_token(self, token: int) -> bool:
        piece = self._answer.add(token)
        if piece:
            self._give(piece, None)
        return self._answer.stopped

    def _on_end(self, reason: Reason) -> None:
        self._give(self._answer.rest(), reason)

    def _give(self, piece: str, reason: Reason | None) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, (piece, reason))

    async def pieces(self) -> AsyncIterator[str]:
        """Text as it comes, until the end."""
        try:
            while self.reason is None:
                piece, self.reason = await self._pieces.get()
                if piece:
                    yield piece
        finally:
            self._watcher.cancel()
            self._engine.cancel(self.job)

    async def _watch(self, request: Request) -> None:
        """A client that goes away ends its request, which frees what it held."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._engine.cancel(self.job)

    def failure(self) -> Refusal | None:
        """Why there is no whole answer, or None."""
        if self.reason == "error":
            return Refusal(500, "the model failed on this request; the log says why", "failed")
        if self.reason in ("cancelled", "shutdown"):
            return errors.of(Stopped("the server is shutting down; ask again later"))
        return None

    def usage(self) -> dict[str, Any]:
        prompt, produced = len(self.job.ids), len(self.job.produced)
        shared = 0 if self.job.prefix is None else self.job.prefix.length
        return {
            "prompt_tokens": prompt, "completion_tokens": produced,
            "total_tokens": prompt + produced, "prompt_tokens_details": {"cached_tokens": shared},
        }  # fmt: skip


def router(served: Served) -> APIRouter:
    """`/v1/models`, `/v1/completions` and `/v1/chat/completions`."""
    api = APIRouter(prefix="/v1")
    card = {"id": served.name, "object": "model", "created": served.created,
            "owned_by": "holdfast"}  # fmt: skip

    def encoded(encode: Callable[[Any], Any], given: Any) -> Awaitable[Any]:
        return asyncio.get_running_loop().run_in_executor(served.text.worker, encode, given)

    def check_name(name: str) -> None:
        if name != served.name:
            raise Refusal(
                404, f"there is no model {name!r} here; this server has {served.name!r}",
                "model_not_found", param="model",
            )  # fmt: skip

    @api.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @api.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        check_name(name)
        return card

    @api.post("/completions")
    async def completions(ask: CompletionAsk, request: Request):
        check_name(ask.model)
        prompt: Any = ask.prompt
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str):
            if len(prompt) > 1:
                raise Refusal(400, "one prompt at a time; send a request for each",
                              "unsupported", param="prompt")  # fmt: skip
            prompt = prompt[0]
        if isinstance(prompt, str):
            _short_enough(prompt, served)
            ids = await encoded(served.text.prompt, prompt)
        else:
            ids = prompt
            served.text.check(ids)
        source = prompt if isinstance(prompt, str) else ""
        delivery = Delivery(served, ask, request, ids, source=source, wanted=ask.max_tokens,
                            default=COMPLETION_TOKENS)  # fmt: skip
        return await _respond(delivery, ask, served, chat=False)

    @api.post("/chat/completions")
    async def chat_completions(ask: ChatAsk, request: Request):
        check_name(ask.model)
        messages = [message.plain() for message in ask.messages]
        kept = None
        if served.past is not None and messages[-1]["role"] == "user":
            kept = await _recall(served.past, messages, ask.user or "")
        source = "\n".join(message["content"] for message in messages)
        _short_enough(source, served)
        ids, shared = await encoded(served.text.chat, messages)
        wanted = ask.max_completion_tokens or ask.max_tokens
        delivery = Delivery(served, ask, request, ids, shared=shared, source=source,
                            wanted=wanted, default=CHAT_TOKENS)  # fmt: skip
        return await _respond(delivery, ask, served, chat=True, kept=kept)

    return api


def _short_enough(text: str, served: Served) -> None:
    """Refuse at once what can only be far too long: tokenizing it takes time and memory."""
    longest = served.engine.sizes.longest
    most = 64 * longest
    if len(text) > most:
        raise Refusal(
            400, f"the prompt has {len(text)} characters, at most {longest} tokens "
            "are possible; shorten it", "context_length_exceeded",
        )  # fmt: skip


@dataclass
class _Kept:
    """What is remembered of a request once it has been answered."""

    past: Recollection
    text: str
    session: str
    space: Space
    ids: tuple[str, ...]

    async def add(self, reply: str) -> None:
        await asyncio.to_thread(self.past.keep, self.text, reply, self.session, self.space)


async def _recall(past: Recollection, messages: list[dict[str, str]], user: str) -> _Kept:
    """Put memories before the last message."""
    text, space = messages[-1]["content"], Space(user=user)
    first = next(i for i, message in enumerate(messages) if message["role"] == "user")
    session = past.session([message["content"] for message in messages[: first + 1]])
    context = await asyncio.to_thread(past.recall, text, space)
    messages[-1] = {**messages[-1], "content": past.before(context, text)}
    return _Kept(past, text, session, space, context.ids)


async def _respond(
    delivery: Delivery, ask: Ask, served: Served, *, chat: bool, kept: _Kept | None = None
):
    kind = "chat.completion" if chat else "text_completion"
    head = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
        "created": int(time.time()), "model": served.name,
    }  # fmt: skip
    if ask.stream:
        head["object"] = f"{kind}.chunk" if chat else kind
        with_usage = ask.stream_options is not None and ask.stream_options.include_usage
        events = _events(delivery, head, chat, with_usage, kept)
        return StreamingResponse(events, media_type="text/event-stream",
                                 headers={"Cache-Control": "no-cache"})  # fmt: skip
    text = "".join([piece async for piece in delivery.pieces()])
    failure = delivery.failure()
    if failure is not None:
        raise failure
    content = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    choice = {"index": 0, **content, "finish_reason": delivery.reason, "logprobs": None}
    if kept is not None:
        await kept.add(text)
        head["memories"] = kept.ids
    return JSONResponse({**head, "object": kind, "choices": [choice], "usage": delivery.usage()})


async def _events(
    delivery: Delivery, head: dict[str, Any], chat: bool, with_usage: bool, kept: _Kept | None
) -> AsyncIterator[str]:
    """Server-sent events of a streamed answer."""

    def event(content: dict[str, Any], reason: str | None = None) -> str:
        own = {"delta": content} if chat else {"text": content.get("content", "")}
        choice = {"index": 0, **own, "finish_reason": reason, "logprobs": None}
        usage = {"usage": None} if with_usage else {}
        return _line({**head, "choices": [choice], **usage})

    if chat:
        yield event({"role": "assistant", "content": ""})
    reply = []
    async for piece in delivery.pieces():
        reply.append(piece)
        yield event({"content": piece})
    failure = delivery.failure()
    if failure is not None:
        yield _line(failure.body())
        return
    if kept is not None:
        await kept.add("".join(reply))
    yield event({}, delivery.reason)
    if with_usage:
        yield _line({**head, "choices": [], "usage": delivery.usage()})
    yield "data: [DONE]\n\n"


def _line(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n"
