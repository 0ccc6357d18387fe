"""Graphs of memories: communities, what lies near, and facts that know when they hold.

A graph is a mapping of each node to its neighbours and how many edges lead there. A fact is an item
of its own between two entities, `entity -relation-> fact -object-> entity`, so that it is found by
its sentence, has versions, and is erased with the episode that it was made from.
"""

import random
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from holdfast.longterm.language import slots
from holdfast.longterm.language.extract import Fact
from holdfast.longterm.records import Add, Change, Item, Link, Revise, Source, text_hash

if TYPE_CHECKING:
    from holdfast.longterm.store.view import View

ENTITY, FACT = "entity", "relation"  # kinds of items
OBJECT, MENTIONS = "object", "mentions"  # edges besides those named by a relation
NAME = 4  # words of an object that may be an entity's name

EARLIEST = datetime.min.replace(tzinfo=UTC)
LATEST = datetime.max.replace(tzinfo=UTC)

Graph = Mapping[str, Mapping[str, int]]


def graph_of(
    edges: Iterable[tuple[str, str]], nodes: Iterable[str] = ()
) -> dict[str, Counter[str]]:
    """The undirected graph of some edges; an edge from a node to itself only makes the node."""
    graph: dict[str, Counter[str]] = {node: Counter() for node in nodes}
    for one, other in edges:
        for here, there in ((one, other), (other, one)):
            near = graph.setdefault(here, Counter())
            if here != there:
                near[there] += 1
    return graph


def communities(graph: Graph, *, rounds: int = 20, seed: int = 0) -> dict[str, str]:
    """The community of each node, named by its first member.

    Label propagation, one node after another in an order drawn from the seed: taken all at once,
    two nodes that are joined only to one another would swap labels for ever.
    """
    label = {node: node for node in graph}
    order = sorted(graph)
    draw = random.Random(seed)
    for _ in range(rounds):
        draw.shuffle(order)
        moved = False
        for node in order:
            best = _leading(graph[node], label)
            if best and label[node] not in best:
                label[node] = draw.choice(best)
                moved = True
        if not moved:
            break
    names: dict[str, str] = {}
    for node in sorted(label):
        names.setdefault(label[node], node)
    return {node: names[label[node]] for node in sorted(label)}


def _leading(near: Mapping[str, int], label: Mapping[str, str]) -> list[str]:
    """The labels that most edges lead to."""
    votes: Counter[str] = Counter()
    for node, edges in near.items():
        votes[label[node]] += edges
    return sorted(name for name in votes if votes[name] == max(votes.values()))


def reach(graph: Graph, starts: Iterable[str], depth: int) -> dict[str, int]:
    """Edges from the nearest start to each node at most `depth` away, nearest first."""
    found = dict.fromkeys((node for node in starts if node in graph), 0)
    edge = list(found)
    for distance in range(1, depth + 1):
        edge = [
            near
            for near in dict.fromkeys(n for node in edge for n in graph.get(node, ()))
            if near not in found
        ]
        found.update(dict.fromkeys(edge, distance))
    return found


@dataclass(frozen=True)
class Span:
    """When something holds, half-open; None is unbounded. `said` is when it was said."""

    start: datetime | None
    end: datetime | None
    said: datetime

    @property
    def order(self) -> tuple[datetime, datetime]:
        return self.start or EARLIEST, self.said


def overlap(one: Span, other: Span) -> bool:
    """Whether both hold at some instant."""
    first = max(one.start or EARLIEST, other.start or EARLIEST)
    return first < min(one.end or LATEST, other.end or LATEST)


def settle(known: Span, new: Span) -> tuple[Span, Span]:
    """Both spans of two values of which only one can hold at a time.

    The one that begins first ends where the other begins, whichever came to be known first; of
    two that begin together the one said later holds, and the other at no time. Two whose beginning
    is not known may have been one after the other and stay as they are.
    """
    if not overlap(known, new) or known.start is new.start is None:
        return known, new
    # Equal orders are a correction: what is new comes last.
    if new.order < known.order:
        return known, Span(new.start, known.start, new.said)
    return Span(known.start, new.start, known.said), new


def fuse(rankings: Sequence[Sequence[str]], k: int = 60) -> dict[str, float]:
    """Reciprocal rank fusion: 1/(k + rank), added up over rankings, ranks from 1."""
    scores: dict[str, float] = {}
    for ranking in rankings:
        for rank, node in enumerate(ranking, 1):
            scores[node] = scores.get(node, 0.0) + 1 / (k + rank)
    return scores


@dataclass
class _Held:
    """A fact while changes are decided; `key` is its id, or the change that adds it."""

    key: "str | Add"
    object: str
    negated: bool
    span: Span


