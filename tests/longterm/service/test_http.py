"""The HTTP API of a memory, and what stands in front of it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from itertools import pairwise
from typing import get_args, get_type_hints

import httpx
import pytest
from fastapi.testclient import TestClient

from holdfast.longterm.budget import Context
from holdfast.longterm.language.shapes import LLMError
from holdfast.longterm.memory import Memory
from holdfast.longterm.records import Edge, Event, Hit, Item, Link
from holdfast.longterm.retrieval.embed import Hash
from holdfast.longterm.service.http import create_app
from holdfast.longterm.service.http_models import Found, Happened, Packed, Related, Stored
from holdfast.serve.gate import Rates


@pytest.fixture
def memory(tmp_path):
    with Memory(tmp_path / "a.memory", embedder=Hash(32), durability="process") as made:
        yield made


def client_of(memory, **options):
    return TestClient(create_app(memory, **options), raise_server_exceptions=False)


@pytest.fixture
def client(memory):
    return client_of(memory)


def ask(client, method, path, code=200, **body):
    """A reply's document; `user` and other fields go into the query where there is no body."""
    how = "json" if method in ("POST", "PATCH") else "params"
    answer = client.request(method, path, **{how: body})
    assert answer.status_code == code, answer.text
    return answer.json()


def add(client, text="Ann lives in Bern.", **body):
    return ask(client, "POST", "/memories", 201, text=text, **{"user": "ann"} | body)["ids"]


def test_a_memory_from_its_first_day_to_its_last(client):
    (id,) = add(client, metadata={"mood": "good"})
    assert add(client, metadata={"mood": "good"}) == [id]
    (hit,) = ask(client, "POST", "/search", query="Where does Ann live?", user="ann")["hits"]
    assert hit["id"] == id and hit["terms"]["bm25"] == 1.0 and hit["metadata"] == {"mood": "good"}
    assert ask(client, "POST", "/search", query="Ann", user="eve") == {"hits": []}
    new = ask(client, "PATCH", f"/memories/{id}", text="Ann lives in Basel.", user="ann")
    assert new["text"] == "Ann lives in Basel." and new["space"] == "ann"
    assert ask(client, "GET", f"/memories/{id}", user="ann") == new
    then = ask(client, "GET", "/as-of", recorded=hit["recorded_at"], user="ann")["memories"]
    assert [item["text"] for item in then] == ["Ann lives in Bern."]
    context = ask(client, "POST", "/context", query="Ann", budget=40, user="ann")
    assert context["ids"] == [id] and 0 < context["used"] <= 40
    events = ask(client, "GET", f"/memories/{id}/history", user="ann")["events"]
    assert [event["op"] for event in events] == ["add", "touch", "revise"]
    assert ask(client, "DELETE", f"/memories/{id}", user="ann", why="moved") == {"ids": [id]}
    assert ask(client, "GET", f"/memories/{id}", 404, user="ann")["error"]["code"] == "absent"
    assert ask(client, "POST", f"/memories/{id}/purge", user="ann") == {"ids": [id]}
    events = ask(client, "GET", f"/memories/{id}/history", user="ann")["events"]
    assert events[-1]["op"] == "purge" and "Ann" not in json.dumps(events)
    ask(client, "POST", f"/memories/{id}/purge", 404, user="ann")


@pytest.mark.parametrize(
    ("model", "record", "own"),
    [
        (Stored, Item, {"version"}), (Found, Hit, set()), (Happened, Event, set()),
        (Related, Edge, set()), (Packed, Context, set()),
    ],
)  # fmt: skip
def test_what_is_sent_is_what_the_records_hold(model, record, own):
    """The API promises its fields by name; a record that gains one has to decide about it."""
    sent = {name: type(None) in get_args(f.annotation) for name, f in model.model_fields.items()}
    kept = {name: type(None) in get_args(kind) for name, kind in get_type_hints(record).items()}
    assert list(sent.items()) == [one for one in kept.items() if one[0] not in own]


