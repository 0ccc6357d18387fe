"""Typed calls about language, and rules that answer them.

Policies ask these instead of writing prompts. `Rules` needs no model and answers the same every
time; `prompted.Prompted` asks a model. English only.
"""

import functools
import heapq
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol, overload

from holdfast.errors import UsageError
from holdfast.longterm.language import extract, slots
from holdfast.longterm.language.extract import Fact, Triple
from holdfast.longterm.language.tokens import sentences
from holdfast.longterm.language.wording import content, names, negated, numbers, root
from holdfast.longterm.retrieval.terms import STOP, stem, words

if TYPE_CHECKING:
    from holdfast.longterm.retrieval.embed import Embedder

PASS, REPLACE, APPEND, DELETE = "PASS", "REPLACE", "APPEND", "DELETE"
RELATIONS = ("Changes", "Cause", "Reason", "HinderedBy", "React", "Want", "SameTopic")

_ENDED = re.compile(
    r"\b(?:no longer|stopped|quit|gave up|given up|recovered|resolved|cured|healed|finished|over"
    r"|got rid of|gone|cancel+ed|broke up|any ?more|used to)\b",
    re.I,
)
_CUES = {
    "HinderedBy": r"couldn['’]t|could not|unable|prevent|had to cancel|cancel+ed|postpone|delay"
    r"|failed to|didn['’]t (?:make|manage|get)|despite|injur|got in the way|had to miss",
    "Cause": r"as a result|therefore|thanks to|led to|which made|made (?:me|him|her|them)"
    r"|consequently|so now|inspired|that['’]s why|ended up",
    "Reason": r"\bbecause\b|\bdue to\b|in order to|so that|the reason|\bsince\b (?!\d|last)",
    "Want": r"\bwants?\b|\bhopes?\b|\bhoping\b|\bplans?\b|\bplanning\b|\bwish|would like|['’]d like"
    r"|going to|gonna|looking forward|dream",
    "React": r"\bfe(?:el|els|lt)\b|\bhappy\b|\bsad\b|excite|\bproud\b|grateful|thankful|\bupset\b"
    r"|reliev|worr|amaz|\bangry\b|\bnervous\b|\bscared\b|thrill|disappoint|touched|surprise|glad",
}
_CUES_RE = {name: re.compile(pattern, re.I) for name, pattern in _CUES.items()}


class FallbackWarning(UserWarning):
    """A model's answer could not be used; the fallback's was."""


