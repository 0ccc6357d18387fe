"""The searchable image of one space: words and meaning of every memory and of its neighbours.

Keeps    per memory two vectors (its own and its window's), its words, its place in its session.
Form     vectors int8; postings of 4 bytes, a slot and a count. All of it is a cache of what a store
         holds and can be built again from there; token states stay in the store.
Bytes    2*(d + 4) + 74 per memory, 8.5 per distinct word of a memory, about 250 per distinct word.
Source   S. Robertson, H. Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009;
         O. Khattab, M. Zaharia, "ColBERT", 2020.
Departs  a word counts for the turns around its own too, where the loudest is heard; token states
         are signs only; no signal can veto another, each adds its share.
"""

from collections.abc import Collection, Iterable, Sequence

import numpy as np

from holdfast.errors import UsageError
from holdfast.longterm.retrieval import cues, terms
from holdfast.longterm.retrieval.docs import Allow, Doc, Fetch, Scored, Stored
from holdfast.longterm.retrieval.maxsim import maxsim
from holdfast.longterm.retrieval.postings import Neighbours, Postings
from holdfast.longterm.retrieval.rows import Column, Rows
from holdfast.longterm.retrieval.vectors import Query

K1, B = 1.2, 0.75
POOL = 100  # candidates by words, as many by windows, and again of the days asked about
CUES = {"speaker": 0.1, "question": -0.1, "date": 0.5, "when": 0.15}
FULL = {"maxsim": 1.0, "bm25": 0.5, "window": 0.3, **CUES}
LIGHT = {"bm25": 1.0, "own": 0.5, "window": 0.5, **CUES}
# With `FULL`, words of the best memories join those asked for, together as `SHARE` of them.
LEADERS, JOINING, SHARE = 10, 10, 0.3
_AT_ONCE = 512  # memories taken in together; more would only need more memory

_NOTHING = Stored()
_NEVER = np.iinfo(np.int64).min
_STOP_TERMS = sorted({terms.stem(word) for word in terms.STOP})


