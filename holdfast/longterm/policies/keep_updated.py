"""Keep Me Updated (145): after each session, every old sentence meets every new one.

Keeps    sentences that hold now; turns as they were said, found until their session is digested.
Form     sentences in the third person with the bytes of the turn that say so; those that no longer
         hold are retired, so that any past memory can be restored.
Bytes    text and 4*d for each sentence and each turn, a row for each, retired ones included.
Source   S. Bae et al., "Keep Me Updated! Memory Management in Long-term Conversations", 2022.
Departs  rules or a language model decide, no fine-tuned classifier; a model is asked once for all
         pairs. What a session says against itself is settled first, in the order in which it was
         said. Pairs with a cosine below 0.3 are kept apart only if they fill different slots too.
"""

import warnings
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

from holdfast.errors import UsageError, unknown
from holdfast.longterm import sessions
from holdfast.longterm.language.extract import Fact
from holdfast.longterm.language.llm import APPEND, DELETE, PASS, REPLACE, FallbackWarning, Rules
from holdfast.longterm.language.shapes import listing, record
from holdfast.longterm.policy import Policy, Traits, as_turn
from holdfast.longterm.records import Add, Change, Hit, Item, Retire, Source, Turn

if TYPE_CHECKING:
    from holdfast.longterm.store.view import View

TURN, SENTENCE = "turn", "fact"
OPERATORS = (PASS, REPLACE, APPEND, DELETE)
NO_SLOT = ("", "")
STATED = ("subject", "relation", "object", "negated", "single")
FAR = 0.3  # cosine below which two sentences have nothing to do with each other
NEAREST = 5  # old sentences that a model is shown for each turn, besides those near by rules
PAIRS = 20_000  # old times new sentences, above which only the nearest old ones are looked at

_STRING, _NUMBER = {"type": "string"}, {"type": "integer"}
_ANSWER = record(
    sentences=listing(
        record(
            text=_STRING,
            turn=_NUMBER,
            operations=listing(record(number=_NUMBER, operation={"enum": list(OPERATORS)})),
        )
    )
)
_TASK = (
    "Summarise the session in short sentences in the third person, each with the number of the "
    "turn that says so; leave out what it takes back itself. For each give its operation on the "
    "numbered memories that it concerns. PASS: it adds nothing. REPLACE: it takes the memory's "
    "place. DELETE: it says that the memory's state is over and neither is worth keeping. APPEND: "
    "keep both."
)


@dataclass(frozen=True, eq=False)
class Sentence:
    """A new sentence and the turn, or the given fact, that it comes from.

    Attributes:
        fact: what it states, where rules can read it.
        lasting: False for one that only says that something is over.
    """

    text: str
    turn: Item
    source: Source
    fact: Fact | None = None
    valid_from: datetime | None = None
    lasting: bool = True

    @property
    def data(self) -> dict[str, Any]:
        return _stated(self.fact)


@dataclass(frozen=True)
class Decision:
    """What a new sentence does to an old one."""

    old: Item
    new: Sentence
    operator: str


Old = TypeVar("Old", bound=Hashable)
New = TypeVar("New", bound=Hashable)


def merge(
    old: Collection[Old], new: Collection[New], operators: Mapping[tuple[Old, New], str]
) -> tuple[list[Old], list[New]]:
    """The old and the new sentences that stay; a pair without an operator is APPEND.

    Raises:
        UsageError: an operator that is none of the four.
    """
    for operator in operators.values():
        if operator not in OPERATORS:
            raise unknown("operator", operator, OPERATORS)
    ended = {m for (m, _), operator in operators.items() if operator in (REPLACE, DELETE)}
    dropped = {s for (_, s), operator in operators.items() if operator in (PASS, DELETE)}
    return [m for m in old if m not in ended], [s for s in new if s not in dropped]


