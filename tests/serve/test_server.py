"""The official client against a server on the loopback."""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch

from holdfast.checks import tinylm
from holdfast.checks.serving import NAME, serving
from holdfast.context.cache.conformance import model as untrained
from holdfast.training.tokenizers import byte_tokenizer

PROMPT = "def read(self):\n"
TOKEN = "a secret"
# Of tinylm's keys and values, per token.
UNIT = 1024


@pytest.fixture(scope="module")
def net():
    return tinylm.trained()


@pytest.fixture(scope="module")
def server(net):
    with serving(net, 600 * UNIT, token=TOKEN, prefix_budget=150 * UNIT) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=TOKEN, max_retries=0) as found:
        yield found


def alone(net, text, new):
    """What the model says greedily, without a server."""
    ids = torch.tensor([list(text.encode())])
    with torch.no_grad():
        out = net.generate(ids, max_new_tokens=new, do_sample=False, use_cache=True)
    return bytes(out[0, ids.shape[1] :].tolist()).decode()


def complete(client, prompt=PROMPT, **options):
    options = {"temperature": 0, "max_tokens": 24} | options
    return client.completions.create(model=NAME, prompt=prompt, **options)


def test_a_completion_is_what_the_model_says_alone(net, client):
    found = complete(client)
    assert found.choices[0].text == alone(net, PROMPT, 24)
    assert found.choices[0].finish_reason == "length"
    usage = found.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (16, 24, 40)
    assert len(complete(client, max_tokens=None).choices[0].text) == 16
    assert complete(client, list(PROMPT.encode())).choices[0].text == found.choices[0].text
    assert [m.id for m in client.models.list()] == [client.models.retrieve(NAME).id] == [NAME]


def test_streams_give_the_same_text_in_pieces(net, client):
    events = list(complete(client, stream=True, stream_options={"include_usage": True}))
    pieces = [event.choices[0].text for event in events if event.choices]
    assert "".join(pieces) == alone(net, PROMPT, 24) and len(pieces) > 20
    assert events[-1].usage.completion_tokens == 24 and not events[-1].choices
    assert events[-2].choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_an_answer_and_are_not_in_it(net, client, stream):
    whole = alone(net, PROMPT, 24)
    stop = whole[9:12]
    found = complete(client, stop=["never there", stop], stream=stream)
    if stream:
        choices = [event.choices[0] for event in found]
        text, reason = "".join(c.text for c in choices), choices[-1].finish_reason
    else:
        text, reason = found.choices[0].text, found.choices[0].finish_reason
    assert text == whole[: whole.index(stop)] and reason == "stop"


def test_seeds_temperature_and_top_p(net, client):
    def draw(**options):
        return complete(client, temperature=1.5, **options).choices[0].text

    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    assert len({draw() for _ in range(4)}) > 1
    assert draw(seed=3, top_p=1e-6) == alone(net, PROMPT, 24)


def test_chats_share_their_system_prompt(client, server):
    def say(text, system="You finish lines of Python and say nothing else."):
        return client.chat.completions.create(
            model=NAME, temperature=0, max_tokens=12,
            messages=[{"role": "system", "content": system}, {"role": "user", "content": text}],
        )  # fmt: skip

    first, second, again = say("import"), say("def f"), say("import")
    assert first.choices[0].message.role == "assistant"
    assert again.choices[0].message.content == first.choices[0].message.content
    shared = [r.usage.prompt_tokens_details.cached_tokens for r in (first, second, again)]
    assert shared[0] == shared[1] == shared[2] > 48
    assert server.engine.prefixes.nbytes() == shared[0] * UNIT
    # Whoever shares nothing gets the same answer.
    text = "system: You finish lines of Python and say nothing else.\nuser: import\nassistant:"
    assert complete(client, text, max_tokens=12).choices[0].text == first.choices[0].message.content
    streamed = client.chat.completions.create(
        model=NAME, temperature=0, max_completion_tokens=12, stream=True,
        messages=[{"role": "user", "content": [{"type": "text", "text": "import"}]}],
    )  # fmt: skip
    assert next(iter(streamed)).choices[0].delta.role == "assistant"
    assert all(event.choices[0].delta.role is None for event in streamed)


