"""Theanine (043): nothing is removed; what happened is recalled as timelines of cause and change.

Keeps    turns as they were said; a sentence for each event of a session that has ended, and typed
         edges from earlier to later events.
Form     an event is an item dated by its session, on the shelf of what it is about; edges go
         forward in time.
Bytes    text + 4*d + row for each turn and event, a row for each edge. A question reads what leads
         to its hits, and at most 64 ways on; the end of a session reads what is new of it, events
         that are alike, and of their timelines as much as it takes to tell which are connected.
Source   K. Ong et al., "Towards Lifelong Dialogue Agents via Timeline-based Memory Management",
         2025.
Departs  rules summarise, relate and refine where there is no model; a model is asked once for all
         events and once for all pairs of a session. The last event about the same is compared too,
         however it is worded; of equally recent events the one that is changed is linked. Of the
         ways through a hit those of cause and change, then those most similar to the query are
         shown, not ones drawn at random.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING

import numpy as np

from holdfast.errors import UsageError, unknown
from holdfast.longterm.budget import Context, line, pack
from holdfast.longterm.language.judgement import RELATIONS
from holdfast.longterm.language.llm import Rules
from holdfast.longterm.language.shapes import listing, record
from holdfast.longterm.policy import Policy, Traits
from holdfast.longterm.records import Add, Change, Hit, Item, Link, Retire, Revise, Source, Touch
from holdfast.longterm.timelines import Timelines

if TYPE_CHECKING:
    from holdfast.longterm.store.view import View

EVENT, SAME = "event", "SameTopic"
# How far it is told, noted with a turn: with all of its session, or of the space, before it.
TOLD, ALL_TOLD = "session", "all"
_PAGE = 50

_STRING, _NUMBER = {"type": "string"}, {"type": "integer"}
_EVENTS = record(events=listing(record(turn=_NUMBER, sentence=_STRING)))
_RELATED = record(related=listing(record(pair=_NUMBER, relation={"enum": [*RELATIONS, "None"]})))
_KEPT = record(kept=listing(_NUMBER))


@dataclass
class _Draft:
    """An event that is being added.

    Attributes:
        order: its time and its place among those of one time.
        near: stored events by id and drafts by number, with their texts.
    """

    add: Add
    order: tuple[datetime, int]
    near: dict[str | int, str] = field(default_factory=dict)


class Theanine(Policy):
    """Link each event to what it follows from, recall whole lines of events.

    Args:
        j: earlier events that a new one is compared with.
        k: events that a search starts from.
        n: timelines for each of them.
        tau: cosine to the query below which an event of the same topic is left out of a timeline.

    Raises:
        UsageError: `j`, `k` or `n` below 1, `tau` outside -1..1.
    """

    traits = Traits(
        types=("episodic",),
        form="summaries",
        processes=("encode", "consolidate", "store", "retrieve"),
        conflict="links",
    )

    def __init__(self, *, j: int = 3, k: int = 3, n: int = 1, tau: float = 0.1):
        if min(j, k, n) < 1:
            raise UsageError(f"j={j}, k={k} and n={n} must be at least 1")
        if not -1 <= tau <= 1:
            raise UsageError(f"tau={tau} is no cosine; give a number in -1..1")
        self.j, self.k, self.n, self.tau = j, k, n, tau

    def summarise(self, view: "View", session: str | None) -> list[Change]:
        """Events of what has not been summarised yet, each linked to what it follows from."""
        turns = _untold(view, session)
        drafts = [_Draft(add, (_when(turn), i)) for i, (turn, add) in enumerate(_told(view, turns))]
        self._compare(view, drafts)
        pairs = [(i, other) for i, draft in enumerate(drafts) for other in draft.near]
        texts = [(drafts[i].near[other], drafts[i].add.text) for i, other in pairs]
        related: dict[int, dict[str | int, str]] = {}
        for (i, other), relation in zip(pairs, _related(view, texts), strict=True):
            if relation is not None:
                related.setdefault(i, {})[other] = relation
        noted = {turn.id: turn for turn in turns}
        told = TOLD if session is not None else ALL_TOLD
        if session is None:
            newest = next((item for item in _latest(view, None) if item.kind != EVENT), None)
            if newest is not None and newest.data.get("told") != ALL_TOLD:
                noted[newest.id] = newest
        changes: list[Change] = [Touch(i, data={**t.data, "told": told}) for i, t in noted.items()]
        changes += [draft.add for draft in drafts]
        return changes + _links(view, drafts, related)

    def _compare(self, view: "View", drafts: Sequence[_Draft]) -> None:
        """The most similar earlier events of other sessions, for each draft."""
        vectors = view.embed([draft.add.text for draft in drafts])
        for number, draft in enumerate(drafts):
            near = view.nearest(vectors[number], 4 * self.j, kinds=(EVENT,))
            if about := draft.add.data.get("shelf"):
                same = view.items(kind=EVENT, shelf=about)
                near += [(last, -1.0) for last in sorted(same, key=_when)[-1:]]
            found: list[tuple[float, str | int, str]] = [
                (cosine, item.id, item.text)
                for item, cosine in near
                if _when(item) <= draft.order[0] and _apart(item.session, draft.add.session)
            ]
            found += [
                (float(vectors[i] @ vectors[number]), i, other.add.text)
                for i, other in enumerate(drafts)
                if other.order < draft.order and _apart(other.add.session, draft.add.session)
            ]
            found.sort(key=lambda one: -one[0])
            kept = found[: self.j] + [one for one in found[self.j :] if one[0] == -1]
            draft.near = {key: text for _, key, text in kept}

    def relate(self, view: "View", edges: Sequence[tuple[str, str, str]]) -> list[Change]:
        """The changes that link events by hand: (earlier, relation, later).

        Raises:
            UsageError: an unknown relation or event, an edge back in time, or a cycle.
        """
        named = {event for old, _, new in edges for event in (old, new)}
        known = {i.id: i for i in view.get_many(named).values() if i.kind == EVENT}
        graph = Timelines(view)
        for old, relation, new in edges:
            if relation not in RELATIONS:
                raise unknown("relation", relation, RELATIONS)
            for event in (old, new):
                if event not in known:
                    raise UsageError(f"there is no event {event} now; get_all(kind={EVENT!r})")
            if _when(known[old]) > _when(known[new]):
                raise UsageError(
                    f"an edge from {old} ({_when(known[old])}) to {new} ({_when(known[new])}) "
                    "goes back in time; give the earlier event first"
                )
            graph.add(old, relation, new)
        for old, _, _ in edges:
            graph.before(old)
        return [Link(old, relation, new) for old, relation, new in edges]

    def update(self, view: "View", item: Item, text: str) -> list[Change]:
        """A corrected turn's events are told anew and keep their place in their timelines."""
        changes: list[Change] = [Revise(item.id, text=text, why="updated")]
        old = _events_of(view, [item.id])
        if item.kind == EVENT or not old:
            return changes
        told = [add for _, add in _told(view, [replace(item, text=text)])]
        pairs = zip(old, told, strict=False)
        changes += [
            Revise(event.id, text=add.text, data=add.data, why="updated") for event, add in pairs
        ]
        changes += [Retire(event.id, "its turn was corrected") for event in old[len(told) :]]
        return [*changes, *told[len(old) :]]

    def removed(self, view: "View", gone: Sequence[str], *, purged: bool) -> list[Change]:
        if purged:
            return []
        return [Retire(event.id, "its turn was deleted") for event in _events_of(view, gone)]

    def timelines(self, view: "View", query: str) -> list[list[Hit]]:
        """Lines of events through the best hits; `terms` has the cosine to the query."""
        hits = view.search(query, self.k, kinds=(EVENT,)) if view.count(EVENT) else []
        graph, asked = Timelines(view), view.embed([query])[0]
        lines: dict[tuple[str, ...], float] = {}
        cosines: dict[str, float] = {}
        for hit in hits:
            ways = graph.through(hit.id)
            for event in {event for way in ways for event in way} - cosines.keys():
                own = view.vector(event)
                cosines[event] = 0.0 if own is None else float(np.dot(own, asked))
            ways.sort(
                key=lambda way: (
                    sum(graph.relation(*pair) == SAME for pair in itertools.pairwise(way)),
                    -sum(cosines[event] - self.tau for event in way),
                )
            )
            for way in ways[: self.n]:
                lines.setdefault(tuple(way), hit.score)
        shown, found = set(), []
        for way, score in lines.items():
            if not set(way) <= shown:
                shown.update(way)
                found.append(self._refined(view, graph, query, way, cosines, score))
        return found

    def _refined(
        self, view: "View", graph: "Timelines", query: str, way: Sequence[str],
        cosines: Mapping[str, float], score: float,
    ) -> list[Hit]:  # fmt: skip
        """Without the events inside a line that change nothing and are far from the query."""
        items = view.get_many(way)
        hits = view.hits([(items[one], score, {"cosine": cosines[one]}) for one in way])
        links = [graph.relation(*pair) for pair in itertools.pairwise(way)]
        inner = range(1, len(hits) - 1)
        kept = {i for i in inner if cosines[way[i]] >= self.tau or links[i - 1] != SAME}
        if inner:
            answer = view.judgement.ask(
                "Which of the numbered events are worth keeping to answer the question?",
                {"question": query, "events": [{"number": i, "text": hits[i].text} for i in inner]},
                _KEPT,
            )
            if answer is not None:
                kept = set(answer["kept"])
        return [hit for i, hit in enumerate(hits) if i in kept or i not in inner]

    def retrieve(self, view: "View", query: str, limit: int) -> list[Hit]:
        """Events by timelines, then turns that have not been told yet and all others."""
        lines = self.timelines(view, query)
        found = {hit.id: hit for one in lines for hit in one}
        for hit in view.search(query, limit + len(found)):
            found.setdefault(hit.id, hit)
        return list(found.values())[:limit]

    def compose(
        self, view: "View", query: str, budget: int, count: Callable[[str], int]
    ) -> Context:
        """Timelines, oldest event first, each later one with its relation to the one before."""
        lines = self.timelines(view, query)
        if not lines:
            return pack(self.retrieve(view, query, 50), budget, count)
        graph, rows, taken = Timelines(view), [], []
        for timeline in lines:
            left = [hit for hit in timeline if hit.id not in taken]
            while left:
                more = _rendered(graph, left)
                if count("\n".join([*rows, *more])) <= budget:
                    rows += more
                    taken += [hit.id for hit in left]
                    break
                left.remove(min(left, key=lambda hit: hit.terms["cosine"]))
        text, every = "\n".join(rows), {hit.id for timeline in lines for hit in timeline}
        return Context(text, count(text), budget, tuple(taken), len(every) - len(taken))


