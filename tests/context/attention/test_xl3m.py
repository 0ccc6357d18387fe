"""XL3M: readings by hand, what is kept, in which order, from a model or from a server."""

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from transformers import GenerationConfig

from holdfast.checks import tinylm
from holdfast.context.attention.xl3m import Endpoint, Local, Reading, xl3m_generate, xl3m_select
from holdfast.errors import HoldfastError, UsageError
from holdfast.meter import Meter


class Scripted:
    """A backend whose certainty after a segment is that segment's first token, as a percentage."""

    def __init__(self):
        self.prompts = []

    def logprobs(self, prompts, tail):
        for ids in prompts:
            self.prompts.append(ids.tolist())
            p = ids[0].item() / 100
            following = torch.tensor([p, 1 - p]).log()
            yield Reading(following, torch.full((tail,), -ids[0].item() / 10))


def text(*firsts, segment=10):
    """Segments that begin with `firsts`, then a question of three tokens."""
    rows = [torch.cat([torch.tensor([f]), torch.arange(1, segment)]) for f in firsts]
    return torch.cat([*rows, torch.tensor([70, 71, 72])])


def test_the_most_certain_segments_stay_in_the_order_of_the_text():
    backend = Scripted()
    ids = text(60, 99, 55, 90, 50, 70)
    keys, report = xl3m_select(backend, ids, 3, segment=10, window=33, overlap=0)
    want = torch.cat([ids[10:20], ids[30:40], ids[50:60], ids[-3:]])
    assert torch.equal(keys, want)
    assert report.starts == (0, 10, 20, 30, 40, 50) and report.kept == (1, 3, 5)
    assert report.ranked() == [1, 3, 5, 0, 2, 4]
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert report.entropy[3] == pytest.approx(entropy, abs=1e-6)
    # First the question alone, then every segment followed by it.
    assert backend.prompts[0] == [70, 71, 72]
    assert backend.prompts[1] == [*ids[:10].tolist(), 70, 71, 72] and len(backend.prompts) == 7
    # -f/10 for each token of the question against -7 alone: the lowest first token gains most.
    assert report.gain[4] == pytest.approx(-5 + 7, abs=1e-5)
    assert report.ranked("gain") == [4, 2, 0, 5, 3, 1]
    by_gain, _ = xl3m_select(Scripted(), ids, 3, segment=10, window=33, overlap=0, by="gain")
    assert torch.equal(by_gain, torch.cat([ids[:10], ids[20:30], ids[40:50], ids[-3:]]))
    # Of a question of one token nothing can be compared; entropies decide as before.
    _, short = xl3m_select(Scripted(), ids[:-2], 1, segment=10, window=31, overlap=0)
    assert all(map(math.isnan, short.gain)) and short.kept == (1, 3, 5)
    assert short.ranked("gain") == [0, 1, 2, 3, 4, 5]
    one, _ = xl3m_select(Scripted(), ids[None], 3, segment=10, window=33, overlap=0, top=1)
    assert torch.equal(one, torch.cat([ids[10:20], ids[-3:]])[None])


def test_overlaps_are_kept_once_and_the_last_segment_ends_with_the_text():
    ids = torch.cat([torch.tensor([95]), torch.arange(40, 63), torch.tensor([70, 71, 72])])
    keys, report = xl3m_select(Scripted(), ids, 3, segment=10, window=19, overlap=4)
    # Starts every 6 tokens, and one that leaves exactly ten.
    assert report.starts == (0, 6, 12, 14)
    # Their first tokens 95, 45, 51 and 53, by distance from one half.
    assert report.ranked() == [0, 1, 3, 2]
    # The second brings but six tokens beyond those that the first brought: 16 and the question.
    assert report.kept == (0, 1)
    assert torch.equal(keys, torch.cat([ids[:16], ids[-3:]]))
    keys, report = xl3m_select(Scripted(), ids, 3, segment=10, window=18, overlap=4)
    assert report.kept == (0,)
    assert torch.equal(keys, torch.cat([ids[:10], ids[-3:]]))


def test_the_prefix_stands_before_every_segment():
    backend = Scripted()
    ids = torch.cat([torch.tensor([80, 81]), text(60, 99, 55)])
    keys, _ = xl3m_select(backend, ids, 3, segment=10, window=15, overlap=0, prefix=2)
    assert all(prompt[:2] == [80, 81] for prompt in backend.prompts)
    assert torch.equal(keys[:2], ids[:2]) and torch.equal(keys[-3:], ids[-3:]) and len(keys) == 15