def test_templates_are_used_where_the_model_has_their_tokens():
    net = untrained(vocab_size=264)
    with serving(net, 1 << 20, tokenizer=byte_tokenizer()) as server:
        ids, shared = server.text.chat([
            {"role": "system", "content": "short"}, {"role": "user", "content": "hi"}
        ])  # fmt: skip
        begin = server.text.tokenizer("<|system|>short<|eos|><|user|>")["input_ids"]
        assert ids[:shared] == begin and server.text.ends == {257}
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
            messages = [{"role": "user", "content": "é"}]
            found = client.chat.completions.create(model=NAME, messages=messages, max_tokens=40)
            # An untrained model says bytes that are no characters: they never stop a stream.
            assert found.usage.prompt_tokens == 5 and found.choices[0].message.content


def test_many_clients_wait_for_room_and_all_get_their_own_answer(net):
    prompts = [f"class {name}:\n    def " for name in "ABCDEFGHIJKL"]
    want = [alone(net, prompt, 20) for prompt in prompts]
    with serving(net, 200 * UNIT, prefix_budget=0) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
            with ThreadPoolExecutor(len(prompts)) as pool:
                found = pool.map(lambda p: complete(client, p, max_tokens=20), prompts)
                assert [answer.choices[0].text for answer in found] == want
        # 19 tokens of prompt and 20 of output, each.
        sizes = server.engine.sizes
        fit = sizes.for_requests // ((sizes.tokens(19) + 20) * sizes.unit)
        assert 3 <= fit <= 4 and (fit - 1) * 39 * UNIT < server.engine.peak_bytes <= fit * 39 * UNIT
        assert server.idle() and server.engine.held_bytes == 0


def test_long_prompts_fit_a_few_entries_where_a_policy_drops_others(net):
    with serving(net, 400 * UNIT, policy="sinks_recent", tokens_per_request=64) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
            found = complete(client, PROMPT * 60, max_tokens=100)
        assert found.usage.prompt_tokens == 960 and found.usage.completion_tokens == 100
        assert server.engine.peak_bytes < 100 * UNIT


def test_a_client_that_goes_away_frees_its_bytes(client, server):
    before = server.engine.held_bytes
    stream = complete(client, max_tokens=380, stream=True)
    events = iter(stream)
    # By its third token it has been seen to hold what it holds.
    for _ in range(3):
        next(events)
    assert server.engine.held_bytes >= before + 380 * UNIT
    stream.close()
    assert server.idle(5) and server.engine.held_bytes == before
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", timeout=0.05, headers=bearer(),
                   json={"model": NAME, "prompt": PROMPT, "max_tokens": 380})  # fmt: skip
    assert server.idle(5) and server.engine.held_bytes == before
    assert server.engine.counts["ended_cancelled"] >= 2


def bearer(token=TOKEN):
    return {"Authorization": f"Bearer {token}"}


def ask(server, path="completions", **options):
    """An answer's status and error."""
    options = {"headers": bearer()} | options
    answer = httpx.post(f"{server.url}/v1/{path}", timeout=30, **options)
    return answer.status_code, answer.json()["error"]


