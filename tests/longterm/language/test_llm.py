import contextlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from holdfast.errors import UsageError
from holdfast.longterm.language import llm as module
from holdfast.longterm.language.llm import (
    FallbackWarning,
    LLMError,
    OpenAI,
    Prompted,
    Replay,
    Rules,
    Scripted,
)
from holdfast.longterm.language.shapes import listing, parse, problem, record

HELLO = [{"role": "user", "content": "hello there"}]
COLOUR = record(colour={"type": "string"}, share={"type": "number", "minimum": 0})


def reply(content, **usage):
    return 200, {"choices": [{"message": {"role": "assistant", "content": content}}]} | (
        {"usage": usage} if usage else {}
    )


@pytest.fixture
def endpoint(monkeypatch):
    """A real server: `answers` is a list of (status, body) or functions of the request."""
    monkeypatch.setattr(module, "_PAUSE", 0.01)
    answers, requests = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, dict(self.headers), body))
            answer = answers.pop(0)
            status, data = answer(body) if callable(answer) else answer
            data = data if isinstance(data, bytes) else json.dumps(data).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            if status == 429:
                self.send_header("Retry-After", "0.02")
            self.end_headers()
            with contextlib.suppress(BrokenPipeError):  # the client gave up
                self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", answers, requests
    server.shutdown()
    thread.join()
    server.server_close()


def test_text_key_and_usage(endpoint):
    url, answers, requests = endpoint
    answers.append(reply("hi", prompt_tokens=12, completion_tokens=3))
    model = OpenAI(url + "/", "small", key="secret", prices=(1.0, 10.0))
    assert model.complete(HELLO) == "hi"
    path, headers, body = requests[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert body == {"model": "small", "messages": HELLO, "temperature": 0}
    used = model.usage
    assert (used.calls, used.prompt_tokens, used.completion_tokens) == (1, 12, 3)
    assert used.cost == pytest.approx((12 * 1 + 3 * 10) / 1e6)
    assert "secret" not in repr(model)


def test_schema_is_sent_and_the_answer_checked(endpoint):
    url, answers, requests = endpoint
    answers.append(reply('{"colour": "red", "share": 0.5}'))
    assert OpenAI(url, "small").complete(HELLO, COLOUR) == {"colour": "red", "share": 0.5}
    form = requests[0][2]["response_format"]["json_schema"]
    assert form["schema"] == COLOUR and form["strict"] is True


def test_one_repair_with_the_reason(endpoint):
    url, answers, requests = endpoint
    answers += [reply('{"colour": "red"}'), reply('```json\n{"colour": "red", "share": 1}\n```')]
    model = OpenAI(url, "small")
    assert model.complete(HELLO, COLOUR) == {"colour": "red", "share": 1}
    assert "lacks 'share'" in requests[1][2]["messages"][-1]["content"]
    assert model.usage.calls == 2
    answers += [reply("no"), reply('{"colour": 1, "share": 1}')]
    with pytest.raises(LLMError, match=r"twice.*\$\.colour is 1, expected string"):
        model.complete(HELLO, COLOUR)


def test_a_server_without_schemas_gets_plain_words_and_is_remembered(endpoint):
    url, answers, requests = endpoint
    refuse = (400, {"error": "response_format is not supported"})
    good = reply('Sure! {"colour": "red", "share": 1} Done.')
    answers += [refuse, refuse, good, good]
    model = OpenAI(url, "small")
    for _ in range(2):
        assert model.complete(HELLO, COLOUR)["colour"] == "red"
    forms = [body.get("response_format", {}).get("type") for *_, body in requests]
    assert forms == ["json_schema", "json_object", None, None]
    assert json.dumps(COLOUR) in requests[3][2]["messages"][0]["content"]


def test_busy_servers_are_asked_again(endpoint):
    url, answers, requests = endpoint
    answers += [(429, {}), (500, {}), reply("hi")]
    model = OpenAI(url, "small")
    assert model.complete(HELLO) == "hi"
    assert len(requests) == 3 and model.usage.calls == 1
    answers += [(503, {"error": "overloaded"})] * 2
    with pytest.raises(LLMError, match=r"answered 503: .*overloaded.*\(2 attempts\)"):
        OpenAI(url, "small", retries=1).complete(HELLO)


@pytest.mark.parametrize(
    "answer, message",
    [
        ((401, {"error": "bad key"}), "answered 401.*bad key"),
        ((400, {"error": "too long"}), "answered 400.*too long"),
        ((200, b"<html>"), "200 without JSON"),
        ((200, {"choices": []}), "sent no message"),
        (reply(None), "sent no text"),
    ],
)
def test_errors_say_what_came_back(endpoint, answer, message):
    url, answers, requests = endpoint
    answers.append(answer)
    with pytest.raises(LLMError, match=message):
        OpenAI(url, "small").complete(HELLO)
    assert len(requests) == 1


def test_timeout_and_dead_server(endpoint):
    url, answers, _ = endpoint

    def slow(body):
        time.sleep(0.5)
        return reply("late")

    answers.append(slow)
    with pytest.raises(LLMError, match=r"no answer within 0\.1 s"):
        OpenAI(url, "small", timeout=0.1).complete(HELLO)
    with pytest.raises(LLMError, match=r"cannot be reached.*is the server running"):
        OpenAI("http://127.0.0.1:9/v1", "small", retries=0).complete(HELLO)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: OpenAI("localhost:80", "m"), "no HTTP address"),
        (lambda: OpenAI("http://x", "m", timeout=0), "timeout=0"),
        (lambda: Scripted(["a"]).complete("hello"), "no conversation"),
        (lambda: Scripted(["a"]).complete([{"role": "robot", "content": "x"}]), "needs a role"),
        (lambda: Replay("/nowhere/at/all"), "no recording"),
        (lambda: problem(1, {"pattern": "x"}), "uses pattern, which is not checked"),
    ],
)
def test_bad_use_is_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_scripted():
    model = Scripted(["one two", {"colour": "red", "share": 1}, LLMError("down")])
    assert model.complete(HELLO) == "one two"
    assert model.complete(HELLO, COLOUR)["share"] == 1
    with pytest.raises(LLMError, match="down"):
        model.complete(HELLO)
    with pytest.raises(LLMError, match="holds 3 replies, this is call 4"):
        model.complete(HELLO)
    assert model.usage.calls == 2 and model.usage.prompt_tokens == 4
    echo = Scripted(lambda messages, schema: messages[-1]["content"].upper())
    assert echo.complete(HELLO) == "HELLO THERE"
    with pytest.raises(LLMError, match="breaks the schema"):
        echo.complete(HELLO, COLOUR)


