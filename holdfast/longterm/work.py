"""Slow work of one call, embeddings and model replies, done while no lock is held.

Inside a transaction everything slow is looked up; what is missing ends the attempt, is done
outside, and the attempt is made again. Decisions are pure, so that it costs nothing but time.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from holdfast.longterm.language.llm import LLM, LLMError, Usage
from holdfast.longterm.retrieval.embed import AFTER, BEFORE, Embedder, InContext, Query
from holdfast.longterm.store.rows import dumps

# A space that others change all the time must not keep a call from ever ending.
ATTEMPTS = 8


class Pending(BaseException):
    """Something slow is needed that has not been done yet; no `except Exception` may hold it."""


class Work:
    """Remembers what was encoded and answered during one call.

    While `deferring`, what is missing is noted and `Pending` raised.
    """

    def __init__(self, embedder: Embedder, llm: LLM | None):
        self._embedder, self._llm = embedder, llm
        self.usage = llm.usage if llm is not None else Usage()
        self.deferring = False
        self._vectors: dict[str, np.ndarray] = {}
        self._windows: dict[tuple[tuple[str, ...], int], InContext] = {}
        self._queries: dict[str, Query] = {}
        self._replies: dict[str, Any] = {}
        self._texts: list[str] = []
        self._turns: list[tuple[tuple[str, ...], int]] = []
        self._questions: list[str] = []
        self._asked: list[tuple[str, Any, Any]] = []

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors f32[n,dim]."""
        self._texts += [text for text in dict.fromkeys(texts) if text not in self._vectors]
        self._do()
        if not texts:
            return np.empty((0, self._embedder.dim), np.float32)
        return np.stack([self._vectors[text] for text in texts])

    def encode_both(
        self, texts: Sequence[str], turns: Sequence[tuple[tuple[str, ...], int]]
    ) -> tuple[list[np.ndarray], list[InContext]]:
        """Vectors of texts, and of turns within the (texts, position) around them."""
        self._texts += [text for text in dict.fromkeys(texts) if text not in self._vectors]
        self._turns += [turn for turn in dict.fromkeys(turns) if turn not in self._windows]
        self._do()
        return [self._vectors[text] for text in texts], [self._windows[turn] for turn in turns]

    def query(self, text: str) -> Query:
        """A question as the searcher takes it."""
        if text not in self._queries:
            self._questions.append(text)
            self._do()
        return self._queries[text]

    def know(self, query: Query) -> None:
        """Take a question that was encoded before."""
        self._queries[query.text] = query

    def complete(
        self, messages: Sequence[Mapping[str, str]], schema: Mapping[str, Any] | None = None
    ) -> Any:
        """A model's reply; the same question is asked once per call."""
        key = dumps([[dict(m) for m in messages], schema])
        if key not in self._replies:
            self._asked.append((key, messages, schema))
            self._do()
        reply = self._replies[key]
        if isinstance(reply, LLMError):
            raise reply
        return reply

    def _do(self) -> None:
        if not (self._texts or self._turns or self._questions or self._asked):
            return
        if self.deferring:
            raise Pending
        self.settle()

    def settle(self) -> None:
        """Do what is missing."""
        texts, self._texts = list(dict.fromkeys(self._texts)), []
        if texts:
            self._vectors.update(zip(texts, self._embedder.encode(texts), strict=True))
        turns, self._turns = list(dict.fromkeys(self._turns)), []
        for around, at in _by_run(turns):
            found = self._embedder.encode_in_context(around, [place for place, _ in at])
            self._windows.update(zip((turn for _, turn in at), found, strict=True))
        questions, self._questions = self._questions, []
        for text in questions:
            self._queries[text] = self._embedder.encode_query(text)
        asked, self._asked = self._asked, []
        for key, messages, schema in asked:
            assert self._llm is not None, "a judgement without a model asks nothing"
            try:
                self._replies[key] = self._llm.complete(messages, schema)
            except LLMError as error:  # whoever asked decides what to do without a reply
                self._replies[key] = error


def _by_run(turns: Sequence[tuple[tuple[str, ...], int]]):
    """Turns that follow one another are encoded in one call: (texts, [(place, turn), ...]).

    Within its run each turn has exactly the neighbours that it was given.
    """
    runs: list[tuple[list[str], list[tuple[int, tuple[tuple[str, ...], int]]]]] = []
    for turn in turns:
        around, at = turn
        if runs:
            texts, places = runs[-1]
            last = places[-1][0]
            first = last + 1 - at  # where `around` would begin in the run
            shared = tuple(texts[first:]) if first >= 0 else ()
            more = around[len(shared) :]
            sees_enough = first == 0 or at >= BEFORE
            seen_enough = not more or len(texts) - 1 - last >= AFTER
            if shared and shared == around[: len(shared)] and sees_enough and seen_enough:
                texts += more
                places.append((last + 1, turn))
                continue
        runs.append((list(around), [(at, turn)]))
    return runs
