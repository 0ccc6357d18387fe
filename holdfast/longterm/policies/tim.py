"""Think-in-Memory (164): post-think each turn into thoughts and recall these, not the turns.

Keeps    turns as the thoughts' origin, not searched; of each head and relation one thought, a text
         with its tails. A turn that states no relation is a thought as it is.
Form     a thought is an item with its triple and its vector's buckets, on the shelf of its head.
Bytes    text + 4*d for the vector + 8 numbers of buckets per thought, text + statements per turn. A
         new turn is compared with the thoughts of its heads and the eight nearest of its buckets.
         A question reads the buckets of all thoughts: those that are probed hold a third of them.
         Deleting and correcting read all turns.
Source   L. Liu et al., "Think-in-Memory: Recalling and Post-thinking Enable LLMs with Long-Term
         Memory", 2023.
Departs  eight tables and three probed buckets, not one of each, which finds a sixth of what an
         exact search does; of what contradicts, sought among thoughts of the same head too, the one
         said later stays, the other is in the history; one question to a model per `add`.
"""

import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from holdfast.longterm.language import slots
from holdfast.longterm.language.extract import Fact
from holdfast.longterm.language.llm import Rules
from holdfast.longterm.language.shapes import listing, record
from holdfast.longterm.policy import Policy, Traits, as_turn
from holdfast.longterm.records import Add, Change, Hit, Item, Retire, Revise, Source, Turn
from holdfast.longterm.retrieval.lsh import LSH, check_buckets, probed

if TYPE_CHECKING:
    from holdfast.longterm.store.view import View

THOUGHT = "thought"
NEAR = 8  # thoughts of its buckets that a new one is compared with, the nearest

_STRING = {"type": "string"}
_ANSWER = record(
    thoughts=listing(
        record(
            turn={"type": "integer"}, head=_STRING, relation=_STRING, tail=_STRING, thought=_STRING,
            negated={"type": "boolean"},
        )
    )
)  # fmt: skip
_TASK = (
    "What can be learnt from the numbered turns about people and named things? Give each thought "
    "as a sentence in the third person that can be read alone, with its head, relation (in "
    "snake_case) and tail, and the number of its turn."
)

Key = tuple[str, str, bool]


@dataclass(frozen=True)
class Statement:
    """What a turn was thought to say; without a head, the turn as it is.

    Attributes:
        single: its head has one such tail at a time.
        said: when, ISO 8601.
        given: a user's own words, which no turn can change.
    """

    head: str
    relation: str
    tail: str
    text: str
    said: str
    negated: bool = False
    single: bool = False
    given: bool = False

    @property
    def fact(self) -> Fact:
        return Fact(
            self.text, self.head, self.relation, self.tail, 0, 0,
            negated=self.negated, single=self.single,
        )  # fmt: skip


@dataclass
class _Thought:
    item: Item | None
    parts: list[Statement]
    origins: dict[str, Item] = field(default_factory=dict)

    @property
    def text(self) -> str:
        if len(self.parts) == 1:
            return self.parts[0].text
        return " ".join(part.text.rstrip(".") + "." for part in self.parts)


