"""What the default retrieval finds of LoCoMo's answers, and what each of its signals adds.

Weights were tuned on conv-26 and conv-30; nothing was tuned on the three conversations here. The
first run encodes them, which takes minutes, and keeps the result for the next.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from holdfast.checks import Result, check
from holdfast.errors import UsageError
from holdfast.longterm.evaluation import locomo
from holdfast.longterm.evaluation.encoded import Encoded, encode
from holdfast.longterm.evaluation.locomo import Conversation, Question, Report
from holdfast.longterm.retrieval.corpus import FULL, Corpus, Doc, Scored, Stored
from holdfast.longterm.retrieval.embed import MiniLM

HELD_OUT = ("conv-41", "conv-42", "conv-43")
AT_LEAST = 80.0
DEEP = 200  # ranks that packed contexts may reach

Rank = Callable[["Shelf", int], Sequence[int]]


@dataclass(frozen=True)
class Shelf:
    """A conversation, encoded and searchable; keys are places of turns."""

    conversation: Conversation
    encoded: Encoded
    corpus: Corpus
    alone: Corpus  # the same turns, none of which hears another

    def fetch(self, keys: Sequence[int]) -> dict[int, Stored]:
        return {key: Stored(tokens=self.encoded.tokens[key]) for key in keys}

    def hits(self, question: int, light: bool = False) -> list[Scored]:
        query = self.encoded.queries[question]
        return self.corpus.search(query, DEEP, fetch=None if light else self.fetch)

    def dense(self, question: int) -> list[int]:
        return self.corpus.nearest(self.encoded.queries[question].vector, DEEP)[0].tolist()

    def words(self, question: int, context: bool) -> list[int]:
        corpus = self.corpus if context else self.alone
        hits = corpus.search(self.encoded.queries[question], len(corpus))
        return [hit.key for hit in sorted(hits, key=lambda hit: -hit.terms["bm25"])[:DEEP]]


def shelve(conversation: Conversation, encoded: Encoded, dim: int) -> Shelf:
    together, alone = Corpus("minilm", dim), Corpus("minilm", dim)
    docs = [
        Doc(
            n, n, turn.session, "turn", turn.speaker, turn.line, own, window,
            when=int(1e6 * turn.when.timestamp()),
        )
        for n, (turn, own, window) in enumerate(
            zip(conversation.turns, encoded.own, encoded.window, strict=True)
        )
    ]  # fmt: skip
    together.add(docs)
    alone.add([replace(doc, session=None) for doc in docs])
    return Shelf(conversation, encoded, together, alone)


def fused(shelf: Shelf, question: int) -> list[int]:
    """Reciprocal ranks of dense and BM25 with the usual 60: what most hybrid searches do."""
    score: dict[int, float] = {}
    for ranked in (shelf.dense(question), shelf.words(question, context=False)):
        for rank, key in enumerate(ranked, 1):
            score[key] = score.get(key, 0) + 1 / (60 + rank)
    return sorted(score, key=lambda key: (-score[key], key))


def without(signal: str | None) -> Rank:
    """The default order, or what it would be without one signal's share."""

    def rank(shelf: Shelf, question: int) -> list[int]:
        hits = shelf.hits(question)
        # Stable: without a signal to drop the order stays.
        return [hit.key for hit in sorted(hits, key=lambda h: h.terms.get(signal, 0) - h.score)]

    return rank


ROWS: dict[str, Rank] = {
    "dense": lambda shelf, q: shelf.dense(q),
    "bm25": lambda shelf, q: shelf.words(q, context=False),
    "rrf": fused,
    "bm25_in_context": lambda shelf, q: shelf.words(q, context=True),
    "light": lambda shelf, q: [hit.key for hit in shelf.hits(q, light=True)],
    "full": without(None),
    **{f"full_without_{signal}": without(signal) for signal in (*FULL, "feedback")},
}


def report(shelves: Sequence[Shelf], rank: Rank, count: Callable[[str], int]) -> Report:
    by_id = {shelf.conversation.id: shelf for shelf in shelves}
    places = {
        (name, id(question)): n
        for name, shelf in by_id.items()
        for n, question in enumerate(shelf.conversation.questions)
    }

    def search(name: str, question: Question) -> list[str]:
        keys = rank(by_id[name], places[name, id(question)])
        return [by_id[name].conversation.turns[key].id for key in keys]

    return locomo.evaluate(search, [shelf.conversation for shelf in shelves], count=count)


@check(
    "locomo",
    claim="finds at least 80 % of the evidence for LoCoMo's questions among 10 turns, without a "
    "language model, in conversations on which nothing was tuned",
)
def run(seed: int) -> Result:
    if not locomo.path().exists():
        raise UsageError(
            f"{locomo.path()} is absent; put LoCoMo's conversations there, or name their folder "
            "in HOLDFAST_DATA"
        )
    embedder = MiniLM()
    shelves = [
        shelve(conversation, encode(embedder, conversation), embedder.dim)
        for conversation in locomo.load(locomo.path(), HELD_OUT)
    ]
    reports = {name: report(shelves, rank, embedder.count) for name, rank in ROWS.items()}
    full = reports["full"]
    gain, low, high = locomo.difference(full, reports["rrf"], seed=seed)
    measured = {
        "recall@10": full.recall(10),
        "recall@20": full.recall(20),
        "questions": len(full.scores),
        "over_rrf@10": gain,
        "over_rrf_interval": [low, high],
        "sessions_any@5": full.sessions("any@5"),
        "sessions_ndcg@5": full.sessions("ndcg@5"),
    }
    measured |= {f"packed_{budget}_tokens": full.packed(budget) for budget in (500, 1000, 2000)}
    measured |= {f"{kind}@10": full.recall(10, kind) for kind in full.categories()}
    measured |= {f"{name}@10": one.recall(10) for name, one in reports.items() if "full_" in name}
    others = ("dense", "bm25", "rrf", "bm25_in_context", "light")
    baseline = {f"{name}@10": reports[name].recall(10) for name in others}
    return Result(
        measured=measured,
        baseline=baseline,
        threshold=f"recall@10 >= {AT_LEAST:g} %, and above each simpler search",
        passed=bool(
            full.recall(10) >= AT_LEAST and full.recall(10) > max(baseline.values()) and low > 0
        ),
    )