class KeepUpdated(Policy):
    """Digest a session when it ends, or another begins; a given fact is digested at once.

    A given fact that adds nothing to what is remembered is retired at once, with the reason.

    Args:
        op: PASS, REPLACE, APPEND or DELETE for an old and a new sentence; by default a language
            model decides where there is one, else rules.
        limit: pairs of sentences that one session may make; above it each new sentence meets only
            its nearest old ones, with a warning where that leaves out near ones.

    Raises:
        UsageError: `limit` below 1.
    """

    traits = Traits(
        types=("semantic",),
        form="facts",
        processes=("encode", "consolidate", "store", "retrieve"),
        conflict="supersedes",
    )

    def __init__(self, *, op: Callable[[str, str], str] | None = None, limit: int = PAIRS):
        if limit < 1:
            raise UsageError(f"limit={limit} compares nothing; give at least 1 pair")
        self.op, self.limit = op, limit

    def write(self, view: "View", turns: Sequence[Turn]) -> list[Change]:
        return [
            as_turn(turn, data=_stated(_read(turn.text)) if turn.kind == SENTENCE else {})
            for turn in turns
        ]

    def link(self, view: "View", items: Sequence[Item]) -> list[Change]:
        sources = view.sources([item.id for item in items])
        given = [i for i in items if i.kind == SENTENCE and not sources[i.id]]
        begun = sessions.first([item for item in items if item.kind == TURN])
        open_ = sessions.begun(view)
        ended = [session for session in open_ if begun and session not in begun]
        changes = self._digest(view, [*sessions.turns(view, open_, ended, _is_turn), *given])
        still = {session: at for session, at in open_.items() if session not in ended}
        return [*changes, *sessions.noted(view, {**begun, **still})]

    def summarise(self, view: "View", session: str | None) -> list[Change]:
        open_ = sessions.begun(view)
        ended = [s for s in open_ if session in (None, s)]
        still = {s: at for s, at in open_.items() if s not in ended}
        changes = self._digest(view, sessions.turns(view, open_, ended, _is_turn))
        return [*changes, *sessions.noted(view, still)]

    def decisions(self, view: "View", session: str | None = None) -> list[Decision]:
        """What the end of a session (None: of all) would do to the old sentences it concerns."""
        open_ = sessions.begun(view)
        ended = [s for s in open_ if session in (None, s)]
        return self._decided(view, sessions.turns(view, open_, ended, _is_turn))[1]

    def removed(self, view: "View", gone: Sequence[str], *, purged: bool) -> list[Change]:
        made = view.derived(gone)
        found = view.get_many(item for some in made.values() for item in some)
        return [Retire(item, "its turn was deleted") for item in found]

    def retrieve(self, view: "View", query: str, limit: int) -> list[Hit]:
        """Sentences, and turns of sessions that have not ended."""
        hits = view.search(query, limit, kinds=(SENTENCE,))
        open_ = sessions.begun(view)
        turns = [turn.id for turn in sessions.turns(view, open_, open_, _is_turn)]
        if turns:
            hits += view.search(query, limit, kinds=(TURN,), among=turns)
            hits.sort(key=lambda hit: (-hit.score, hit.position))
        return hits[:limit]

    def _digest(self, view: "View", turns: Sequence[Item]) -> list[Change]:
        if not turns:
            return []
        new, decided = self._decided(view, turns)
        operators = {(d.old.id, d.new): d.operator for d in decided}
        ender = {d.old.id: d for d in decided if d.operator in (REPLACE, DELETE)}
        staying, added = merge({d.old.id for d in decided}, new, operators)
        changes: list[Change] = [
            Retire(old, f"{d.operator} by {d.new.turn.id}")
            for old, d in ender.items()
            if old not in staying
        ]
        kept = [sentence for sentence in added if sentence.lasting]
        stored = {sentence.turn.id for sentence in kept}
        changes += [
            Retire(turn.id, "adds nothing that lasts")
            for turn in turns
            if turn.kind == SENTENCE and turn.id not in stored
        ]
        changes += [_add(sentence) for sentence in kept if sentence.turn.kind != SENTENCE]
        return changes

    def _decided(
        self, view: "View", turns: Sequence[Item]
    ) -> tuple[list[Sentence], list[Decision]]:
        """What turns say, and what that does to which old sentence."""
        new = [sentence for turn in turns for sentence in _sentences(turn)]
        given = {turn.id for turn in turns}
        old = {i.id: i for i in view.items(kind=SENTENCE) if i.id not in given}
        near = self._near(view, new, old)
        if self.op is None:
            shown = dict.fromkeys(i for some in near for i in some)
            for turn in turns:
                vector = view.vector(turn.id)
                if vector is not None:
                    close = view.nearest(vector, NEAREST, kinds=(SENTENCE,))
                    shown |= {item.id: None for item, _ in close}
            asked = _asked(view, turns, {i: old[i] for i in shown if i in old})
            if asked is not None:
                return asked
        new, near = self._settled(view, new, near)
        decided = [
            Decision(old[i], sentence, self._operator(_fact(old[i]) or old[i].text, sentence))
            for sentence, some in zip(new, near, strict=True)
            for i in some
        ]
        return new, decided

    def _operator(self, old: Fact | str, new: Sentence) -> str:
        if self.op is not None:
            return self.op(old if isinstance(old, str) else old.text, new.text)
        return Rules().update(old, new.fact or new.text)

    def _near(
        self, view: "View", new: Sequence[Sentence], old: Mapping[str, Item]
    ) -> list[list[str]]:
        """For each new sentence the old ones that it may have to do with."""
        if not old or not new:
            return [[] for _ in new]
        vectors = view.embed([sentence.text for sentence in new])
        width = len(old)
        if width * len(new) > self.limit:
            width = max(1, self.limit // len(new))
        slots: dict[tuple[str, str], list[str]] = {}
        for item in old.values():
            slots.setdefault(_slot(_fact(item)), []).append(item.id)
        slots.pop(NO_SLOT, None)
        near, cut = [], 0
        for sentence, vector in zip(new, vectors, strict=True):
            found = view.nearest(vector, width, kinds=(SENTENCE,))
            cut += len(found) < len(old) and found[-1][1] >= FAR
            some = [item.id for item, cosine in found if cosine >= FAR and item.id in old]
            near.append(list(dict.fromkeys([*some, *slots.get(_slot(sentence.fact), ())])))
        if cut:
            warnings.warn(
                f"{cut} of {len(new)} new sentences meet only their {width} nearest of {len(old)} "
                f"old ones: {len(new) * len(old)} pairs are more than limit={self.limit}; raise it",
                stacklevel=2,
            )
        return near

    def _settled(
        self,
        view: "View",
        new: Sequence[Sentence],
        near: Sequence[list[str]],
    ) -> tuple[list[Sentence], list[list[str]]]:
        """Without what a session itself repeats, replaces or ends."""
        vectors = view.embed([sentence.text for sentence in new])
        close = vectors @ vectors.T >= FAR
        kept: dict[int, Sentence] = {}
        for i, sentence in enumerate(new):
            operators = {
                (j, i): self._operator(other.fact or other.text, sentence)
                for j, other in kept.items()
                if close[j, i] or NO_SLOT != _slot(other.fact) == _slot(sentence.fact)
            }
            before, after = merge(kept, [i], operators)
            ends = DELETE in operators.values()
            kept = {j: kept[j] for j in before}
            # What ended here may be remembered from before, so that its end has to be told on.
            if after or ends:
                kept[i] = replace(sentence, lasting=not ends)
        return list(kept.values()), [near[i] for i in kept]


def _sentences(turn: Item) -> list[Sentence]:
    if turn.kind == SENTENCE:
        return [Sentence(turn.text, turn, Source(turn.id), _fact(turn), turn.valid_from)]
    return [
        Sentence(fact.text, turn, Source(turn.id, fact.start, fact.end), fact, fact.valid_from)
        for fact in Rules().facts(turn.text, turn.valid_from, turn.speaker)
    ]


def _asked(
    view: "View", turns: Sequence[Item], old: Mapping[str, Item]
) -> tuple[list[Sentence], list[Decision]] | None:
    """A model's sentences and decisions, as far as they name what there is; None without one."""
    remembered = list(old.values())
    said = [{"number": i, "text": turn.document} for i, turn in enumerate(turns)]
    memories = [{"number": i, "text": item.text} for i, item in enumerate(remembered)]
    answer = view.judgement.ask(_TASK, {"session": said, "memories": memories}, _ANSWER)
    if answer is None:
        return None
    new, decided, wrong = [], [], 0
    for one in answer["sentences"]:
        if not (0 <= one["turn"] < len(turns) and one["text"].strip()):
            wrong += 1
            continue
        turn = turns[one["turn"]]
        text = turn.text if turn.kind == SENTENCE else one["text"].strip()
        sentence = Sentence(text, turn, Source(turn.id), _read(text), turn.valid_from)
        new.append(sentence)
        for pair in one["operations"]:
            if 0 <= pair["number"] < len(remembered):
                decided.append(Decision(remembered[pair["number"]], sentence, pair["operation"]))
            else:
                wrong += 1
    if wrong:
        warnings.warn(
            f"{wrong} parts of a model's answer name no turn or memory; they are left out",
            FallbackWarning,
            stacklevel=2,
        )
    # A fact that was given stays even where the model has nothing to say about it.
    known = {sentence.turn.id for sentence in new}
    new += [s for t in turns if t.kind == SENTENCE and t.id not in known for s in _sentences(t)]
    return new, decided


def _add(sentence: Sentence) -> Add:
    return Add(
        sentence.text, kind=SENTENCE, data=sentence.data,
        metadata=sentence.turn.metadata, valid_from=sentence.valid_from or sentence.turn.valid_from,
        sources=(sentence.source,),
    )  # fmt: skip


def _read(text: str) -> Fact | None:
    return next(iter(Rules().facts(text)), None)


def _stated(fact: Fact | None) -> dict[str, Any]:
    return {} if fact is None else {name: getattr(fact, name) for name in STATED}


def _fact(item: Item) -> Fact | None:
    """What a stored sentence states, as it was read in the words of its turn."""
    if not item.data:
        return None
    return Fact(text=item.text, start=0, end=len(item.text.encode()), **item.data)


def _slot(fact: Fact | None) -> tuple[str, str]:
    return NO_SLOT if fact is None else (fact.subject.lower(), fact.relation)


def _is_turn(item: Item) -> bool:
    return item.kind == TURN
