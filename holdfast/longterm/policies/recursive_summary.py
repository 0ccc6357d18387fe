"""Recursive summarisation (130): one text, made of itself and of each session that has ended.

Keeps    a summary of at most `budget` tokens and all its past versions; turns as they were said,
         found until they are folded in.
Form     sentences, each with the turns that it comes from.
Bytes    about 4 per token of the budget, times the versions; text + 4*d + row for each turn.
Source   Q. Wang et al., "Recursively Summarizing Enables Long-Term Dialogue Memory in Large
         Language Models", 2023.
Departs  without a model rules keep facts, the newest of those that exclude one another; the budget
         is enforced: a model that overshoots is asked once more, then cut at a sentence.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from holdfast.errors import UsageError
from holdfast.longterm import sessions
from holdfast.longterm.budget import Context, pack, words
from holdfast.longterm.language import extract
from holdfast.longterm.language.extract import Fact
from holdfast.longterm.language.judgement import content
from holdfast.longterm.language.llm import APPEND, DELETE, PASS, REPLACE, Rules
from holdfast.longterm.language.shapes import listing, record
from holdfast.longterm.policy import Policy, Traits
from holdfast.longterm.records import Add, Change, Hit, Item, Purge, Retire, Revise

if TYPE_CHECKING:
    from holdfast.longterm.store.view import View

SUMMARY = "summary"
LEAST = 8  # tokens of a short sentence
HALF = 2  # sessions after which a sentence counts half as much
SENTENCES = 20  # that a model is asked for at most

_ANSWER = record(sentences=listing({"type": "string"}))
_TASK = (
    "`memory` is what is remembered of earlier sessions, `session` what was said since. Write the "
    "new memory: facts and traits of everyone who speaks, in the third person, what is new "
    "integrated and what is outdated left out; at most {sentences} sentences and {budget} words."
)


@dataclass(frozen=True)
class Sentence:
    """A sentence of the summary.

    Attributes:
        turns: where it comes from.
        folded: the number of the fold that said it last.
        count: how often it was said.
        fact: subject, relation, object, negated and single, where it states one.
    """

    text: str
    turns: tuple[str, ...]
    folded: int
    count: int = 1
    fact: dict[str, Any] | None = None

    @classmethod
    def of(cls, data: dict[str, Any]) -> "Sentence":
        return cls(**{**data, "turns": tuple(data["turns"])})

    @property
    def stated(self) -> Fact | str:
        if self.fact is None:
            return self.text
        return Fact(text=self.text, start=0, end=len(self.text.encode()), **self.fact)


class RecursiveSummary(Policy):
    """Fold each session into the summary when it ends or another begins, long ones in pieces.

    Args:
        budget: tokens of the summary at most.
        window: tokens of a session that are folded in at once.
        count: tokens of a text; words and punctuation marks by default.

    Raises:
        UsageError: a budget that holds no sentence, or a window below 1.
    """

    traits = Traits(
        types=("semantic",),
        form="summaries",
        processes=("encode", "consolidate", "store", "retrieve"),
        conflict="supersedes",
    )

    def __init__(
        self, *, budget: int = 400, window: int = 2000, count: Callable[[str], int] = words
    ):
        if budget < LEAST:
            raise UsageError(f"budget={budget} holds no sentence; give at least {LEAST} tokens")
        if window < 1:
            raise UsageError(f"window={window} folds nothing in; give at least 1 token")
        self.budget, self.window, self.count = budget, window, count

    def summary(self, view: "View") -> str:
        """The summary as it is now; empty before the first session has ended."""
        return next((item.text for item in view.items(kind=SUMMARY)), "")

    def history(self, view: "View") -> list[str]:
        """All versions of the summary, oldest first."""
        return [v.text for item in view.items(kind=SUMMARY) for v in view.versions(item.id)]

    def link(self, view: "View", items: Sequence[Item]) -> list[Change]:
        begun = sessions.first([item for item in items if _is_turn(item)])
        open_ = sessions.begun(view)
        ended = [session for session in open_ if begun and session not in begun]
        still = {session: at for session, at in open_.items() if session not in ended}
        return [*self._fold(view, open_, ended), *sessions.noted(view, {**begun, **still})]

    def summarise(self, view: "View", session: str | None) -> list[Change]:
        open_ = sessions.begun(view)
        ended = [s for s in open_ if session in (None, s)]
        still = {s: at for s, at in open_.items() if s not in ended}
        return [*self._fold(view, open_, ended), *sessions.noted(view, still)]

    def removed(self, view: "View", gone: Sequence[str], *, purged: bool) -> list[Change]:
        """After a purge the summary is made anew without what came from there, its past erased."""
        lost = set(gone)
        for item in view.items(kind=SUMMARY) if purged else ():
            past = [s for v in view.versions(item.id) for s in v.data["sentences"]]
            if any(lost & set(sentence["turns"]) for sentence in past):
                kept = [s for s in _sentences(item) if not lost & set(s.turns)]
                return [
                    Purge(item.id, "a turn was purged"),
                    *_written(None, kept, item.data["folds"]),
                ]
        return []

    def retrieve(self, view: "View", query: str, limit: int) -> list[Hit]:
        """The summary, and turns of sessions that have not ended."""
        hits = view.search(query, 1, kinds=(SUMMARY,)) if view.count(SUMMARY) else []
        open_ = sessions.begun(view)
        turns = [turn.id for turn in sessions.turns(view, open_, open_, _is_turn)]
        if turns:
            hits += view.search(query, limit, among=turns)
        return hits[:limit]

    def compose(
        self, view: "View", query: str, budget: int, count: Callable[[str], int]
    ) -> Context:
        """The summary first, as many whole sentences of it as fit."""
        hits = self.retrieve(view, query, 50)
        if hits and hits[0].kind == SUMMARY and not pack(hits[:1], budget, count).ids:
            spans = extract.sentences(hits[0].text)
            parts = (replace(hits[0], text=hits[0].text[:end]) for _, end in reversed(spans))
            short = [part for part in parts if pack([part], budget, count).ids]
            hits = [*short[:1], *hits[1:]]
        return pack(hits, budget, count)

    def _fold(self, view: "View", open_: Any, ended: Sequence[str | None]) -> list[Change]:
        turns = sessions.turns(view, open_, ended, _is_turn)
        if not turns:
            return []
        item = next(iter(view.items(kind=SUMMARY)), None)
        folds = item.data["folds"] if item else 0
        sentences = _sentences(item) if item else []
        for piece in self._pieces(turns):
            folds += 1
            asked = self._asked(view, sentences, piece, folds)
            if asked is None:
                asked = self._by_rules(sentences, piece, folds)
            sentences = self._cut(asked, folds)
        return _written(item, sentences, folds)

    def _pieces(self, turns: Sequence[Item]) -> list[list[Item]]:
        pieces: list[list[Item]] = []
        room = 0
        for turn in turns:
            size = self.count(turn.document)
            if not pieces or size > room:
                pieces.append([])
                room = self.window
            pieces[-1].append(turn)
            room -= size
        return pieces

    def _asked(
        self, view: "View", old: Sequence[Sentence], piece: Sequence[Item], fold: int
    ) -> list[Sentence] | None:
        """A model's sentences, each with whatever it shares words with; None without a model."""
        task = _TASK.format(sentences=SENTENCES, budget=self.budget)
        given: dict[str, Any] = {
            "memory": [sentence.text for sentence in old],
            "session": [turn.document for turn in piece],
        }
        answer = view.judgement.ask(task, given, _ANSWER)
        if answer is not None and self.count(" ".join(answer["sentences"])) > self.budget:
            given["too_long"] = answer["sentences"]
            answer = view.judgement.ask(task, given, _ANSWER) or answer
        if answer is None:
            return None
        origins = [(set(content(s.text)), s.turns) for s in old]
        origins += [(set(content(turn.document)), (turn.id,)) for turn in piece]
        found = []
        for text in dict.fromkeys(s.strip() for s in answer["sentences"] if s.strip()):
            said = set(content(text))
            turns = dict.fromkeys(t for terms, some in origins if terms & said for t in some)
            found.append(Sentence(text, tuple(turns), fold))
        return found

    def _by_rules(
        self, old: Sequence[Sentence], piece: Sequence[Item], fold: int
    ) -> list[Sentence]:
        """The old sentences with the facts of a piece, the newer of two that exclude each other."""
        rules, kept = Rules(), list(old)
        for turn in piece:
            for fact in rules.facts(turn.text, turn.valid_from, turn.speaker):
                stated = asdict(fact)
                new = Sentence(
                    _ended(fact.text), (turn.id,), fold,
                    fact={name: stated[name] for name in _STATED},
                )  # fmt: skip
                kept = _merged(rules, kept, new)
        return kept

    def _cut(self, sentences: Sequence[Sentence], fold: int) -> list[Sentence]:
        """The most worth keeping that fit, in their order."""
        ranked = sorted(range(len(sentences)), key=lambda i: (-_worth(sentences[i], fold), -i))
        kept: list[int] = []
        for i in ranked:
            trial = sorted([*kept, i])
            if self.count(" ".join(sentences[j].text for j in trial)) <= self.budget:
                kept = trial
        return [sentences[i] for i in kept]


