"""MemPrompt (182): what a user once clarified is said again before a question like that one.

Keeps    for each question that was misunderstood, what its asker meant by it.
Form     a memory of kind "feedback": its text is the question without what it is about, its
         metadata the question and the feedback. A newer feedback on the same text replaces it.
Bytes    text + 4d, the text three times: question, what is left of it, feedback.
Source   A. Madaan, N. Tandon, P. Clark, Y. Yang, "Memory-assisted prompt editing to improve GPT-3
         after deployment", 2022; authors' code read.
Departs  6 letters are enough to turn one short question into another, so that "closest" also asks
         for a distance below a fifth of the longer one. Words such as "same" and "not" stay in a
         question. "semantic" takes the memory's embedder as it is, or below a linear map that is
         learnt in closed form from pairs of questions; no encoder is trained.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from holdfast.errors import UsageError, unknown
from holdfast.longterm.language.llm import LLM, Usage
from holdfast.longterm.memory import Memory, SpaceLike
from holdfast.longterm.records import Add, Change, Item, Revise, text_hash
from holdfast.longterm.retrieval.embed import Embedder
from holdfast.longterm.retrieval.terms import STOP, words
from holdfast.longterm.retrieval.vectors import unit
from holdfast.longterm.store.view import View

KIND = "feedback"
MATCHES = ("closest", "semantic")
DISTANCE, COSINE, SHARE = 6, 0.6, 0.2
# Without these "the same as" and "the opposite of", "before" and "after" would read alike.
_MEANT = frozenset(
    ("same", "not", "no", "before", "after", "above", "below", "up", "down", "in", "out", "more")
)
_ABOUT = re.compile(r'<[^<>]*>|"[^"]*"|“[^”]*”')


@dataclass(frozen=True, eq=False)
class Head:
    """A linear map f32[d,d] of embeddings, and the cosine after it above which two are alike."""

    matrix: np.ndarray
    threshold: float


@dataclass(frozen=True)
class Feedback:
    """What was clarified before: on which question, how far that is from the one that is asked."""

    id: str
    query: str
    text: str
    distance: float


class FeedbackMemory:
    """Clarifications by the questions that needed them.

    Args:
        match: "closest" compares spellings, "semantic" embeddings.
        threshold: an edit distance below which (closest; default 6), or a cosine above which
            (semantic; default 0.6, with a head its own) questions are taken for alike.
        head: of `learn_head`, for "semantic".
        space: whose feedback this is; the memory's own by default.
    """

    def __init__(
        self,
        memory: Memory,
        *,
        match: str = "closest",
        threshold: float | None = None,
        head: Head | None = None,
        space: SpaceLike = None,
    ):
        if match not in MATCHES:
            raise unknown("match of questions", match, MATCHES)
        if head is not None and match != "semantic":
            raise UsageError('a head maps embeddings; use it with match="semantic"')
        if threshold is None:
            semantic = head.threshold if head is not None else COSINE
            threshold = DISTANCE if match == "closest" else semantic
        if match == "closest" and threshold < 1:
            raise UsageError(f"threshold={threshold} finds no question; give 1 letter or more")
        if match == "semantic" and not 0 < threshold < 1:
            raise UsageError(f"threshold={threshold} is no cosine in (0, 1); 0.6 is the default")
        self.memory, self.match, self.threshold = memory, match, threshold
        self.head, self.space = head, space

    def feedback(self, query: str, text: str) -> str:
        """Remember what was meant by a question; returns the memory's id.

        Raises:
            UsageError: no question, a question of nothing but what it is about, or no feedback.
        """
        if not query.strip():
            raise UsageError("feedback needs the question that it clarifies; pass it as query")
        if not text.strip():
            raise UsageError(f"the feedback on {query!r} is empty; say what was meant")
        key = normalised(query)
        if not key:
            raise UsageError(
                f"{query!r} has no words but what it is about, so that no other question is like "
                "it; pass the question as it was asked"
            )
        said = {"query": query, "feedback": text}

        def decide(view: View) -> list[Change]:
            same = [item for item in view.with_text(text_hash(key)) if item.kind == KIND]
            if same:
                return [Revise(item.id, metadata=said, why="newer feedback") for item in same]
            return [Add(key, KIND, metadata=said)]

        return self.memory.transact(decide, space=self.space)[0]

    def lookup(self, query: str) -> Feedback | None:
        """The feedback on the question that is most like this one, if any is like it."""
        key = normalised(query)
        if not key:
            return None
        with self.memory.reading(space=self.space) as view:
            return self._closest(view, key) if self.match == "closest" else self._near(view, key)

    def _closest(self, view: View, key: str) -> Feedback | None:
        best: tuple[int, Item] | None = None
        for item in view.items(kind=KIND, newest=True):
            below = min(self.threshold, SHARE * max(len(key), len(item.text)))
            if best is not None:
                below = min(below, best[0])
            distance = edits(key, item.text, max(0, math.ceil(below) - 1))
            if distance is not None and (best is None or distance < best[0]):
                best = distance, item
        return None if best is None else _found(best[1], best[0])

    def _near(self, view: View, key: str) -> Feedback | None:
        if self.head is None:
            nearest = view.nearest(key, 1, kinds=(KIND,))
        else:
            items = view.items(kind=KIND)
            if not items:
                return None
            stored = [view.vector(item.id) for item in items]
            rows = unit(np.stack([*stored, view.embed([key])[0]]) @ self.head.matrix)
            cosines = rows[:-1] @ rows[-1]
            best = int(cosines.argmax())
            nearest = [(items[best], float(cosines[best]))]
        if not nearest or nearest[0][1] <= self.threshold:
            return None
        item, cosine = nearest[0]
        return _found(item, 1 - cosine)

    def enhanced(self, messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
        """A conversation with the feedback on its last question; as it was if there is none."""
        made = [dict(message) for message in messages]
        for message in reversed(made):
            if message["role"] == "user":
                found = self.lookup(message["content"])
                if found is not None:
                    message["content"] = clarified(message["content"], found.text)
                break
        return made

    def wrap(self, llm: LLM, examples: Sequence[tuple[str, str, str]] = ()) -> "WithFeedback":
        """A model whose questions are clarified.

        Args:
            examples: (question, clarification, answer), shown before each conversation. An answer
                should say what it took the question for, so that its reader can object.
        """
        return WithFeedback(self, llm, examples)


class WithFeedback:
    """An `LLM` that is asked with what a `FeedbackMemory` knows of the question."""

    def __init__(
        self, feedback: FeedbackMemory, llm: LLM, examples: Sequence[tuple[str, str, str]] = ()
    ):
        self.feedback, self.llm = feedback, llm
        self._shown = [
            message
            for question, meaning, answer in examples
            for message in (
                {"role": "user", "content": clarified(question, meaning)},
                {"role": "assistant", "content": answer},
            )
        ]

    @property
    def usage(self) -> Usage:
        return self.llm.usage

    def complete(
        self, messages: Sequence[Mapping[str, str]], schema: Mapping[str, Any] | None = None
    ) -> str | dict[str, Any]:
        """The model's reply; system messages stay before the examples."""
        made = self.feedback.enhanced(messages)
        first = next((i for i, one in enumerate(made) if one["role"] != "system"), len(made))
        return self.llm.complete([*made[:first], *self._shown, *made[first:]], schema)