def soon(look):
    """What a request leaves behind may come a moment after its answer."""
    end = time.monotonic() + 10
    while not (found := look()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


GOOD = {"model": NAME, "prompt": PROMPT}


@pytest.mark.parametrize(
    "status, message, options",
    [
        (401, "a token is needed", {"json": GOOD, "headers": {}}),
        (401, "a token is needed", {"json": GOOD, "headers": bearer("a secrex")}),
        (401, "a token is needed", {"json": GOOD, "headers": {"Authorization": TOKEN}}),
        (400, "the body is not JSON", {"content": '{"model":', "headers": bearer() | {
            "Content-Type": "application/json"}}),
        (422, "valid dictionary", {"content": "[1]", "headers": bearer() | {
            "Content-Type": "application/json"}}),
        (422, "prompt: Field required", {"json": {"model": NAME}}),
        (422, "temperature: .*less than or equal to 2", {"json": GOOD | {"temperature": 3}}),
        (422, "max_tokens: .*greater than or equal to 1", {"json": GOOD | {"max_tokens": 0}}),
        (422, "stop takes up to 4", {"json": GOOD | {"stop": ["a"] * 5}}),
        (422, "n is not supported", {"json": GOOD | {"n": 2}}),
        (422, "warmth: Extra inputs", {"json": GOOD | {"warmth": 1}}),
        (400, "character 1 of the prompt is half", {"content": b'{"model":"tiny","prompt":'
            b'"a\\ud800"}', "headers": bearer() | {"Content-Type": "application/json"}}),
        (422, "valid string", {"content": b'{"model":"tiny","prompt":"a","\\ud800":1}',
            "headers": bearer() | {"Content-Type": "application/json"}}),
        (404, r"no model '\\ud800' here", {"content": b'{"model":"\\ud800","prompt":"a"}',
            "headers": bearer() | {"Content-Type": "application/json"}}),
        (400, "", {"content": "[" * 100_000, "headers": bearer() | {
            "Content-Type": "application/json"}}),
        (400, "", {"content": b'"\xff"', "headers": bearer() | {
            "Content-Type": "application/json"}}),
        (404, "no model 'other' here", {"json": GOOD | {"model": "other"}}),
        (400, "the prompt is empty", {"json": GOOD | {"prompt": ""}}),
        (400, "has token 195, the model has tokens 0 to 127", {"json": GOOD | {"prompt": "é"}}),
        (400, "has token 128", {"json": GOOD | {"prompt": [1, 128]}}),
        (400, "at most 2048 are possible", {"json": GOOD | {"prompt": "x" * 5000}}),
        (400, "characters, at most 2048 tokens", {"json": GOOD | {"prompt": "x" * 200_000}}),
        (400, "need a context budget of [0-9]+ bytes", {"json": GOOD | {"max_tokens": 493}}),
        (413, "larger than 1048576 bytes", {"json": GOOD | {"prompt": "x" * 2_000_000}}),
        (413, "larger than 1048576 bytes", {"content": (b"x" * 2**18 for _ in range(5))}),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(server, status, message, options):
    found, error = ask(server, **options)
    assert found == status and re.search(message, error["message"]), (found, error)
    assert set(error) >= {"message", "type", "param", "code"}


def test_other_paths_and_the_smallest_budget(server):
    assert ask(server, "nothing", json={})[0] == 404
    assert ask(server, "chat/completions", json={"model": NAME, "messages": []})[0] == 422
    _, error = ask(server, json=GOOD | {"max_tokens": 493})
    need, sizes = error["needs_bytes"], server.engine.sizes
    assert need == (sizes.tokens(16) + 493) * sizes.unit + 150 * UNIT
    assert error["code"] == "context_length_exceeded" and error["budget_bytes"] == 600 * UNIT
    with serving(tinylm.trained(), need, prefix_budget=150 * UNIT) as enough:
        answer = httpx.post(f"{enough.url}/v1/completions", timeout=30,
                            json=GOOD | {"max_tokens": 493, "stop": "\n"})  # fmt: skip
        assert answer.status_code == 200 and enough.engine.peak_bytes <= need


def test_too_many_are_refused_and_told_when_to_come_back(net):
    with serving(net, 600 * UNIT, waiting=0) as server:
        status, error = ask(server, json=GOOD)
        assert status == 429 and error["code"] == "context_budget_full"
        answer = httpx.post(f"{server.url}/v1/completions", json=GOOD)
        assert 1 <= int(answer.headers["Retry-After"]) <= 60
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
            with pytest.raises(openai.RateLimitError, match="no more may"):
                complete(client)


def test_metrics_are_prometheus_text_and_health_needs_no_token(server, client):
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{server.url}/metrics").status_code == 401
    before = server.engine.counts["generated_tokens"]
    produced = complete(client).usage.completion_tokens

    def counted():
        found = httpx.get(f"{server.url}/metrics", headers=bearer())
        return found if 'path="/v1/completions",status="200"' in found.text else None

    answer = soon(counted)
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    values = {}
    for line in answer.text.splitlines():
        if not line.startswith("#"):
            assert re.fullmatch(r'[a-z_]+(\{([a-z]+="[^"]*",?)+\})? [0-9.e+-]+', line), line
            name, _, value = line.rpartition(" ")
            values[name] = float(value)
    assert values["holdfast_context_budget_bytes"] == 600 * UNIT
    assert values["holdfast_context_held_bytes"] == server.engine.held_bytes
    assert 0 < values["holdfast_context_peak_bytes"] <= 600 * UNIT
    assert values["holdfast_generated_tokens_total"] == before + produced > before
    assert values['holdfast_http_requests_total{path="/v1/completions",status="200"}'] > 0
    count = values["holdfast_http_request_seconds_count"]
    assert values['holdfast_http_request_seconds_bucket{le="+Inf"}'] == count > 0


def test_every_request_is_logged_as_one_line(server, caplog):
    with caplog.at_level("INFO", "holdfast.serve.access"):
        ask(server, json=GOOD | {"model": "other"})
        soon(lambda: caplog.messages)
    line = json.loads(caplog.messages[-1])
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/completions", 404)