def test_a_page_of_the_past_is_all_that_is_read(client, memory, fetched):
    memory.add([f"fact {number}" for number in range(300)], user_id="ann")

    def page():
        got = ask(client, "GET", "/as-of", user="ann", limit=5, after=100)
        assert [m["text"] for m in got["memories"]] == [f"fact {n}" for n in range(100, 105)]
        assert got["next"] == 105

    assert fetched.of(page) < 20


def test_conversations_pages_and_the_graph(client, memory):
    messages = [{"role": "user", "content": f"Message {i}."} for i in range(25)]
    ids = ask(client, "POST", "/memories", 201, messages=messages, session="s", user="ann")["ids"]
    memory.transact(lambda _: [Link(a, "next", b) for a, b in pairwise(ids)],
                    user_id="ann")  # fmt: skip
    for path in ("/memories", "/as-of", "/graph"):
        seen, edges, after = [], [], 0
        while after is not None:
            page = ask(client, "GET", path, user="ann", limit=10, after=after)
            seen += [item["id"] for item in page["memories"]]
            edges += [(edge["src"], edge["dst"]) for edge in page.get("edges", ())]
            after = page["next"]
        assert seen == ids
        if path == "/graph":
            assert edges == list(pairwise(ids))
    newest = ask(client, "GET", "/memories", user="ann", newest=True, limit=1, kind="turn")
    assert newest["memories"][0]["id"] == ids[-1]
    assert ask(client, "GET", "/memories", user="ann", session="t")["memories"] == []
    add(client, user="eve", tenant="t", agent="a", run="r")
    spaces = ask(client, "GET", "/spaces")["spaces"]
    assert spaces == [
        {"user": "ann", "agent": "", "run": "", "tenant": "", "memories": 25},
        {"user": "eve", "agent": "a", "run": "r", "tenant": "t", "memories": 1},
    ]
    assert ask(client, "GET", "/spaces", limit=1)["next"] == 1
    assert ask(client, "GET", "/stats")["memories"] == 26


DEEP = json.loads("[" * 20 + "]" * 20)
GOOD = {"text": "x"}


@pytest.mark.parametrize(
    "method, path, body, message",
    [
        ("POST", "/memories", {}, "give either text or messages"),
        ("POST", "/memories", {"text": "x", "messages": [{"content": "y"}]}, "either text or"),
        ("POST", "/memories", {"messages": []}, "messages: List should have at least 1"),
        ("POST", "/memories", {"messages": [{"content": "x"}] * 1001}, "at most 1000 items"),
        ("POST", "/memories", {"messages": [{"content": "x", "mood": 1}]}, "Extra inputs"),
        ("POST", "/memories", {"text": " \n"}, "it is blank"),
        ("POST", "/memories", {"text": "x" * 100_001}, "at most 100000 characters"),
        ("POST", "/memories", {"text": "a\x00b"}, "NUL"),
        ("POST", "/memories", {"text": 3}, "text: Input should be a valid string"),
        ("POST", "/memories", GOOD | {"user": "x" * 257}, "user: .*at most 256"),
        ("POST", "/memories", GOOD | {"owner": "x"}, "owner: Extra inputs"),
        ("POST", "/memories", GOOD | {"when": "2024-05-08T13:56:00"}, "timezone"),
        ("POST", "/memories", GOOD | {"when": "0001-01-01T00:00:00+10:00"}, "between 2 and 9998"),
        ("POST", "/memories", GOOD | {"when": "9999-12-31T23:59:59-10:00"}, "between 2 and 9998"),
        ("POST", "/memories", GOOD | {"kind": "No Kind"}, "kind: String should match"),
        ("POST", "/memories", GOOD | {"metadata": {"a": "x" * 70_000}}, "longer than 65536"),
        ("POST", "/memories", GOOD | {"metadata": {"a": DEEP}}, "deeper than 16"),
        ("POST", "/memories", GOOD | {"metadata": {"a": "\x00"}}, "NUL"),
        ("POST", "/memories", GOOD | {"metadata": []}, "valid dictionary"),
        ("POST", "/search", {"query": "x", "limit": 0}, "limit: .*greater than or equal to 1"),
        ("POST", "/search", {"query": "x", "limit": 1001}, "less than or equal to 1000"),
        ("POST", "/search", {}, "query: Field required"),
        ("POST", "/context", {"query": "x", "budget": -1}, "budget"),
        ("GET", "/memories", {"limit": 1001}, "limit"),
        ("GET", "/memories", {"after": 2**64}, "after"),
        ("GET", "/memories", {"user": "\x00"}, "NUL"),
        ("GET", "/as-of", {"valid": "yesterday"}, "valid"),
        ("GET", "/memories/m1", {}, "id: String should match"),
        ("DELETE", "/memories/m1", {}, "id: String should match"),
    ],
)
def test_what_is_wrong_is_said(client, method, path, body, message):
    error = ask(client, method, path, 422, **body)["error"]
    assert re.search(message, error["message"]), error