def _rendered(graph: Timelines, hits: Sequence[Hit]) -> list[str]:
    """One line per event; its relation stands in brackets, where no text of a memory can."""
    rows = [line(hits[0])]
    for last, hit in itertools.pairwise(hits):
        head, rest = line(hit).split("] ", 1)
        rows.append(f"{head} —{graph.relation(last.id, hit.id)}→] {rest}")
    return rows


def _untold(view: "View", session: str | None) -> list[Item]:
    """Turns of a session, or of all, that no event has been made of, oldest first."""
    found = []
    for item in _latest(view, session):
        told = item.data.get("told") if item.kind != EVENT else None
        if told == ALL_TOLD or (told == TOLD and session is not None):
            break  # nothing before it is left
        if item.kind != EVENT and told is None:
            found.append(item)
    return found[::-1]


def _latest(view: "View", session: str | None) -> Iterator[Item]:
    page = view.items(session=session, newest=True, limit=_PAGE)
    while page:
        yield from page
        page = view.items(session=session, newest=True, limit=_PAGE, after=page[-1].position)


def _told(view: "View", turns: Sequence[Item]) -> list[tuple[Item, Add]]:
    """The events of turns, in their order; a model, where there is one, is asked once."""
    if not turns:
        return []
    told: list[tuple[Item, str, Source, dict[str, str]]] = []
    answer = view.judgement.ask(
        "Summarise the conversation as events: each a sentence in the third person that can be "
        "read alone, with the number of the turn that tells it.",
        {"turns": [{"number": i, "text": turn.document} for i, turn in enumerate(turns)]},
        _EVENTS,
    )
    if answer is None:
        rules = Rules()
        for turn in turns:
            for fact in rules.facts(turn.text, turn.valid_from, turn.speaker):
                about = f"{fact.subject.casefold()}\x1f{fact.relation}".encode()
                data = {"shelf": hashlib.blake2b(about, digest_size=8).hexdigest()}
                told.append((turn, fact.text, Source(turn.id, fact.start, fact.end), data))
    for one in answer["events"] if answer is not None else ():
        if 0 <= one["turn"] < len(turns) and one["sentence"].strip():
            turn = turns[one["turn"]]
            told.append((turn, one["sentence"].strip(), Source(turn.id), {}))
    told.sort(key=lambda one: (_when(one[0]), one[0].position))
    adds: dict[tuple[str | None, str], tuple[Item, Add]] = {}
    for turn, text, source, data in told:
        add = Add(
            text, EVENT, session=turn.session, metadata=turn.metadata, valid_from=_when(turn),
            sources=(source,), key=turn.session or turn.id, data=data,
        )  # fmt: skip
        adds.setdefault((turn.session, text), (turn, add))
    return list(adds.values())