class Judgement(Protocol):
    """Answers about texts that policies need; none of them changes anything."""

    def facts(
        self, text: str, when: datetime | None = None, speaker: str | None = None
    ) -> list[Fact]:
        """What `text`, said at `when`, states, each fact with the bytes that say it."""
        ...

    def triples(
        self, text: str, when: datetime | None = None, speaker: str | None = None
    ) -> list[Triple]:
        """The affirmed facts as head, relation, tail."""
        ...

    def keywords(self, texts: str | Sequence[str], n: int) -> list[str]:
        """At most `n` distinct words, the most telling first."""
        ...

    def summarise(
        self, texts: Sequence[str], budget: int, count: Callable[[str], int] = ...
    ) -> str:
        """One text of at most `budget` by `count` (words by default)."""
        ...

    @overload
    def judge(self, question: str, options: str) -> float: ...

    @overload
    def judge(self, question: str, options: Sequence[str]) -> str: ...

    def judge(self, question: str, options: str | Sequence[str]) -> float | str:
        """How well one text answers, in 0..1; of several, the one that answers best."""
        ...

    def relate(self, a: str, b: str) -> str | None:
        """What the later `b` is to the earlier `a`: one of `RELATIONS`, or None."""
        ...

    def same(self, a: str | Fact, b: str | Fact) -> bool:
        """Whether both state the same."""
        ...

    def contradicts(self, a: str | Fact, b: str | Fact) -> bool:
        """Whether not both can hold at one time."""
        ...

    def update(self, m: str | Fact, s: str | Fact) -> str:
        """What a new statement `s` does to the remembered `m`: PASS, REPLACE, APPEND or DELETE."""
        ...

    def ask(
        self, task: str, given: Mapping[str, Any], schema: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """A model's answer to a question of a policy's own; None where there is none."""
        ...


def count_words(text: str) -> int:
    """The number of words between white space; the default measure of a budget."""
    return len(text.split())


class Rules:
    """Every call by deterministic rules.

    Args:
        embedder: adds likeness of meaning to `judge`, `same` and `relate`; words alone decide
            without it.
        background: texts that say which words are common, for `keywords` and `judge`.
    """

    def __init__(self, embedder: "Embedder | None" = None, background: Iterable[str] | None = None):
        self.embedder = embedder
        self._seen: Counter[str] = Counter()
        self._documents = 0
        for text in background or ():
            self._seen.update(set(content(text)))
            self._documents += 1

    def facts(
        self, text: str, when: datetime | None = None, speaker: str | None = None
    ) -> list[Fact]:
        return extract.facts(text, when, speaker)

    def triples(
        self, text: str, when: datetime | None = None, speaker: str | None = None
    ) -> list[Triple]:
        return extract.triples(text, when, speaker)

    def keywords(self, texts: str | Sequence[str], n: int) -> list[str]:
        """By tf-idf against the background, or the given texts themselves; ties as they appear."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        tf: Counter[str] = Counter()
        shown: dict[str, Counter[str]] = {}
        seen: Counter[str] = Counter()
        for text in texts:
            terms = [(w, root(w)) for w in words(text) if _telling(w)]
            seen.update({s for _, s in terms})
            for word, one in terms:
                tf[one] += 1
                shown.setdefault(one, Counter())[word] += 1
        if self._documents:
            weight = {s: tf[s] * self._idf(s) for s in tf}
        else:
            # A few texts say little about what is common: the idf only breaks up even counts.
            weight = {s: tf[s] * math.log(1 + (1 + len(texts)) / seen[s]) for s in tf}
        best = sorted(tf, key=lambda s: -weight[s])[:n]
        return [shown[s].most_common(1)[0][0] for s in best]

    def summarise(
        self,
        texts: Sequence[str],
        budget: int,
        count: Callable[[str], int] = count_words,
    ) -> str:
        """Extractive: sentences that hold most of what the texts repeat, in their own order.

        Raises:
            UsageError: the budget is below 1.
        """
        if budget < 1:
            raise UsageError(f"budget={budget} holds no sentence; give at least 1")
        pieces = list(dict.fromkeys(t[lo:hi] for t in texts for lo, hi in sentences(t)))
        terms = [set(content(p)) for p in pieces]
        seen = Counter(s for one in terms for s in one)
        left = dict.fromkeys(seen, 1.0)

        def gain(i: int) -> float:
            asks = 0.3 if pieces[i].endswith("?") else 1.0
            held = sum(left[s] * (1 + math.log(seen[s])) for s in terms[i])
            return asks * held / max(sizes[i], 4) ** 0.5

        sizes = [count(piece) for piece in pieces]
        chosen: list[int] = []
        used = 0
        # Gains only fall, so the largest that is still true when looked at again is the best.
        heap = [(-gain(i), i) for i, one in enumerate(terms) if one]
        heapq.heapify(heap)
        while heap:
            old, i = heapq.heappop(heap)
            if sizes[i] > budget - used:
                continue
            new = -gain(i)
            if heap and (new, i) > heap[0] and new > old:
                heapq.heappush(heap, (new, i))
                continue
            # Counts need not add up (a tokenizer may join words): measure the whole.
            whole = count(" ".join(pieces[k] for k in sorted([*chosen, i])))
            if whole <= budget:
                chosen.append(i)
                used = whole
                for s in terms[i]:
                    left[s] *= 0.1  # what has been said counts for little when it is said again
        return " ".join(pieces[i] for i in sorted(chosen))

    def judge(self, question: str, options: str | Sequence[str]) -> float | str:
        """Half the question's words found in the text, weighed by rarity, half the cosine."""
        if isinstance(options, str):
            return self._relevance(question, [options])[0]
        if not options:
            raise UsageError("judge got no options; pass at least one text")
        scores = self._relevance(question, options)
        return options[max(range(len(options)), key=lambda i: (scores[i], -i))]

    def _relevance(self, question: str, texts: Sequence[str]) -> list[float]:
        asked = content(question)
        weights = [self._idf(s) for s in asked]
        held = [set(content(text)) for text in texts]
        total = sum(weights)
        overlap = [
            sum(w for s, w in zip(asked, weights, strict=True) if s in one) / total
            if total
            else 0.0
            for one in held
        ]
        if self.embedder is None:
            return overlap
        vectors = self.embedder.encode([question, *texts])
        cosines = vectors[1:] @ vectors[0]
        return [
            min(1.0, 0.5 * o + 0.5 * max(0.0, float(c)))
            for o, c in zip(overlap, cosines, strict=True)
        ]

    def _idf(self, term: str) -> float:
        n = self._seen[term]
        return math.log(1 + (self._documents - n + 0.5) / (n + 0.5)) if self._documents else 1.0

    def relate(self, a: str, b: str) -> str | None:
        if self.contradicts(a, b):
            return "Changes"
        one, two = set(content(a)), set(content(b))
        shared = one & two
        # Two texts about one person are not about one thing.
        about = shared - {root(n.lower()) for text in (a, b) for n in names(text)[:1]}
        near = len(shared) / max(1, min(len(one), len(two))) if about and len(shared) > 1 else 0.0
        if self.embedder is not None and near < 0.2:
            vectors = self.embedder.encode([a, b])
            near = max(near, float(vectors[0] @ vectors[1]) - 0.3)
        if near < 0.2:
            return None
        for name, cue in _CUES_RE.items():
            if cue.search(b):
                return name
        return "SameTopic"

    def same(self, a: str | Fact, b: str | Fact) -> bool:
        left, right = text_of(a), text_of(b)
        if negated(left) != negated(right) or numbers(left) != numbers(right):
            return False
        one, two = set(content(left)), set(content(right))
        if one == two and (one or left == right):
            return True
        for f in _facts(a):
            for g in _facts(b):
                if _slot(f) == _slot(g) and _value(f) == _value(g) and f.negated == g.negated:
                    return True
        if self.contradicts(a, b):
            return False
        union = one | two
        if union and len(one & two) / len(union) >= 0.8:
            return {n.lower() for n in names(left)} == {n.lower() for n in names(right)}
        if self.embedder is not None and one & two:
            vectors = self.embedder.encode([left, right])
            return float(vectors[0] @ vectors[1]) >= 0.9
        return False

    def contradicts(self, a: str | Fact, b: str | Fact) -> bool:
        """Same slot with another value where one is allowed, a denial, or an opposite word."""
        first, second = _facts(a), _facts(b)
        for f in first:
            for g in second:
                if _contrary(f, g):
                    return True
        left, right = text_of(a), text_of(b)
        one, two = set(content(left)), set(content(right))
        if not one or not two:
            return False
        if negated(left) != negated(right):
            core = len(one & two) / min(len(one), len(two))
            if core >= 0.75 and len(one & two) >= 2:
                return not (first and second and _apart(first, second))
        ours, theirs = words(left), words(right)
        for pair in slots.ANTONYMS:
            x, y = tuple(pair)
            if (x in ours and y in theirs) or (y in ours and x in theirs):
                rest = {stem(x), stem(y)}
                kept, other = one - rest, two - rest
                if kept and kept == other and negated(left) == negated(right):
                    return True
        return False

    def update(self, m: str | Fact, s: str | Fact) -> str:
        if self.same(m, s):
            return PASS
        old, new = text_of(m), text_of(s)
        if self.contradicts(m, s):
            ends = any(f.negated for f in _facts(s)) or (negated(new) and not negated(old))
            if not ends and _ENDED.search(new) and not _ENDED.search(old):
                ends = True
            # That one likes something no more is worth knowing; that a state is over is not.
            taste = any(f.relation in slots.OPPOSITE for f in _facts(s))
            return DELETE if ends and not taste else REPLACE
        one, two = set(content(old)), set(content(new))
        ended = _ENDED.search(new) and not _ENDED.search(old)
        if ended and len(one & two) >= 0.6 * len(one) > 0 and not _apart(_facts(m), _facts(s)):
            return DELETE
        if negated(old) == negated(new) and numbers(new) <= numbers(old) and two and two <= one:
            return PASS
        if negated(old) == negated(new) and numbers(old) <= numbers(new) and one and one < two:
            return REPLACE
        return APPEND

    def ask(
        self, task: str, given: Mapping[str, Any], schema: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """None: no rule answers any question."""
        return None


def _telling(word: str) -> bool:
    return len(word) > 2 and word not in STOP and not word.isdigit()


def text_of(one: str | Fact) -> str:
    """The sentence that a statement is."""
    return one if isinstance(one, str) else one.text


def _facts(one: str | Fact) -> Sequence[Fact]:
    return _stated(one) if isinstance(one, str) else [one]


# Policies compare a new statement with many old ones.
@functools.lru_cache(maxsize=4096)
def _stated(text: str) -> tuple[Fact, ...]:
    return tuple(extract.facts(text))


def _slot(fact: Fact) -> tuple[str, str]:
    return fact.subject.lower(), fact.relation


def _value(fact: Fact) -> frozenset[str]:
    return frozenset(content(fact.object)) or frozenset(words(fact.object))


def _overlaps(f: Fact, g: Fact) -> bool:
    """Whether both hold at some time; one that only began replaces, so it overlaps."""
    return not (
        (f.valid_to is not None and g.valid_from is not None and f.valid_to <= g.valid_from)
        or (g.valid_to is not None and f.valid_from is not None and g.valid_to <= f.valid_from)
    )


def _contrary(f: Fact, g: Fact) -> bool:
    if f.subject.lower() != g.subject.lower() or not _overlaps(f, g):
        return False
    values = _value(f), _value(g)
    close = values[0] <= values[1] or values[1] <= values[0]
    if f.relation == g.relation:
        if f.negated != g.negated:
            return close
        if f.negated:
            return False
        counted = numbers(f.object), numbers(g.object)
        if counted[0] != counted[1] and all(counted):
            bare = [v - c for v, c in zip(values, counted, strict=True)]
            counts = bool(bare[0]) and bare[0] == bare[1]
            return counts or (f.single and g.single)
        return f.single and g.single and not close
    if slots.OPPOSITE.get(f.relation) == g.relation:
        return close and f.negated == g.negated
    return False


def _apart(first: Sequence[Fact], second: Sequence[Fact]) -> bool:
    """Whether no two facts are about one subject."""
    return not {f.subject.lower() for f in first} & {f.subject.lower() for f in second}