def test_a_text_that_fits_is_not_read():
    model = tinylm.trained()
    ids = torch.randint(128, (1, 40))
    backend = Scripted()
    keys, report = xl3m_select(backend, ids, 3, segment=8, window=40)
    assert keys is ids and not backend.prompts and not report.starts
    out, _ = xl3m_generate(model, ids, 3, segment=8, window=40, max_new_tokens=9)
    want = model.generate(ids, max_new_tokens=9, do_sample=False)
    assert torch.equal(out, want[:, 40:])


def test_a_long_text_is_continued_from_its_key_context():
    model = tinylm.trained()
    ids = tinylm.corpus()[1][None, :900]
    keys, report = xl3m_select(model, ids, 20, segment=30, window=100)
    assert keys.shape[1] <= 100 and len(report.kept) >= 2
    out, again = xl3m_generate(model, ids, 20, segment=30, window=100, max_new_tokens=9)
    assert again == report
    assert torch.equal(out, model.generate(keys, max_new_tokens=9, do_sample=False)[:, -9:])


def test_readings_equal_plain_passes():
    model = tinylm.trained()
    ids = tinylm.corpus()[1][:200].to(torch.int32)
    prompts = list(ids.unfold(0, 25, 19))
    for prompt, reading in zip(prompts, Local(model, 4).logprobs(prompts, 5), strict=True):
        logs = model(prompt[None].long()).logits[0].log_softmax(-1)
        torch.testing.assert_close(reading.following, logs[-1], atol=1e-5, rtol=1e-5)
        want = logs[:-1].gather(1, prompt[1:, None].long())[-5:, 0]
        torch.testing.assert_close(reading.tail, want, atol=1e-5, rtol=1e-5)
    assert [r.tail.shape for r in Local(model).logprobs(prompts[:1], 0)] == [(0,)]


def test_segments_per_pass_do_not_matter():
    model = tinylm.trained()
    # Twice the same text: segments that are alike must not change places.
    ids = torch.cat([tinylm.corpus()[1][:600]] * 2 + [tinylm.corpus()[1][700:720]])
    found = [xl3m_select(model, ids, 20, segment=30, window=120, batch=b) for b in (1, 7, 64)]
    for keys, report in found[1:]:
        assert torch.equal(keys, found[0][0]) and report.kept == found[0][1].kept
        assert report.ranked() == found[0][1].ranked()


def test_bytes_do_not_depend_on_the_length_of_the_text():
    model = tinylm.trained()
    whole = tinylm.corpus()[0]

    def extra(n):
        with Meter(model, inputs=whole) as meter:
            xl3m_select(model, whole[:n], 16, segment=48, window=200, batch=4)
        return meter.peak - meter.base

    extra(1000)
    assert extra(1000) == extra(4000)


def test_keys_and_values_by_formula():
    """Of one layer and one batch of segments while they are read, then of the key context."""
    model = tinylm.trained()
    layers, heads, width, entry = 2, 4, 16, 4
    caches, projected = [], []

    def forward(module, args, kwargs, output):
        cache = output.past_key_values
        tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)] if cache else []
        caches.append(sum(t.nbytes for t in tensors))

    def keys(module, args, output):
        projected.append(output.nbytes)

    handles = [
        model.register_forward_hook(forward, with_kwargs=True),
        model.model.layers[0].self_attn.k_proj.register_forward_hook(keys),
    ]
    ids = tinylm.corpus()[0][None, :500]
    kept, _ = xl3m_select(model, ids, 16, segment=46, window=200, batch=3)
    assert not any(caches) and max(projected) == 3 * heads * (46 + 16) * width * entry
    config = GenerationConfig(use_cache=True)
    options = {"max_new_tokens": 5, "generation_config": config}
    xl3m_generate(model, ids, 16, segment=46, window=200, **options)
    for handle in handles:
        handle.remove()
    # The last token that is generated is never read.
    assert caches[-1] == 2 * layers * heads * (kept.shape[1] + 5 - 1) * width * entry
    assert kept.shape[1] <= 200


