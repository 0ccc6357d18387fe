import math
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from holdfast.errors import UsageError
from holdfast.longterm.retrieval import terms
from holdfast.longterm.retrieval.corpus import (
    FULL,
    JOINING,
    K1,
    LEADERS,
    LIGHT,
    POOL,
    SHARE,
    B,
    Corpus,
    Doc,
    Stored,
    maxsim,
)  # fmt: skip
from holdfast.longterm.retrieval.embed import Hash
from holdfast.longterm.retrieval.postings import AHEAD, BACK
from holdfast.longterm.retrieval.vectors import Query, unit

DIM = 64
_WORDS = "apple bear cloud dance eagle field grape house island yesterday kite lemon"
WORDS = _WORDS.split()
NAMES = ("Ann", "Bob Stone", None)
DAYS = [datetime(2023, 6, 20, tzinfo=UTC) + timedelta(days=5 * n) for n in range(9)]


def docs(count: int, seed: int, first: int = 1) -> list[Doc]:
    rng = np.random.default_rng(seed)
    found = []
    for key in range(first, first + count):
        speaker = NAMES[rng.integers(3)]
        text = " ".join(rng.choice(WORDS, rng.integers(1, 9))) + rng.choice(
            ["", "?", ". [a lemon]"]
        )
        session = [None, "a", "b", 7][rng.integers(4)]
        vectors = unit(rng.normal(size=(2, DIM)))
        found.append(
            Doc(
                key=key,
                position=int(rng.integers(30)),
                session=session,
                kind=("turn", "fact")[int(rng.integers(5) == 0)],
                speaker=speaker,
                text=f"{speaker}: {text}" if speaker else text,
                own=vectors[0],
                window=vectors[1],
                when=None if key % 4 == 0 else micros(DAYS[key % len(DAYS)]),
            )
        )
    return found


DAY = timedelta(days=1)


def micros(when: datetime) -> int:
    return int(1e6 * when.timestamp())


def query(text: str, seed: int = 0, states: bool = False) -> Query:
    rng = np.random.default_rng(seed)
    vector = unit(rng.normal(size=(1, DIM)))[0]
    if not states:
        return Query(text, vector)
    words = text.rstrip("?").split()
    return Query(text, vector, unit(rng.normal(size=(len(words), DIM))), words)