class TiM(Policy):
    """Insert, forget and merge thoughts; recall those in the query's buckets.

    Args:
        buckets: of one table; even.
        tables: tables with axes of their own.
        probes: buckets that are searched per table.
        seed: of the axes.

    `buckets=64, tables=1, probes=1` is the paper's form.

    Raises:
        UsageError: an odd number of buckets, or anything below 1.
    """

    traits = Traits(
        types=("semantic",),
        form="thoughts",
        processes=("encode", "consolidate", "store", "retrieve"),
        conflict="supersedes",
    )

    def __init__(self, *, buckets: int = 384, tables: int = 8, probes: int = 3, seed: int = 0):
        check_buckets(buckets, tables, probes)
        self.buckets, self.tables, self.probes, self.seed = buckets, tables, probes, seed

    def write(self, view: "View", turns: Sequence[Turn]) -> list[Change]:
        return [
            as_turn(turn, searchable=False, data={"thoughts": [asdict(s) for s in said]})
            for turn, said in zip(turns, _post_think(view, turns), strict=True)
        ]

    def link(self, view: "View", items: Sequence[Item]) -> list[Change]:
        told = [(turn, s) for turn in items for s in _said(turn)]
        mind = _Mind(view, self._hash, {_about(s) for _, s in told})
        mind.insert(told)
        return mind.changes()

    def update(self, view: "View", item: Item, text: str) -> list[Change]:
        """A corrected turn is thought over again; a corrected thought is kept as it is given."""
        if item.kind == THOUGHT:
            first = replace(_parts(item)[0], text=text, tail=text, given=True)
            first = replace(first, said=view.now.isoformat())
            data = _thought_data([first], self._hash(view, [text])[0])
            revised = Revise(item.id, text=text, data=data, why="updated")
            return [revised, *_struck(view, [item])]
        turn = Turn(text, item.speaker, item.valid_from or item.recorded_at)
        (statements,) = _post_think(view, [turn])
        data = {**item.data, "thoughts": [asdict(s) for s in statements]}
        corrected = replace(item, text=text, data=data)
        changes: list[Change] = [Revise(item.id, text=text, data=data, why="updated")]
        return changes + self._rethought(view, [*_said(item), *statements], corrected)

    def removed(self, view: "View", gone: Sequence[str], *, purged: bool) -> list[Change]:
        """Thoughts lose what a deleted turn said; what a purge took too much is thought again."""
        if purged:
            known = {_key(_parts(i)[0]) for i in view.items(kind=THOUGHT)}
            turns = [t for t in view.items() if t.kind != THOUGHT]
            return self._rethought(
                view, [s for t in turns for s in _said(t) if _key(s) not in known]
            )
        last = [view.versions(item)[-1] for item in gone]
        changes = _struck(view, [item for item in last if item.kind == THOUGHT])
        return changes + self._rethought(view, [s for turn in last for s in _said(turn)])

    def _rethought(
        self, view: "View", said: Sequence[Statement], corrected: Item | None = None
    ) -> list[Change]:
        """The thoughts about some heads as all turns that there are now make them."""
        heads = {_about(s) for s in said}
        mind = _Mind(view, self._hash, heads)
        mind.empty(heads)
        if corrected is not None and not (said[0].head or said[-1].head):
            mind.rename(_key(said[0]), _key(said[-1]))
        turns = {t.id: t for t in view.items() if t.kind != THOUGHT}
        turns |= {corrected.id: corrected} if corrected is not None else {}
        told = [(t, s) for t in turns.values() for s in _said(t) if _about(s) in heads]
        mind.insert(sorted(told, key=lambda one: one[1].said))
        return mind.changes()

    def summarise(self, view: "View", session: str | None) -> list[Change]:
        """Hash anew what was hashed otherwise: other options, or another embedder."""
        stale = [i for i in view.items(kind=THOUGHT) if i.data["hash"] != self._of(view)]
        hashes = self._hash(view, [item.text for item in stale])
        return [
            Revise(item.id, data={**item.data, **made}, why="hashed anew")
            for item, made in zip(stale, hashes, strict=True)
        ]

    def retrieve(self, view: "View", query: str, limit: int) -> list[Hit]:
        """The most similar thoughts of those in the likeliest buckets of each table."""
        items, of = view.items(kind=THOUGHT), self._of(view)
        hashed = {i.id: i.data["at"] for i in items if i.data["hash"] == of}
        among = {item.id for item in items} - hashed.keys()
        if hashed:
            asked = view.embed([query])
            order = self._lsh(asked).order(asked[0])
            for table in range(self.tables):
                held = {at[table] for at in hashed.values()}
                likely = set(probed(order[table], held, self.probes))
                among |= {item for item, at in hashed.items() if at[table] in likely}
        found = view.nearest(query, limit, kinds=(THOUGHT,), among=among) if among else []
        return view.hits([(item, cosine, {"cosine": cosine}) for item, cosine in found])

    def _of(self, view: "View") -> str:
        return f"{view.embedder} {self.buckets} {self.tables} {self.seed}"

    def _lsh(self, vectors: np.ndarray) -> LSH:
        return _tables(vectors.shape[1], self.buckets, self.seed, self.tables)

    def _hash(self, view: "View", texts: Sequence[str]) -> list[dict[str, Any]]:
        """The buckets of texts, and what numbers them so."""
        if not texts:
            return []
        vectors = view.embed(texts)
        codes = self._lsh(vectors).codes(vectors).tolist()
        return [{"hash": self._of(view), "at": at} for at in codes]