@pytest.mark.parametrize(
    "content, code, message",
    [
        (b'{"text":', 400, "the body is not JSON"),
        (b"[" * 100_000, 400, ""),
        (b'"\xff"', 400, ""),
        *(
            (b'{"text": "a", "metadata": {"b": ' + b"[" * deep + b"]" * deep + b"}}", code, "")
            for deep, code in ((500, 422), (950, 422), (5_000, 400), (60_000, 400))
        ),
        (b'{"text": "a\\ud800"}', 422, "text: "),
        (b'{"text": "a", "metadata": {"b": "\\udfff"}}', 422, "metadata: "),
        (b'{"text": "a", "metadata": {"\\ud800": 1}}', 422, "metadata"),
        (b'{"text": "a", "metadata": {"b": NaN}}', 422, "metadata: "),
        (b'{"text": "a", "user": "\\ud800"}', 422, "user: "),
        (b"x" * 5_000_000, 413, "larger than 4194304 bytes"),
    ],
)
def test_bodies_that_are_no_json_or_no_text(client, content, code, message):
    answer = client.post("/memories", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == code and message in answer.json()["error"]["message"], answer.text


def test_other_sites_cannot_use_a_browser_of_this_machine(memory):
    local = client_of(memory, hosts=["127.0.0.1"])
    for host in ("localhost:8765", "127.0.0.1", "[::1]:8765"):
        assert local.get("/stats", headers={"Host": host}).status_code == 200
    assert local.get("/stats", headers={"Host": "evil.example"}).status_code == 400
    # A page of another site may send plain text without asking first: it must not be read.
    plain = {"Host": "localhost", "Content-Type": "text/plain"}
    answer = local.post("/memories", content=b'{"text": "x"}', headers=plain)
    assert answer.status_code == 422 and memory.stats()["memories"] == 0
    asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in client_of(memory).options(
        "/search", headers=asked
    ).headers  # fmt: skip
    allowed = client_of(memory, cors=["https://a.example"], token="secret")
    answer = allowed.options("/search", headers=asked)
    assert answer.headers["access-control-allow-origin"] == "https://a.example"
    other = allowed.options("/search", headers=asked | {"Origin": "https://b.example"})
    assert "access-control-allow-origin" not in other.headers


def test_a_token_opens_all_but_the_page_and_health(memory):
    client = client_of(memory, token="secret")
    known = {"Authorization": "Bearer secret"}
    for path in ("/memories", "/stats", "/metrics", "/openapi.json", "/graph", "/nothing"):
        for headers in ({}, {"Authorization": "Bearer secreT"}, {"Authorization": "secret"}):
            assert client.get(path, headers=headers).status_code == 401
    assert client.get("/stats", headers=known).status_code == 200
    assert client.get("/nothing", headers=known).status_code == 404
    assert client.get("/health").json() == {"status": "ok"}
    schema = client.get("/openapi.json", headers=known).json()
    assert schema["paths"]["/search"]["post"]["security"] == [{"HTTPBearer": []}]
    assert {"401", "422", "429"} <= set(schema["paths"]["/search"]["post"]["responses"])


def test_who_comes_too_often_is_told_when_to_come_back(memory):
    client = client_of(memory, token="secret", rate=0.5)
    known = {"Authorization": "Bearer secret"}
    guesses = [
        client.get("/stats", headers={"Authorization": f"Bearer {i}"}).status_code for i in "abc"
    ]
    assert guesses == [401, 429, 429]
    assert client.get("/stats", headers=known).status_code == 200
    answer = client.get("/stats", headers=known)
    assert answer.status_code == 429 and 1 <= int(answer.headers["Retry-After"]) <= 2
    assert answer.json()["error"]["code"] == "rate_limit"
    assert client.get("/health").status_code == 200


def test_token_buckets_by_hand():
    now = [0.0]
    rates = Rates(2.0, 3, callers=2, clock=lambda: now[0])
    assert [rates.take("a") for _ in range(4)] == [0, 0, 0, 0.5]
    now[0] = 0.5
    assert [rates.take("a"), rates.take("a")] == [0.0, 0.5]
    assert rates.take("b") == 0.0 == rates.take("c")
    assert rates.take("a") == 0.0  # dropped as the one used longest ago, so that it is full
    now[0] = 100.0
    assert [rates.take("b") for _ in range(4)] == [0, 0, 0, 0.5]


def test_metrics_count_routes_not_ids(client):
    (id,) = add(client)
    for number in range(3):
        client.get(f"/memories/m{number:020}")
        client.get(f"/nothing/{number}")
    ask(client, "GET", f"/memories/{id}", user="ann")
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if line[0] != "#")
    assert lines['holdfast_http_requests_total{path="/memories/{id}",status="404"}'] == "3"
    assert lines['holdfast_http_requests_total{path="/memories/{id}",status="200"}'] == "1"
    assert lines['holdfast_http_requests_total{path="other",status="404"}'] == "3"
    assert lines["holdfast_memories"] == "1" and lines["holdfast_memory_events_total"] == "1"