def _related(view: "View", pairs: Sequence[tuple[str, str]]) -> list[str | None]:
    """What the later of each pair is to the earlier."""
    given = [{"number": i, "earlier": a, "later": b} for i, (a, b) in enumerate(pairs)]
    task = "What is the later event of each numbered pair to the earlier one? None: unrelated."
    answer = view.judgement.ask(task, {"pairs": given}, _RELATED) if pairs else None
    if answer is None:
        return [view.judgement.relate(a, b) for a, b in pairs]
    named = {one["pair"]: one["relation"] for one in answer["related"]}
    return [None if named.get(i) == "None" else named.get(i) for i in range(len(pairs))]


def _links(
    view: "View", drafts: Sequence[_Draft], related: Mapping[int, Mapping[str | int, str]]
) -> list[Change]:
    """In each connected component of what is related, a link from the most recent."""
    stored = view.get_many(o for some in related.values() for o in some if isinstance(o, str))
    graph, changes = Timelines(view), []
    for number, found in sorted(related.items()):
        for part in graph.parts(map(str, found)):
            newest = max(
                (other for other in found if str(other) in part),
                key=lambda other: _recent(other, found[other], stored, drafts),
            )
            source = drafts[newest].add if isinstance(newest, int) else newest
            changes.append(Link(source, found[newest], drafts[number].add))
            graph.add(str(newest), found[newest], str(number))
    return changes


def _recent(
    event: str | int, relation: str, stored: Mapping[str, Item], drafts: Sequence[_Draft]
) -> tuple[datetime, int, int]:
    if isinstance(event, int):
        when, place = drafts[event].order
    else:
        when, place = _when(stored[event]), stored[event].position
    return when, -RELATIONS.index(relation), place


def _apart(session: str | None, other: str | None) -> bool:
    return session is None or session != other


def _when(item: Item) -> datetime:
    return item.valid_from or item.recorded_at


def _events_of(view: "View", turns: Iterable[str]) -> list[Item]:
    found = view.get_many(e for made in view.derived(list(turns)).values() for e in made)
    return sorted((i for i in found.values() if i.kind == EVENT), key=lambda i: i.position)