@functools.lru_cache(maxsize=8)
def _tables(dim: int, buckets: int, seed: int, tables: int) -> LSH:
    return LSH(dim, buckets, seed, tables=tables)


class _Mind:
    """The thoughts about some heads, with what is being changed on top of them."""

    def __init__(self, view: "View", hash_: Any, heads: Iterable[str]):
        self._view, self._hash, self._rules = view, hash_, Rules()
        self._thoughts: dict[Key, _Thought] = {}
        self._heads: dict[str, set[Key]] = {}
        for head in sorted(heads):
            for item in view.items(kind=THOUGHT, shelf=_shelf(head)):
                self._take(item)

    def _take(self, item: Item) -> Key:
        parts = _parts(item)
        key = _key(parts[0])
        if key not in self._thoughts:
            self._thoughts[key] = _Thought(item, parts)
            self._heads.setdefault(key[0], set()).add(key)
        return key

    def empty(self, heads: Iterable[str]) -> None:
        """Leave of the thoughts about some heads only what a user gave."""
        for head in heads:
            for key in self._heads.get(head, ()):
                thought = self._thoughts[key]
                thought.parts = [part for part in thought.parts if part.given]

    def rename(self, old: Key, new: Key) -> None:
        """A thought that is about itself goes on as another."""
        if old in self._thoughts and new not in self._thoughts:
            self._thoughts[new] = self._thoughts.pop(old)
            self._heads.pop(old[0])

    def insert(self, told: Sequence[tuple[Item, Statement]]) -> None:
        """Take in statements; of two that contradict one another the one said later stays."""
        hashes = self._hash(self._view, [s.text for _, s in told])
        for (turn, new), at in zip(told, hashes, strict=True):
            key = _key(new)
            thought = self._thoughts.setdefault(key, _Thought(None, []))
            self._heads.setdefault(key[0], set()).add(key)
            same = [p for p in thought.parts if p.tail.casefold() == new.tail.casefold()]
            if not same:
                against = self._against(key, new, at)
                if any(part.said > new.said for _, part in against):
                    continue
                for other, part in against:
                    other.parts.remove(part)
                thought.parts.append(new)
            thought.origins[turn.id] = turn

    def _against(self, key: Key, new: Statement, at: Mapping) -> list[tuple[_Thought, Statement]]:
        """What contradicts a statement, among thoughts of its head and in its buckets."""
        if not new.head:
            return []
        relations = (new.relation, slots.OPPOSITE.get(new.relation))
        near = {other for other in self._heads[key[0]] if other[1] in relations}
        places = _places(at)
        near |= {
            self._take(item)
            for item, _ in self._view.nearest(new.text, NEAR, kinds=(THOUGHT,))
            if places & _places(item.data)
        }
        return [
            (self._thoughts[other], part)
            for other in sorted(near & self._thoughts.keys())
            for part in self._thoughts[other].parts
            if part.head and self._rules.contradicts(part.fact, new.fact)
        ]

    def changes(self) -> list[Change]:
        changed = [
            thought
            for thought in self._thoughts.values()
            if thought.origins or (thought.item and thought.parts != _parts(thought.item))
        ]
        kept = [thought for thought in changed if thought.parts]
        changes: list[Change] = [
            Retire(thought.item.id, "contradicted or taken back")
            for thought in changed
            if thought.item and not thought.parts
        ]
        hashes = self._hash(self._view, [thought.text for thought in kept])
        for thought, at in zip(kept, hashes, strict=True):
            data, sources = _thought_data(thought.parts, at), [*map(Source, thought.origins)]
            if thought.item:
                changes.append(Revise(thought.item.id, thought.text, data, sources=sources))
                continue
            turn = next(iter(thought.origins.values()))
            changes.append(
                Add(
                    thought.text, THOUGHT, session=turn.session, data=data, metadata=turn.metadata,
                    valid_from=turn.valid_from, sources=sources,
                    key="\x1f".join(map(str, _key(thought.parts[0]))),
                )
            )  # fmt: skip
        return changes