def test_replay_records_once_and_plays_without_the_model(tmp_path):
    file = tmp_path / "calls.jsonl"
    live = Scripted(["first", {"colour": "red", "share": 1}])
    recorder = Replay(file, live)
    assert recorder.complete(HELLO) == recorder.complete(HELLO) == "first"
    recorder.complete(HELLO, COLOUR)
    assert live.usage.calls == 2 and recorder.usage.calls == 3
    played = Replay(file)
    assert played.complete(HELLO) == "first"
    assert played.complete(HELLO, COLOUR) == {"colour": "red", "share": 1}
    assert played.usage.prompt_tokens == live.usage.prompt_tokens
    with pytest.raises(LLMError, match="has 2 replies, none for this request"):
        played.complete([{"role": "user", "content": "other"}])


def test_replay_survives_a_torn_line(tmp_path):
    file = tmp_path / "calls.jsonl"
    Replay(file, Scripted(["first"])).complete(HELLO)
    other = [{"role": "user", "content": "other"}]
    file.write_text(file.read_text() + '{"request": "ab')
    with pytest.warns(UserWarning, match=r"calls\.jsonl:2 is not a recorded reply"):
        Replay(file, Scripted(["second"])).complete(other)
    with pytest.warns(UserWarning, match=":2 is not"):
        played = Replay(file)
    assert played.complete(HELLO) == "first" and played.complete(other) == "second"