_STATED = ("subject", "relation", "object", "negated", "single")


def _is_turn(item: Item) -> bool:
    return item.kind not in (SUMMARY, sessions.STATE)


def _sentences(item: Item) -> list[Sentence]:
    return [Sentence.of(data) for data in item.data["sentences"]]


def _written(item: Item | None, sentences: Sequence[Sentence], folds: int) -> list[Change]:
    """The changes after which the summary says this."""
    text = " ".join(sentence.text for sentence in sentences)
    data = {"folds": folds, "sentences": [asdict(sentence) for sentence in sentences]}
    if item is None:
        return [Add(text, kind=SUMMARY, data=data)] if text else []
    if not text:
        return [Retire(item.id, "nothing of it holds any more")]
    return [Revise(item.id, text=text, data=data, why=f"fold {folds}")]


def _merged(rules: Rules, kept: Sequence[Sentence], new: Sentence) -> list[Sentence]:
    operators = [_operator(rules, old, new) for old in kept]
    if PASS in operators:
        place = operators.index(PASS)
        old = kept[place]
        turns = tuple(dict.fromkeys((*old.turns, *new.turns)))
        again = replace(old, turns=turns, folded=new.folded, count=old.count + 1)
        return [*kept[:place], again, *kept[place + 1 :]]
    staying = [old for old, op in zip(kept, operators, strict=True) if op not in (REPLACE, DELETE)]
    return staying if DELETE in operators else [*staying, new]


def _operator(rules: Rules, old: Sentence, new: Sentence) -> str:
    # Two facts of different people have nothing to do with each other.
    if old.fact and new.fact and old.fact["subject"] != new.fact["subject"]:
        return APPEND
    return rules.update(old.stated, new.stated)


def _worth(sentence: Sentence, fold: int) -> float:
    """Recency, frequency and how much it says."""
    recency = 0.5 ** ((fold - sentence.folded) / HALF)
    return recency * (1 + math.log(sentence.count)) * min(len(content(sentence.text)), 8)


def _ended(text: str) -> str:
    return text if text[-1] in ".!?" else text + "."