class Corpus:
    """Memories of one space, found by what they and their neighbours say.

    Not safe for a writer beside readers; the owner holds a lock.

    Args:
        embedder_id: of the embedder whose vectors come in.
        dim: of the vectors.
    """

    def __init__(self, embedder_id: str, dim: int):
        self.embedder_id, self.dim = embedder_id, dim
        self._own, self._window = Rows(dim), Rows(dim)
        self._key, self._alive = Column(np.int64), Column(np.bool_)
        # Words of a memory, and those it hears of: its own and, in part, its neighbours'.
        self._length, self._heard = Column(np.int32), Column(np.float32)
        self._speaker, self._kind = Column(np.int32), Column(np.int32)
        self._asks, self._when = Column(np.bool_), Column(np.int64)
        self._speakers: dict[str | None, int] = {}
        self._kinds: dict[str, int] = {}
        self._postings, self._neighbours = Postings(), Neighbours()
        self._dead = 0

    def __len__(self) -> int:
        return self._key.count - self._dead

    def nbytes(self) -> int:
        """Bytes held, within about a tenth: what Python's allocator adds is not seen."""
        parts = [*self._columns(), self._own, self._window, self._postings, self._neighbours]
        return sum(part.nbytes for part in parts)

    def _columns(self) -> list[Column]:
        return [value for value in vars(self).values() if isinstance(value, Column)]

    def add(self, docs: Sequence[Doc]) -> None:
        """Take in memories; one whose key is here already replaces it.

        Raises:
            UsageError: a vector has another dimension, or one key comes twice.
        """
        if not docs:
            return
        keys = np.array([doc.key for doc in docs], np.int64)
        if len(np.unique(keys)) < len(keys):
            raise UsageError("a key comes twice in one add; each memory has a key of its own")
        self._check(vector for doc in docs for vector in (doc.own, doc.window))
        if self._key.count and keys.min() <= self._key.values[:-1].max():
            self.remove(keys)
        for start in range(0, len(docs), _AT_ONCE):
            self._append(docs[start : start + _AT_ONCE])

    def _append(self, docs: Sequence[Doc]) -> None:
        stems = [terms.stems(doc.text) if doc.stems is None else doc.stems for doc in docs]
        first, count = self._key.count, len(docs)
        self._own.append(np.array([doc.own for doc in docs], np.float32))
        self._window.append(np.array([doc.window for doc in docs], np.float32))
        self._key.append(np.array([doc.key for doc in docs]))
        self._alive.append(np.ones(count, bool))
        self._heard.append(np.zeros(count))
        self._asks.append(np.array([cues.asks(doc.text) for doc in docs]))
        self._when.append(np.array([_NEVER if doc.when is None else doc.when for doc in docs]))
        self._speaker.append(_codes(self._speakers, [doc.speaker for doc in docs]))
        self._kind.append(_codes(self._kinds, [doc.kind for doc in docs]))
        self._postings.add(first, stems)
        self._length.append(np.array([len(one) for one in stems]))
        self._neighbours.append(count)
        for slot, doc in enumerate(docs, first):
            if doc.session is not None:
                self._neighbours.link(slot, doc.session, doc.kind, doc.position, doc.key)
        self._hear(np.arange(first, first + count))

    def _check(self, vectors: Iterable[np.ndarray]) -> None:
        shapes = {np.shape(vector) for vector in vectors} - {(self.dim,)}
        if shapes:
            raise UsageError(
                f"a vector of shape {shapes.pop()} in a corpus of {self.embedder_id!r}, whose "
                f"vectors have shape ({self.dim},); encode with that embedder, or re-embed"
            )

    def _hear(self, slots: np.ndarray) -> None:
        """Count again the words that `slots`, and those who hear them, hear."""
        slots = self._neighbours.near(slots)
        lengths = self._length.values  # the last, which -1 finds, is 0
        heard = lengths[slots].astype(np.float32)
        for at, weight in self._neighbours.behind(slots):
            heard += weight * lengths[at]
        self._heard.values[slots] = heard

    def reframe(self, keys: Sequence[int], windows: np.ndarray) -> None:
        """New windows f32[n,d] of memories whose neighbours have changed; unknown keys are left."""
        self._check(windows)
        for key, window in zip(keys, windows, strict=True):
            self._window.put(self._slots(np.array([key])), window)

    def _slots(self, keys: np.ndarray) -> np.ndarray:
        return np.flatnonzero(np.isin(self._key.values[:-1], keys) & self._alive.values[:-1])

    def remove(self, keys: Sequence[int] | np.ndarray) -> None:
        """Forget memories; unknown keys are ignored."""
        gone = self._slots(np.asarray(keys, np.int64))
        near = self._neighbours.near(gone)
        for slot in gone.tolist():
            self._neighbours.unlink(slot)
        self._alive.values[gone] = False
        self._postings.drop(gone)
        self._dead += len(gone)
        self._hear(near)
        self._heard.values[gone] = 0
        if self._dead > max(1024, len(self) // 2):
            self._close_gaps()

    def _close_gaps(self) -> None:
        kept = np.flatnonzero(self._alive.values[:-1])
        moved = np.full(self._key.count + 1, -1, np.int64)
        moved[kept] = np.arange(len(kept))
        self._postings.keep(kept, moved)
        self._neighbours.keep(kept, moved)
        for part in [*self._columns(), self._own, self._window]:
            part.keep(kept)
        self._dead = 0

    def search(
        self,
        query: Query,
        k: int,
        allow: Allow | None = None,
        fetch: Fetch | None = None,
        kinds: Collection[str] | None = None,
    ) -> list[Scored]:
        """The `k` memories that answer best, best first, ties by key.

        Args:
            query: of this corpus's embedder; with token states the recipe is `FULL`, else `LIGHT`.
            allow: which memories may be found: a function of keys int64[n] -> bool[n], a mask
                bool[largest key + 1], or the allowed keys.
            fetch: reads what is stored of a few hundred keys; without it the recipe is `LIGHT`.
            kinds: only memories of these.
        """
        self._check_k(k)
        self._check([query.vector])
        allowed = self._allowed(allow, kinds)
        asked = terms.query_terms(query.text)
        words = self._words(asked)
        windows = self._window.dot(query.vector)
        pool, dated = max(POOL, k), self._dated(query.text)
        found = np.union1d(_best(words, allowed & (words > 0), pool), _best(windows, allowed, pool))
        if dated.any():
            found = np.union1d(found, _best(windows, allowed & dated, pool))
        keys = self._key.values[found].tolist()
        stored = fetch(keys) if fetch is not None else {}
        held = [stored.get(key, _NOTHING) for key in keys]
        window = _exact(windows[found], [one.window for one in held], query.vector)
        shares = {
            "bm25": _share(words[found]),
            "window": _share(window),
            "speaker": self._named(query.text)[self._speaker.values[found]],
            "question": self._asks.values[found],
            "date": dated[found],
            "when": self._timed(query.text, found),
        }
        overlap = self._overlap(query, [one.tokens for one in held])
        if overlap is None:
            own = self._own.take(found) @ query.vector
            shares["own"] = _share(_exact(own, [one.own for one in held], query.vector))
            shares = {name: weight * shares[name] for name, weight in LIGHT.items()}
        else:
            shares["maxsim"] = _share(overlap)
            shares = {name: weight * shares[name] for name, weight in FULL.items()}
            # What the best are about is what the question is about, in other words too.
            joined = self._joined(found, np.sum(list(shares.values()), axis=0), asked)
            top = max(float((words[found] + joined).max(initial=0)), 1e-12)
            shares["bm25"] = FULL["bm25"] * words[found] / top
            shares["feedback"] = FULL["bm25"] * joined / top
        scores = np.sum(list(shares.values()), axis=0)
        return [
            Scored(keys[i], float(scores[i]), {name: float(v[i]) for name, v in shares.items()})
            for i in np.lexsort((keys, -scores))[:k]
        ]

    def nearest(
        self,
        vector: np.ndarray,
        k: int,
        allow: Allow | None = None,
        kinds: Collection[str] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Keys int64[<=k] and cosines f32 of the own vectors nearest to `vector` f32[d].

        Cosines are those of the codes kept here, off by up to about 0.005.
        """
        self._check_k(k)
        self._check([vector])
        cosines = self._own.dot(vector)
        found = _best(cosines, self._allowed(allow, kinds), k)
        keys = self._key.values[found]
        order = np.lexsort((keys, -cosines[found]))
        return keys[order], cosines[found][order]

    @staticmethod
    def _check_k(k: int) -> None:
        if k < 1:
            raise UsageError(f"k={k}; ask for at least 1 memory")

    def _allowed(self, allow: Allow | None, kinds: Collection[str] | None) -> np.ndarray:
        """bool per slot."""
        allowed = self._alive.values[:-1]
        if kinds is not None:
            wanted = [code for kind, code in self._kinds.items() if kind in kinds]
            allowed = allowed & np.isin(self._kind.values[:-1], wanted)
        if allow is None:
            return allowed
        keys = self._key.values[:-1]
        if callable(allow):
            return allowed & np.asarray(allow(keys), bool)
        allow = np.asarray(allow)
        if allow.dtype != bool:
            return allowed & np.isin(keys, allow)
        return allowed & np.isin(keys, np.flatnonzero(allow))

    def _idf(self, words: np.ndarray) -> np.ndarray:
        """How rare words are, by number."""
        having = self._postings.having(words)
        return np.log1p((len(self) - having + 0.5) / (having + 0.5)).astype(np.float32)

    def _damping(self, slots: slice | np.ndarray) -> np.ndarray:
        """What BM25 adds to a count below the line: more for those who hear much."""
        heard = self._heard.values[:-1]
        mean = max(float(heard.sum(dtype=np.float64)) / max(1, len(self)), 1e-9)
        return K1 * (1 - B + B / mean * heard[slots])

    def _words(self, query_terms: Sequence[str]) -> np.ndarray:
        """BM25 of every slot; of those around who say a word the loudest is heard.

        All of them together would let a talk about one thing drown what was said once.
        """
        count = self._key.count
        total = np.zeros(count, np.float32)
        damping = self._damping(slice(None))
        for term in query_terms:
            slots, counts = self._postings.read(term)
            if self._dead:
                alive = self._alive.values[slots]
                slots, counts = slots[alive], counts[alive]
            if len(slots) == 0:
                continue
            heard = np.zeros(count + 1, np.float32)
            heard[slots] = counts
            for at, weight in self._neighbours.ahead(slots):
                # The last, which -1 finds, is no slot; no other is there twice.
                heard[at] = np.maximum(heard[at], counts * np.float32(weight))
            heard = heard[:-1]
            (idf,) = self._idf(np.array([self._postings.number(term)]))
            total += idf * (K1 + 1) * heard / (heard + damping)
        return total

    def _joined(
        self, found: np.ndarray, scores: np.ndarray, query_terms: Sequence[str]
    ) -> np.ndarray:
        """BM25 f32[len(found)] of words that the best of `found` have and the question has not.

        After N. Abdul-Jaleel et al., "UMass at TREC 2004: Novelty and HARD" (RM3).
        """
        best = np.lexsort((self._key.values[found], -scores))[:LEADERS]
        trust = np.exp(scores[best] - scores[best].max(initial=0))
        trust /= trust.sum()
        whose, words, counts = self._postings.words(found[best])
        lengths = self._length.values[found[best]]
        distinct, at = np.unique(words, return_inverse=True)
        weights = np.bincount(at, trust[whose] * counts / lengths[whose], len(distinct))
        weights = weights * self._idf(distinct)
        known = [self._postings.number(term) for term in (*query_terms, *_STOP_TERMS)]
        weights[np.isin(distinct, known)] = 0
        ranked = sorted(
            np.flatnonzero(weights > 0).tolist(),
            key=lambda i: (-weights[i], self._postings.name(distinct[i])),
        )
        # In the order of their numbers, for the search below.
        chosen = np.sort(np.array(ranked[:JOINING], np.int64))
        if not len(chosen) or not query_terms:
            return np.zeros(len(found), np.float32)
        joining, weights = distinct[chosen], weights[chosen]
        weights = SHARE * len(query_terms) * weights / weights.sum()
        heard = np.zeros((len(found), len(joining)), np.float32)
        for reached, weight in ((found, 1.0), *self._neighbours.behind(found)):
            here = np.flatnonzero(reached >= 0)
            whose, words, counts = self._postings.words(reached[here])
            at = np.minimum(np.searchsorted(joining, words), len(joining) - 1)
            same = joining[at] == words
            # A word is there once per slot, so that no place is written twice.
            place = here[whose[same]], at[same]
            heard[place] = np.maximum(heard[place], weight * counts[same])
        damped = heard / (heard + self._damping(found)[:, None])
        return damped @ (weights * self._idf(joining) * (K1 + 1)).astype(np.float32)

    def _overlap(self, query: Query, blobs: Sequence[bytes | None]) -> np.ndarray | None:
        """MaxSim f32 per blob, or None where there are no token states to compare."""
        if query.states is None or not len(query.states) or all(b is None for b in blobs):
            return None
        assert query.words is not None
        weights = np.array([self._weight(word) for word in query.words], np.float32)
        return maxsim(query.states, weights, [blob or b"" for blob in blobs])

    def _weight(self, word: str) -> float:
        """How rare the rarest part of a word is."""
        numbers = [self._postings.number(term) for term in terms.stems(word)]
        return float(self._idf(np.array(numbers, np.int64)).max(initial=0))

    def _named(self, text: str) -> np.ndarray:
        """bool per speaker: whether the question names them."""
        asked = set(terms.words(text)) - terms.STOP
        return np.array(
            [bool(asked & set(terms.words(one or ""))) for one in self._speakers] or [False]
        )

    def _dated(self, text: str) -> np.ndarray:
        """bool per slot: whether it was said when what the question asks about was told."""
        when, dated = self._when.values[:-1], np.zeros(self._key.count, bool)
        # The newest memory is as near to now as what is kept can tell.
        newest = int(when.max(initial=_NEVER))
        for first, end in cues.periods(text, None if newest == _NEVER else newest):
            dated |= (when >= first) & (when < end)
        return dated

    def _timed(self, text: str, found: np.ndarray) -> np.ndarray:
        """Whether each of `found` tells a time, where the question asks for one."""
        timed = np.zeros(len(found), bool)
        if cues.asks_when(text):
            whose, words, _ = self._postings.words(found)
            timed[whose[np.isin(words, [self._postings.number(term) for term in cues.TIMES])]] = 1
        return timed


def _codes(codes: dict, names: Sequence[str | None]) -> np.ndarray:
    """A number for each name; new names get new ones."""
    return np.array([codes.setdefault(name, len(codes)) for name in names])


def _exact(
    scores: np.ndarray, vectors: Sequence[np.ndarray | None], vector: np.ndarray
) -> np.ndarray:
    """`scores`, measured anew where a vector is at hand."""
    return np.array(
        [
            score if one is None else one @ vector
            for score, one in zip(scores, vectors, strict=True)
        ],
        np.float32,
    )


def _best(scores: np.ndarray, allowed: np.ndarray, k: int) -> np.ndarray:
    """Slots of the k best allowed scores, in no order."""
    slots = np.flatnonzero(allowed)
    if len(slots) <= k:
        return slots
    return slots[np.argpartition(-scores[slots], k - 1)[:k]]


def _share(values: np.ndarray) -> np.ndarray:
    """Values as shares of the largest; negative ones are 0."""
    values = np.maximum(values, 0)
    return values / max(float(values.max(initial=0)), 1e-12)