def tokens(key: int) -> bytes:
    rng = np.random.default_rng(key)
    return rng.integers(0, 256, (int(rng.integers(0, 6)), DIM // 8), np.uint8).tobytes()


def fetch(keys):
    return {key: Stored(tokens=tokens(key)) for key in keys}


class Reference:
    """The recipe by its formulas, one memory and one word at a time; fewer memories than a pool."""

    def __init__(self, memories: list[Doc]):
        self.memories = memories
        self.stems = {doc.key: Counter(terms.stems(doc.text)) for doc in memories}
        self.heard = {doc.key: self._hears(doc) for doc in memories}
        self.length = {
            k: sum(w * self.stems[j].total() for j, w in heard) for k, heard in self.heard.items()
        }
        self.mean = sum(self.length.values()) / len(memories)

    def _hears(self, doc: Doc) -> list[tuple[int, float]]:
        heard = [(doc.key, 1.0)]
        if doc.session is None:
            return heard
        beside = [
            one.key
            for one in sorted(self.memories, key=lambda one: (one.position, one.key))
            if (one.session, one.kind) == (doc.session, doc.kind)
        ]
        at = beside.index(doc.key)
        heard += [(beside[at - n], w) for n, w in enumerate(AHEAD, 1) if at - n >= 0]
        return heard + [(beside[at + n], w) for n, w in enumerate(BACK, 1) if at + n < len(beside)]

    def idf(self, term: str) -> float:
        n = sum(term in counts for counts in self.stems.values())
        return math.log(1 + (len(self.stems) - n + 0.5) / (n + 0.5))

    def bm25(self, weights: dict[str, float]) -> dict[int, float]:
        scores = dict.fromkeys(self.heard, 0.0)
        for term, weight in weights.items():
            for k, heard in self.heard.items():
                f = max(w * self.stems[j][term] for j, w in heard)
                damped = f / (f + K1 * (1 - B + B * self.length[k] / self.mean))
                scores[k] += weight * self.idf(term) * damped * (K1 + 1)
        return scores

    def joined(self, score: dict[int, float], asked: list[str]) -> dict[int, float]:
        """BM25 of the words that the best memories add."""
        best = sorted(score, key=lambda k: (-score[k], k))[:LEADERS]
        trust = {k: math.exp(score[k]) for k in best}
        weights: Counter = Counter()
        for k in best:
            for term, count in self.stems[k].items():
                weights[term] += trust[k] / sum(trust.values()) * count / self.stems[k].total()
        known = {*asked, *map(terms.stem, terms.STOP)}
        weights = {t: w * self.idf(t) for t, w in weights.items() if t not in known}
        chosen = sorted(weights, key=lambda t: (-round(weights[t], 9), t))[:JOINING]
        total = sum(weights[t] for t in chosen)
        return self.bm25({t: SHARE * len(asked) * weights[t] / total for t in chosen})

    def maxsim(self, asked: Query) -> dict[int, float]:
        weights = [self.idf(terms.stems(word)[0]) for word in asked.words]
        found = {}
        for doc in self.memories:
            signs = np.unpackbits(np.frombuffer(tokens(doc.key), np.uint8)).reshape(-1, DIM)
            best = [
                max((float(state @ (2.0 * s - 1)) / DIM**0.5 for s in signs), default=0.0)
                for state in asked.states
            ]
            found[doc.key] = sum(w * b for w, b in zip(weights, best, strict=True)) / sum(weights)
        return found

    def search(self, asked: Query) -> dict[int, float]:
        question = terms.query_terms(asked.text)
        signals = {"bm25": self.bm25(dict.fromkeys(question, 1.0))}
        signals["window"] = {doc.key: float(doc.window @ asked.vector) for doc in self.memories}
        if asked.states is None:
            signals["own"] = {doc.key: float(doc.own @ asked.vector) for doc in self.memories}
            return self._sum(LIGHT, signals, asked.text)
        signals["maxsim"] = self.maxsim(asked)
        joined = self.joined(self._sum(FULL, signals, asked.text), question)
        signals["bm25"] = {k: score + joined[k] for k, score in signals["bm25"].items()}
        return self._sum(FULL, signals, asked.text)

    def _sum(self, weights, signals, text: str) -> dict[int, float]:
        asked, score = set(terms.words(text)), {}
        for doc in self.memories:
            score[doc.key] = sum(
                weights[name] * max(values[doc.key], 0) / max(max(values.values()), 1e-12)
                for name, values in signals.items()
            )
            named = asked & set(terms.words(doc.speaker or ""))
            score[doc.key] += weights["speaker"] * bool(named)
            score[doc.key] += weights["question"] * doc.text.endswith("?")
            told = "June 2023" in text and doc.when is not None
            score[doc.key] += weights["date"] * (told and doc.when < micros(DAYS[0] + 18 * DAY))
            timed = text.startswith("When") and "yesterday" in doc.text
            score[doc.key] += weights["when"] * timed
        return score


def exact(memories: list[Doc]):
    by_key = {doc.key: doc for doc in memories}
    return lambda keys: {k: Stored(by_key[k].own, by_key[k].window, tokens(k)) for k in keys}


def same(corpus: Corpus, memories: list[Doc], asked: Query) -> None:
    hits = corpus.search(asked, 200, fetch=exact(memories))
    want = Reference(memories).search(asked)
    assert {hit.key for hit in hits} == set(want)
    for hit in hits:
        assert hit.score == pytest.approx(want[hit.key], abs=1e-4)
        assert sum(hit.terms.values()) == pytest.approx(hit.score, abs=1e-5)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("states", [False, True])
def test_search_equals_the_formula_after_any_history(seed, states):
    corpus, rng = Corpus("test", DIM), np.random.default_rng(seed)
    held: dict[int, Doc] = {}
    for step in range(6):
        new = docs(int(rng.integers(1, 15)), seed=100 * seed + step, first=1 + 20 * step)
        corpus.add(new)
        held.update({doc.key: doc for doc in new})
        gone = rng.choice(list(held), min(len(held), int(rng.integers(0, 6))), replace=False)
        corpus.remove([*gone.tolist(), 10**6])
        held = {key: doc for key, doc in held.items() if key not in gone}
        if not held:
            continue
        # A changed memory comes in under the key that it had.
        again = docs(1, seed=step, first=int(rng.choice(list(held))))
        corpus.add(again)
        held[again[0].key] = again[0]
    assert len(corpus) == len(held)
    asked = ["apple grape?", "When did Bob dance?", "Ann kite kite lemon", "grape in June 2023"]
    for n, text in enumerate(asked):
        same(corpus, list(held.values()), query(text, seed=n, states=states))


def test_gaps_are_closed_and_nothing_changes():
    memories = docs(1600, seed=3)
    corpus = Corpus("test", DIM)
    corpus.add(memories)
    grown = corpus.nbytes()
    corpus.remove([doc.key for doc in memories if doc.key % 16])
    left = [doc for doc in memories if doc.key % 16 == 0]
    assert corpus._key.count == len(corpus) == len(left) == 100
    assert corpus.nbytes() < grown / 4
    same(corpus, left, query("house island?", states=True))
    fresh = Corpus("test", DIM)
    fresh.add(left)
    asked = query("house island?")
    for one, other in zip(corpus.search(asked, 9), fresh.search(asked, 9), strict=True):
        assert one.key == other.key and one.score == pytest.approx(other.score, abs=1e-3)


def test_order_of_arrival_does_not_matter():
    memories = [replace(doc, position=doc.position % 9) for doc in docs(60, seed=5)]
    forward, backward = Corpus("test", DIM), Corpus("test", DIM)
    forward.add(memories)
    for doc in reversed(memories):
        backward.add([doc])
    for one, other in zip(
        forward.search(query("eagle"), 20), backward.search(query("eagle"), 20), strict=True
    ):
        assert one.key == other.key and one.score == pytest.approx(other.score, abs=1e-5)


def test_neighbours_stay_in_their_session_and_kind():
    vectors = unit(np.eye(DIM))
    said = [("s", "turn", "the volcano erupted"), ("s", "turn", "oh"), ("t", "turn", "oh"),
            ("s", "fact", "oh"), (None, "turn", "oh")]  # fmt: skip
    corpus = Corpus("test", DIM)
    corpus.add([
        Doc(n, n, session, kind, None, text, vectors[n], vectors[n])
        for n, (session, kind, text) in enumerate(said)
    ])  # fmt: skip
    hits = corpus.search(Query("volcano", vectors[20]), 9)
    heard = {hit.key for hit in hits if hit.terms["bm25"] > 0}
    assert heard == {0, 1}


@pytest.mark.parametrize("allow", [
    lambda keys: keys % 3 == 0,
    np.arange(60) % 3 == 0,
    np.arange(0, 60, 3),
    np.array([], np.int64),
])  # fmt: skip
def test_only_what_is_allowed_is_found_and_all_of_it(allow):
    memories = docs(50, seed=8)
    corpus = Corpus("test", DIM)
    corpus.add(memories)
    allowed = allow(np.arange(60)) if callable(allow) else np.isin(np.arange(60), allow)
    if isinstance(allow, np.ndarray) and allow.dtype == bool:
        allowed = allow
    want = {doc.key for doc in memories if allowed[doc.key]}
    assert {hit.key for hit in corpus.search(query("bear"), 99, allow)} == want
    assert set(corpus.nearest(memories[0].own, 99, allow)[0].tolist()) == want
    facts = {doc.key for doc in memories if doc.kind == "fact"}
    found = {hit.key for hit in corpus.search(query("bear"), 99, allow, kinds={"fact"})}
    assert found == want & facts


def test_nearest_is_by_cosine():
    memories = docs(300, seed=11)
    corpus = Corpus("test", DIM)
    corpus.add(memories)
    vector = memories[17].own
    keys, cosines = corpus.nearest(vector, 10)
    exact = np.array([doc.own @ vector for doc in memories])
    assert keys[0] == memories[17].key and cosines[0] == pytest.approx(1, abs=5e-3)
    np.testing.assert_allclose(cosines, np.sort(exact)[::-1][:10], atol=5e-3)


def test_a_new_window_replaces_the_old():
    memories = docs(9, seed=2)
    corpus = Corpus("test", DIM)
    corpus.add(memories)
    asked = query("nothing")
    corpus.reframe([memories[4].key, 999], np.array([asked.vector, asked.vector]))
    assert corpus.search(asked, 1)[0].key == memories[4].key


@pytest.mark.parametrize("states", [False, True])
def test_codes_are_nearly_exact(states):
    memories = docs(30, seed=4)
    corpus = Corpus("test", DIM)
    corpus.add(memories)
    asked = query("cloud", states=states)
    near = corpus.search(asked, 30, fetch=fetch)
    far = {hit.key: hit.score for hit in corpus.search(asked, 30, fetch=exact(memories))}
    for hit in near:
        assert hit.score == pytest.approx(far[hit.key], abs=0.02)


def test_words_of_the_best_help_others_to_be_found():
    """Nothing but the word that the best memory shares with it speaks for memory 3."""
    said = ["the volcano erupted beside Reykjavik", "so it", "was it", "Reykjavik", "it is"]
    vectors = unit(np.eye(DIM))
    corpus = Corpus("test", DIM)
    corpus.add([Doc(n, 0, None, "fact", None, t, *vectors[[n, n]]) for n, t in enumerate(said)])
    asked = Query("volcano", vectors[20], vectors[20:21], ["volcano"])
    signs = {n: np.packbits(vectors[20 if n == 0 else 30] > 0).tobytes() for n in range(5)}
    hits = corpus.search(asked, 9, fetch=lambda keys: {k: Stored(tokens=signs[k]) for k in keys})
    feedback = {hit.key: hit.terms["feedback"] for hit in hits}
    assert [hit.key for hit in hits][:2] == [0, 3]
    assert feedback[0] > feedback[3] > 0 == feedback[1]


@pytest.mark.parametrize("text", ["", "?!", "what was it", "東京タワー", "zzz qqq", "word " * 5000])
def test_any_question_of_any_corpus(text):
    embedder, corpus = Hash(DIM), Corpus("test", DIM)
    asked = embedder.encode_query(text)
    assert corpus.search(asked, 5) == []
    assert len(corpus.nearest(asked.vector, 5)[0]) == 0
    said = ["東京タワーへ行った", "", "A long one. " * 4000, "It was what it was"]
    own = embedder.encode(said)
    corpus.add([Doc(n, 0, None, "fact", None, t, own[n], own[n]) for n, t in enumerate(said[:1])])
    assert [hit.key for hit in corpus.search(asked, 5)] == [0]
    corpus.add([
        Doc(n, 0, None, "fact", None, t, own[n], own[n]) for n, t in enumerate(said) if n
    ])  # fmt: skip
    hits = corpus.search(asked, 5, fetch=fetch)
    assert len(hits) == 4 and all(math.isfinite(hit.score) for hit in hits)
    if text in ("東京タワー", "what was it"):
        assert said[hits[0].key].startswith(("東京", "It was"))


def test_maxsim_by_hand():
    states = np.array([[1, 0, 0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0]], np.float32)
    blobs = [bytes([0b10000000, 0b01000000]), bytes([0b00000000]), b""]
    got = maxsim(states, np.array([3, 1], np.float32), blobs)
    np.testing.assert_allclose(got, np.array([1, -1, 0]) / 8**0.5, rtol=1e-6)


def test_one_loud_neighbour_is_heard_as_well_as_many():
    vectors = unit(np.eye(DIM))

    def heard(said: list[str]) -> float:
        corpus = Corpus("test", DIM)
        rest = [(None, "oh")] * 3
        corpus.add([
            Doc(n, n, session, "turn", None, text, vectors[n], vectors[n])
            for n, (session, text) in enumerate([*(("s", text) for text in said), *rest])
        ])  # fmt: skip
        counts = corpus._words(["volcano"])
        return float(counts[3] / corpus._idf(np.array([corpus._postings.number("volcano")]))[0])

    assert heard(["volcano", "volcano", "volcano", "so"]) == pytest.approx(
        heard(["oh", "oh", "volcano", "so"])
    )
    assert heard(["volcano", "oh", "oh", "so"]) < heard(["oh", "oh", "volcano", "so"])


def test_a_dated_question_finds_what_was_told_then():
    vectors = unit(np.eye(DIM))
    corpus = Corpus("test", DIM)
    days = [datetime(2023, 5, 20, tzinfo=UTC), datetime(2023, 10, 15, tzinfo=UTC), None]
    corpus.add([
        Doc(n, 0, None, "turn", None, "a walk", *vectors[[9, 9]], when=day and micros(day))
        for n, day in enumerate(days)
    ])  # fmt: skip
    for text, told in [
        ("What did I see on 19 May, 2023?", 0),
        ("What did I see on October 13, 2023?", 1),
        ("What did I see in May?", 0),  # the last one before the newest memory
        ("What did I see two days ago?", 1),
    ]:
        hits = corpus.search(Query(text, vectors[9]), 3)
        assert hits[0].key == told
        assert [hit.terms["date"] > 0 for hit in hits] == [True, False, False]
    assert {hit.terms["date"] for hit in corpus.search(Query("a walk?", vectors[9]), 3)} == {0}


def test_the_days_asked_about_have_candidates_of_their_own():
    vectors = unit(np.eye(DIM))
    near = unit(0.1 * vectors[9] + vectors[8])
    corpus = Corpus("test", DIM)
    corpus.add([
        Doc(n, 0, None, "turn", None, "so", *([vectors[9]] if n == 0 else [near]) * 2, when=0)
        for n in range(3 * POOL)
    ])  # fmt: skip
    then = micros(datetime(2023, 5, 20, tzinfo=UTC))
    corpus.add([Doc(999, 0, None, "turn", None, "so", *vectors[[3, 3]], when=then)])
    hits = corpus.search(Query("Where did I go on 19 May, 2023?", vectors[9]), 10)
    assert [hit.key for hit in hits][:2] == [0, 999]
    hits = corpus.search(Query("Where did I go on 19 June, 2022?", vectors[9]), 10)
    assert 999 not in [hit.key for hit in hits]
    late = corpus.search(
        Query("Where did I go on 19 May, 2023?", vectors[9]), 10, lambda keys: keys < 999
    )
    assert 999 not in [hit.key for hit in late]


def test_wrong_vectors_and_keys_are_refused():
    corpus = Corpus("minilm", DIM)
    wide = Doc(1, 0, None, "turn", None, "x", np.zeros(8), np.zeros(DIM))
    with pytest.raises(UsageError, match=r"shape \(8,\).*'minilm'.*\(64,\).*re-embed"):
        corpus.add([wide])
    with pytest.raises(UsageError, match="twice in one add"):
        corpus.add([docs(1, 0)[0]] * 2)
    with pytest.raises(UsageError, match="k=0; ask for at least 1"):
        corpus.search(query("x"), 0)
    with pytest.raises(UsageError, match=r"shape \(3,\)"):
        corpus.nearest(np.zeros(3), 1)
    assert len(corpus) == 0


@pytest.mark.parametrize("count", [1, 4096, 9000])
def test_bytes_are_counted(count):
    rng = np.random.default_rng(0)
    vectors = unit(rng.normal(size=(count, DIM)))
    corpus = Corpus("test", DIM)
    corpus.add([
        Doc(n, n, n // 20, "turn", "Ann", "", vectors[n], vectors[n], stems=[f"w{n}", "same"])
        for n in range(count)
    ])  # fmt: skip
    rows = 2 * count * (DIM + 4)
    assert rows < corpus.nbytes() < 1.1 * rows + 500 * (count + 40)