def clarified(question: str, meaning: str) -> str:
    """A question with what is meant by it, as models are shown it."""
    return f"{question} || clarification: {meaning}"


def normalised(query: str) -> str:
    """A question without what it is about, in `<...>` or quotes, and without stop words."""
    bare = words(_ABOUT.sub(" ", query))
    return " ".join(word for word in bare if word not in STOP or word in _MEANT)


def edits(a: str, b: str, limit: int) -> int | None:
    """Letters to insert, remove or replace to make `b` of `a`; None above `limit`."""
    if abs(len(a) - len(b)) > limit:
        return None
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (letter != other))
        if min(row) > limit:
            return None
    return row[-1] if row[-1] <= limit else None


def learn_head(
    embedder: Embedder, same: Sequence[tuple[str, str]], different: Sequence[tuple[str, str]]
) -> Head:
    """A map in which questions of one type are alike, from pairs of one and of two types.

    Directions that differ within a type are divided by how much they do, and of what remains those
    are kept in which two types differ more than one. The threshold is the cosine that tells the
    pairs apart best.

    Raises:
        UsageError: no pair of one of the two sorts.
    """
    if not same or not different:
        raise UsageError(
            f"{len(same)} pairs of one type and {len(different)} of two types are given; a head "
            "needs both"
        )
    alike, apart = (
        np.stack([embedder.encode([normalised(text) for text in pair]) for pair in pairs])
        for pairs in (same, different)
    )
    within, between = (
        gaps.T @ gaps / len(gaps)
        for gaps in ((pairs[:, 0] - pairs[:, 1]).astype(np.float64) for pairs in (alike, apart))
    )
    spread, axes = np.linalg.eigh(within)
    # Few pairs leave most directions without any spread; the mean keeps those finite.
    shrink = (axes * (spread.clip(0) + spread.clip(0).mean() + 1e-9) ** -0.5) @ axes.T
    gain, axes = np.linalg.eigh(shrink @ (between - within) @ shrink)
    matrix = (shrink @ axes * gain.clip(0) ** 0.5).astype(np.float32)
    cosines = [np.sum(unit(p[:, 0] @ matrix) * unit(p[:, 1] @ matrix), 1) for p in (alike, apart)]
    tried = np.unique(np.concatenate(cosines).clip(0.001, 0.999))
    right = [np.mean(cosines[0] > t) + np.mean(cosines[1] <= t) for t in tried]
    return Head(matrix, float(tried[int(np.argmax(right))]))


def _found(item: Item, distance: float) -> Feedback:
    return Feedback(item.id, item.metadata["query"], item.metadata["feedback"], float(distance))