class Server(BaseHTTPRequestHandler):
    """Completions of the tiny model in OpenAI's form, with the prompt's log-probabilities."""

    seen = []
    echo = True

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((self.path, self.headers["Authorization"], body))
        if body["model"] != "tiny":
            return self.answer(404, {"error": {"message": "no such model"}})
        choices = [self.choice(i, ids, body["logprobs"]) for i, ids in enumerate(body["prompt"])]
        self.answer(200, {"choices": choices[::-1]})

    def choice(self, index, ids, top):
        logs = tinylm.trained()(torch.tensor([ids])).logits[0].log_softmax(-1)
        best = logs.topk(top)
        likely = [
            {str(i): v for i, v in zip(*row, strict=True)}
            for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        told = [logs[i, token].item() for i, token in enumerate(ids[1:])]
        found = {"token_logprobs": [None, *told, likely[-1][next(iter(likely[-1]))]],
                 "top_logprobs": [None, *likely]}  # fmt: skip
        return {"index": index, "logprobs": found if self.echo else None}

    def answer(self, code, body):
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def url(monkeypatch):
    monkeypatch.setattr(Server, "seen", [])
    server = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_server_gives_the_same_readings(url, monkeypatch):
    model = tinylm.trained()
    ids = tinylm.corpus()[1][:300]
    options = {"question_len": 12, "segment": 40, "window": 100}
    local_keys, local = xl3m_select(model, ids, **options)
    every = Endpoint(url, "tiny", token="secret", top=128, batch=3)
    keys, report = xl3m_select(every, ids, **options)
    assert torch.equal(keys, local_keys) and report.kept == local.kept
    assert report.gain == pytest.approx(local.gain, abs=1e-5)
    path, authorization, body = Server.seen[1]
    assert path == "/v1/completions" and authorization == "Bearer secret"
    assert body["echo"] is True and len(body["prompt"]) == 3 and len(body["prompt"][0]) == 52
    # Of the five likeliest tokens and one for the rest, an entropy is a lower bound.
    _, few = xl3m_select(Endpoint(url, "tiny", top=5), ids, **options)
    assert all(a < b for a, b in zip(few.entropy, local.entropy, strict=True))
    with pytest.raises(HoldfastError, match=r"answered 404: .*no such model"):
        xl3m_select(Endpoint(url, "large"), ids, **options)
    monkeypatch.setattr(Server, "echo", False)
    with pytest.raises(HoldfastError, match=r"of 0 tokens for a prompt of 12 .*support echo=true"):
        xl3m_select(Endpoint(url, "tiny"), ids, **options)


def test_a_server_that_is_not_there():
    with pytest.raises(HoldfastError, match=r"127\.0\.0\.1:9/v1/completions does not answer"):
        list(Endpoint("http://127.0.0.1:9/v1/", "tiny").logprobs([torch.arange(3)], 1))


def test_bad_input():
    ids = torch.arange(100)
    for prefix, question in ((0, 0), (0, 100), (50, 50), (-1, 3)):
        with pytest.raises(UsageError, match="leave no text between them"):
            xl3m_select(Scripted(), ids, question, segment=8, window=40, prefix=prefix)
    with pytest.raises(UsageError, match=r"question 45 tokens exceed window 40.*at most 0 fits"):
        xl3m_select(Scripted(), ids, 45, segment=8, window=40)
    with pytest.raises(UsageError, match="a segment of at most 37 fits"):
        xl3m_select(Scripted(), ids, 3, segment=38, window=40)
    with pytest.raises(UsageError, match="segment=8, overlap=8"):
        xl3m_select(Scripted(), ids, 3, segment=8, window=40, overlap=8)
    with pytest.raises(UsageError, match="segment=0, overlap=0"):
        xl3m_select(Scripted(), ids, 3, segment=0, window=40)
    with pytest.raises(UsageError, match=r"unknown statistic 'certainty'.*entropy, gain"):
        xl3m_select(Scripted(), ids, 3, segment=8, window=40, by="certainty")
    with pytest.raises(UsageError, match="question of at least 2 tokens"):
        xl3m_select(Scripted(), ids, 1, segment=8, window=40, by="gain")
    with pytest.raises(UsageError, match=r"shape \(2, 50\); expected integers"):
        xl3m_select(Scripted(), ids.view(2, 50), 3, segment=8, window=40)
    with pytest.raises(UsageError, match="top=0, batch=8"):
        xl3m_select(Scripted(), ids, 3, segment=8, window=40, top=0)
    with pytest.raises(UsageError, match=r"shape \(100,\); expected \(1,n\)"):
        xl3m_generate(tinylm.model(), ids, 3, segment=8, window=40)