@pytest.mark.parametrize(
    "value, schema, wrong",
    [
        (3, {"type": "integer"}, None),
        (3.0, {"type": "integer"}, None),
        (True, {"type": "integer"}, "expected integer"),
        (True, {"enum": [1]}, "expected one of"),
        (None, {"type": ["string", "null"]}, None),
        ([1, "a"], listing({"type": "integer"}), r"\$\[1\]"),
        ([1], {"type": "array", "minItems": 2}, "at least 2"),
        ([1], {"type": "array", "maxItems": 0}, "at most 0"),
        (1.5, {"type": "number", "maximum": 1}, "at most 1"),
        (float("nan"), {"minimum": 0}, "at least 0"),
        ("x", {"anyOf": [{"type": "null"}, {"enum": ["y"]}]}, "none of 2 alternatives"),
        ({"a": 1, "b": 2}, record(a={}), "has 'b'"),
        ({"a": {"b": 1}}, record(a=record(b={"type": "string"})), r"\$\.a\.b"),
    ],
)
def test_schema(value, schema, wrong):
    found = problem(value, schema)
    assert found is None if wrong is None else re.search(wrong, found)


@pytest.mark.parametrize(
    "text, value",
    [
        ('{"a": 1}', {"a": 1}),
        ("Here:\n```json\n[1, 2]\n```", [1, 2]),
        ('so {not json} but {"a": "}"} yes', {"a": "}"}),
    ],
)
def test_json_in_prose(text, value):
    assert parse(text) == value


def test_no_json_and_no_nan():
    for text in ("nothing", "{'a': 1}", "[NaN]"):
        with pytest.raises(ValueError, match="no JSON"):
            parse(text)


FACT = {
    "statement": "Ann lives in Oslo",
    "subject": "Ann",
    "relation": "lives in",
    "object": "Oslo",
    "quote": "moved to Oslo",
    "valid_from": "2024-03-01",
    "valid_to": None,
    "negated": False,
}


def test_prompted_facts_are_grounded_in_a_quote():
    text = "I moved to Oslo — às vezes. I moved to Oslo."
    invented = FACT | {"quote": "bought a yacht", "object": "yacht"}
    judge = Prompted(Scripted([{"facts": [FACT, invented]}]))
    with pytest.warns(FallbackWarning, match="1 of 2 facts quote what the text lacks"):
        (fact,) = judge.facts(text, speaker="Ann")
    assert text.encode()[fact.start : fact.end].decode() == "moved to Oslo"
    assert fact.relation == "lives_in" and fact.single
    assert fact.valid_from.isoformat() == "2024-03-01T00:00:00+00:00"


def test_prompted_falls_back_visibly():
    judge = Prompted(Scripted(["rubbish"] * 20))
    for call in [
        lambda j: j.facts("I live in Rome", speaker="Ann"),
        lambda j: j.triples("I live in Rome", speaker="Ann"),
        lambda j: j.keywords("hiking in the mountains", 2),
        lambda j: j.summarise(["A b c. D e f g."], 3),
        lambda j: j.judge("Where is Ann?", "Ann is in Rome"),
        lambda j: j.judge("Where is Ann?", ["Ann is in Rome", "No"]),
        lambda j: j.relate("Ann likes tea", "Ann hates tea"),
        lambda j: j.same("Ann likes tea", "Ann likes tea"),
        lambda j: j.contradicts("Ann likes tea", "Ann hates tea"),
        lambda j: j.update("Ann likes tea", "Ann hates tea"),
    ]:
        with pytest.warns(FallbackWarning, match="breaks the schema"):
            got = call(judge)
        assert got and got == call(Rules())


def test_prompted_uses_the_model():
    judge = Prompted(
        Scripted(
            [
                {"keywords": ["tea", "tea", " "]},
                {"summary": "one two three four. Five."},
                {"score": 0.25},
                {"index": 1},
                {"relation": "None"},
                {"answer": True},
                {"operation": "DELETE"},
            ]
        )
    )
    assert judge.keywords("x", 3) == ["tea"]
    assert judge.summarise(["x"], 2) == "Five."  # over the budget: cut by sentences
    assert judge.judge("q", "t") == 0.25
    assert judge.judge("q", ["a", "b"]) == "b"
    assert judge.relate("a", "b") is None
    assert judge.same("a", "b") is True
    assert judge.update("a", "b") == "DELETE"
    assert judge.llm.usage.calls == 7


def test_an_index_out_of_range_is_nonsense():
    judge = Prompted(Scripted([{"index": 9}]))
    with pytest.warns(FallbackWarning, match="at most 1"):
        assert judge.judge("tea", ["coffee", "tea"]) == "tea"