class FactGraph:
    """The graph with the changes that are being decided on top of it."""

    def __init__(self, view: "View", single: Collection[str], without: Collection[str] = ()):
        self.changes: list[Change] = []
        self._view, self._single, self._without = view, single, without
        self._entities: dict[str, str | Add] = {}
        self._held: dict[tuple[int | str, str], list[_Held]] = {}

    def entity(self, name: str) -> "str | Add":
        """The entity of a name, made where there is none."""
        name = " ".join(name.split())
        known = name.casefold()
        if known not in self._entities:
            found = [i for i in self._view.with_text(text_hash(name)) if i.kind == ENTITY]
            if found:
                self._entities[known] = found[0].id
            else:
                made = Add(name, kind=ENTITY, searchable=False)
                self._entities[known] = made
                self.changes.append(made)
        return self._entities[known]

    def mention(self, episode: str, what: "str | Add") -> None:
        self.changes.append(Link(episode, MENTIONS, what))

    def add(
        self, fact: Fact, said: datetime, source: Source | None, contradicted: Sequence[str] = ()
    ) -> None:
        """State a fact: a repetition is noted with the one that there is, what it ends is ended."""
        start, end = fact.valid_from, fact.valid_to
        if start is not None and end is not None and end < start:
            end = None
        subject = self.entity(fact.subject)
        single = fact.single or fact.relation in self._single
        new = _Held("", fact.object.casefold(), fact.negated, Span(start, end, said))
        same = self._of(subject, fact.relation)
        for held in same:
            alike = held.object == new.object and held.negated == new.negated
            # What another has taken the place of from its beginning on does not hold any more.
            ended = held.span.end is not None and held.span.end == held.span.start
            again = held.span.start == start or (not single and overlap(held.span, new.span))
            if alike and again and not ended:
                self._repeated(held, new, source)
                return
        for held in same:
            if _contrary(held, new, single):
                self._settle(held, new)
        for held in self._of(subject, slots.OPPOSITE.get(fact.relation, "")):
            if held.object == new.object and not (held.negated or new.negated):
                self._settle(held, new)
        for item in self._view.get_many(contradicted).values():
            held = self._known(item)
            if all(held.key != other.key for other in same):
                self._settle(held, new)
        said_in = None if source is None else self._view.get(source.id)
        new.key = Add(
            fact.text,
            kind=FACT,
            session=said_in and said_in.session,
            data={
                "subject": fact.subject, "relation": fact.relation, "object": fact.object,
                "negated": fact.negated, "said": said.isoformat(),
            },
            metadata=said_in.metadata if said_in else {},
            valid_from=start,
            valid_to=new.span.end,
            sources=() if source is None else (source,),
            key=f"{fact.relation}\x1f{start}\x1f{source and source.id}",
        )  # fmt: skip
        same.append(new)
        self.changes += [new.key, Link(subject, fact.relation, new.key)]
        if 0 < len(fact.object.split()) <= NAME:
            self.changes.append(Link(new.key, OBJECT, self.entity(fact.object)))
        if source is not None:
            self.mention(source.id, new.key)

    def _of(self, subject: "str | Add", relation: str) -> list[_Held]:
        place = (subject if isinstance(subject, str) else id(subject), relation)
        if place not in self._held:
            found: Iterable[Item] = ()
            if isinstance(subject, str) and relation:
                edges = self._view.edges(src=subject, rel=relation)
                found = self._view.get_many(e.dst for e in edges).values()
            self._held[place] = [
                self._known(item)
                for item in found
                if item.kind == FACT and item.id not in self._without
            ]
        return self._held[place]

    def _known(self, item: Item) -> _Held:
        said = datetime.fromisoformat(item.data["said"])
        span = Span(item.valid_from, item.valid_to, said)
        return _Held(item.id, item.data["object"].casefold(), item.data["negated"], span)

    def _repeated(self, held: _Held, new: _Held, source: Source | None) -> None:
        if source is not None:
            self.mention(source.id, held.key)
        if (
            new.span.start is not None
            and held.span.start is not None
            and new.span.start < held.span.start
        ):
            held.span = replace(held.span, start=new.span.start)
            self.changes.append(Revise(held.key, valid_from=new.span.start, why="began earlier"))

    def _settle(self, held: _Held, new: _Held) -> None:
        old = held.span
        held.span, new.span = settle(old, new.span)
        if held.span != old:
            self.changes.append(Revise(held.key, valid_to=held.span.end, why="no longer holds"))


def _contrary(held: _Held, new: _Held, single: bool) -> bool:
    """Whether two facts of one subject and relation cannot hold together."""
    if held.negated or new.negated:
        return held.negated != new.negated and held.object == new.object
    return single