def test_a_language_model_that_fails_is_not_the_clients_fault(memory, monkeypatch):
    def fail(*_, **__):
        raise LLMError("no reply")

    monkeypatch.setattr(memory.policy, "write", fail)
    error = ask(client_of(memory), "POST", "/memories", 502, text="x")["error"]
    assert error["message"] == "the language model failed: no reply"


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def test_the_command_serves_a_file_until_it_is_told_to_end(tmp_path):
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "holdfast", "memory", "serve", str(tmp_path / "m"), "--port",
         str(port), "--embedder", "hash"],
        stderr=subprocess.PIPE, text=True, env=os.environ | {"HOLDFAST_TOKEN": "secret"},
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 60
        while True:
            try:
                assert httpx.get(f"{url}/health").json() == {"status": "ok"}
                break
            except httpx.ConnectError:
                assert process.poll() is None and time.monotonic() < end
                time.sleep(0.1)
        assert httpx.post(f"{url}/memories", json=GOOD).status_code == 401
        known = {"Authorization": "Bearer secret"}
        answer = httpx.post(f"{url}/memories", json=GOOD | {"user": "ann"}, headers=known)
        assert answer.status_code == 201
        page = httpx.get(url)
        assert page.status_code == 200 and "default-src 'none'" in page.headers[
            "content-security-policy"
        ]  # fmt: skip
    finally:
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=30)
    assert process.returncode in (0, -signal.SIGTERM)
    assert f"serving sqlite:///{tmp_path / 'm'} at http://127.0.0.1:{port}" in log
    assert '"path": "/memories", "status": 201' in log and "Traceback" not in log
    with Memory(tmp_path / "m") as memory:
        assert memory.search("x", user_id="ann")