def _post_think(view: "View", turns: Sequence[Turn]) -> list[list[Statement]]:
    """What each turn states, at least itself; a model, where there is one, is asked once."""
    given = [
        {"turn": i, "text": turn.text, "speaker": turn.speaker} for i, turn in enumerate(turns)
    ]
    when = [(turn.when or view.now).isoformat() for turn in turns]
    found: list[list[Statement]] = [[] for _ in turns]
    answer = view.judgement.ask(_TASK, {"turns": given}, _ANSWER)
    if answer is None:
        rules = Rules()
        for i, turn in enumerate(turns):
            found[i] = [
                Statement(f.subject, f.relation, f.object, f.text, when[i], f.negated, f.single)
                for f in rules.facts(turn.text, turn.when, turn.speaker)
            ]
    for one in answer["thoughts"] if answer is not None else ():
        told = [one[name].strip() for name in ("head", "relation", "tail", "thought")]
        if 0 <= one["turn"] < len(turns) and all(told):
            told[1] = "_".join(told[1].lower().split())
            said, single = when[one["turn"]], slots.single(told[1])
            found[one["turn"]].append(Statement(*told, said, one["negated"], single))
    for i, turn in enumerate(turns):
        whole = f"{turn.speaker}: {turn.text}" if turn.speaker else turn.text
        found[i] = found[i] or [Statement("", "", turn.text, whole, when[i])]
    return found


def _said(turn: Item) -> list[Statement]:
    return [Statement(**one) for one in turn.data.get("thoughts", ())]


def _parts(thought: Item) -> list[Statement]:
    return [Statement(**one) for one in thought.data["parts"]]


def _thought_data(parts: Sequence[Statement], at: Mapping[str, Any]) -> dict[str, Any]:
    shelf = _shelf(_about(parts[0]))
    return {"parts": [asdict(part) for part in parts], **at, "shelf": shelf}


def _about(statement: Statement) -> str:
    """Whom a statement is about; what says nothing of anybody is about itself."""
    return statement.head.casefold() or statement.text


def _key(statement: Statement) -> Key:
    return _about(statement), statement.relation, statement.negated


def _shelf(head: str) -> str:
    # A head may be a whole text, and an index takes no long ones.
    return hashlib.blake2b(head.encode(), digest_size=8).hexdigest()


def _places(data: Mapping[str, Any]) -> set[tuple[str, int, int]]:
    return {(data["hash"], table, bucket) for table, bucket in enumerate(data["at"])}


def _struck(view: "View", thoughts: Sequence[Item]) -> list[Change]:
    """Turns no longer say what a user has corrected or deleted."""
    changes: list[Change] = []
    sources = view.sources([thought.id for thought in thoughts])
    for thought in thoughts:
        key = _key(_parts(thought)[0])
        for turn in view.get_many(source.id for source in sources[thought.id]).values():
            left = [asdict(s) for s in _said(turn) if _key(s) != key]
            changes.append(Revise(turn.id, data={**turn.data, "thoughts": left}, why="corrected"))
    return changes
