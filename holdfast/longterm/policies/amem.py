"""A-MEM (021): a Zettelkasten whose notes link and rewrite one another.

Keeps    every turn as it was said, and of each a note: the text with keywords, tags and a sentence
         of context, linked to notes about the same.
Form     a note is searched as text + keywords + tags + context; notes that a later one changes are
         new versions of themselves. A hit is the turn, its note has only led to it.
Bytes    twice the text, keywords, tags and context, 4*d for its vector, a row per turn, note, link.
Source   W. Xu et al., "A-MEM: Agentic Memory for LLM Agents", 2025.
Departs  describing, linking and evolving are one question to a model per `add`, not two per note;
         links are edges, not places in a list; a rewritten note is encoded anew at once and keeps
         what it said before; search is hybrid. Rules answer where there is no model.
"""

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from holdfast.errors import UsageError
from holdfast.longterm.language.llm import FallbackWarning, Rules
from holdfast.longterm.language.shapes import listing, record
from holdfast.longterm.policy import Policy, Traits, as_turn
from holdfast.longterm.records import (
    Add,
    Change,
    Edge,
    Hit,
    Item,
    Link,
    Purge,
    Retire,
    Revise,
    Source,
    Turn,
)
from holdfast.longterm.retrieval.terms import stem

if TYPE_CHECKING:
    from holdfast.longterm.store.view import View

NOTE, LINK = "note", "link"
KEYWORDS, TAGS, CONTEXT = 5, 8, 25  # at most: words, words, words of one sentence
LIKE = 0.5  # cosine from which two notes are linked
# Measured on LoCoMo: links of more hits, or a larger share, push out turns that answer themselves.
FROM, SPREAD = 3, 0.15  # hits whose links count, and the share of their score that a link is worth

_STRING = {"type": "string"}
_ANSWER = record(
    notes=listing(
        record(
            keywords=listing(_STRING),
            context=_STRING,
            tags=listing(_STRING),
            should_evolve={"type": "boolean"},
            actions=listing({"enum": ["strengthen", "update_neighbor"]}),
            connections=listing({"type": "integer"}),
            new_context=listing(_STRING),
            new_tags=listing(listing(_STRING)),
        )
    )
)
_TASK = (
    "Each note is new and has numbered neighbours. Describe it: at least three keywords, at least "
    "three broad tags, one sentence of context. Should neighbours evolve with it? `strengthen`: "
    "link the note to the neighbours whose numbers are in `connections`. `update_neighbor`: give "
    "new_context and new_tags, one entry for each neighbour, in order; empty leaves it as it is."
)


@dataclass(frozen=True)
class _Note:
    """What a note says.

    Attributes:
        tags: each with the turn whose word it was.
        turns: the note's own, then all that have ever put words into it.
    """

    content: str
    keywords: tuple[str, ...]
    tags: Mapping[str, str]
    context: str
    turns: tuple[str, ...]

    @property
    def text(self) -> str:
        parts = (("Keywords", self.keywords), ("Tags", self.tags), ("Context", (self.context,)))
        rows = [f"{name}: {', '.join(words)}" for name, words in parts if any(words)]
        return "\n".join([self.content, *rows])

    @property
    def data(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, item: Item) -> "_Note":
        lists = {name: tuple(item.data[name]) for name in ("keywords", "turns")}
        return cls(**{**item.data, **lists})

    def tagged(self, tags: Mapping[str, str]) -> "_Note":
        """With more tags, as long as there is room."""
        kept = dict(
            [*self.tags.items(), *(t for t in tags.items() if t[0] not in self.tags)][:TAGS]
        )
        return replace(self, tags=kept, turns=_distinct([*self.turns, *kept.values()]))


@dataclass
class _Draft:
    """A turn whose note is to be made, and its nearest: stored notes by id, drafts by number."""

    turn: Item
    near: list[tuple[str | int, float]]
    decided: Mapping[str, Any] | None = None


class AMem(Policy):
    """Describe each turn, link it to its nearest notes, and let these learn from it.

    Args:
        k: nearest notes that a new one is compared with.
        link_k: turns that a search adds at most only because hits are linked to them.

    Raises:
        UsageError: `k` below 1 or `link_k` below 0.
    """

    traits = Traits(
        types=("episodic", "semantic"),
        form="notes",
        processes=("encode", "consolidate", "store", "retrieve"),
        conflict="links",
    )

    def __init__(self, *, k: int = 5, link_k: int = 10):
        if k < 1:
            raise UsageError(f"k={k} leaves a note without neighbours; give at least 1")
        if link_k < 0:
            raise UsageError(f"link_k={link_k} is negative; 0 follows no links")
        self.k, self.link_k = k, link_k

    def write(self, view: "View", turns: Sequence[Turn]) -> list[Change]:
        return [as_turn(turn, searchable=False) for turn in turns]

    def link(self, view: "View", items: Sequence[Item]) -> list[Change]:
        drafts = self._drafts(view, [item for item in items if item.kind != NOTE])
        ids = [key for draft in drafts for key, _ in draft.near if isinstance(key, str)]
        known: dict[str | int, _Note] = {
            key: _Note.of(item) for key, item in view.get_many(ids).items()
        }
        _decide(view, drafts, known)
        changes: list[Change] = []
        adds: dict[str | int, Add] = {}
        for number, draft in enumerate(drafts):
            note, linked, evolved = _settle(draft, known)
            adds[number] = _stored(draft.turn, note)
            changes.append(adds[number])
            changes += [Link(adds[number], LINK, adds.get(key, key)) for key in linked]
            for key, new in evolved.items():
                why = f"evolved with {draft.turn.id}"
                changes.append(Revise(adds.get(key, key), text=new.text, data=new.data, why=why))
            known |= {number: note, **evolved}
        return changes

    def _drafts(self, view: "View", turns: Sequence[Item]) -> list[_Draft]:
        vectors = view.embed([turn.document for turn in turns])
        drafts = []
        for number, turn in enumerate(turns):
            stored = view.nearest(vectors[number], self.k, kinds=(NOTE,))
            near: list[tuple[str | int, float]] = [(item.id, cosine) for item, cosine in stored]
            near += [(i, float(vectors[i] @ vectors[number])) for i in range(number)]
            near.sort(key=lambda pair: -pair[1])
            drafts.append(_Draft(turn, near[: self.k]))
        return drafts

    def update(self, view: "View", item: Item, text: str) -> list[Change]:
        """The turn is corrected and its note described anew; its links stay."""
        if item.kind == NOTE:
            turn = view.get(_Note.of(item).turns[0])
            if turn is not None:
                return self.update(view, turn, text)
        changes: list[Change] = [Revise(item.id, text=text, why="updated")]
        for stored in _notes_of(view, [item.id]):
            new = replace(_Note.of(stored), **_described(text))
            changes.append(Revise(stored.id, text=new.text, data=new.data, why="updated"))
        return changes

    def removed(self, view: "View", gone: Sequence[str], *, purged: bool) -> list[Change]:
        """A deleted turn takes its note along; a purge also undoes what it put into other notes."""
        if not purged:
            return [Retire(note.id, "its turn was deleted") for note in _notes_of(view, gone)]
        lost = set(gone)
        changes: list[Change] = []
        links: dict[str, tuple[str, str]] = {}
        made: dict[str, Add] = {}
        for stored in view.items(kind=NOTE):
            note = _Note.of(stored)
            turn = view.get(note.turns[0])
            if turn is not None and lost & set(note.turns):
                # Its past versions name what was purged, so that it has to begin anew.
                changes.append(Purge(stored.id, "another turn's words were in it"))
                made[stored.id] = _stored(turn, _alone(turn))
                links |= {edge.id: (edge.src, edge.dst) for edge in _links(view, stored.id)}
        changes += made.values()
        changes += [Link(made.get(a, a), LINK, made.get(b, b)) for a, b in links.values()]
        return changes

    def retrieve(self, view: "View", query: str, limit: int) -> list[Hit]:
        """Turns by their notes' score, and by a share of the best hit's that links to them."""
        found = {hit.id: hit for hit in view.search(query, limit, kinds=(NOTE,))}
        spread: dict[str, float] = {}
        for hit in list(found.values())[:FROM] if self.link_k else ():
            for edge in _links(view, hit.id):
                other = edge.dst if edge.src == hit.id else edge.src
                spread[other] = max(spread.get(other, 0.0), SPREAD * hit.score)
        beside = sorted(spread.keys() - found.keys(), key=lambda note: (-spread[note], note))
        notes = view.get_many([*found, *beside[: self.link_k]])
        turns = view.get_many(note.data["turns"][0] for note in notes.values())
        scored = []
        for name, note in notes.items():
            terms = dict(found[name].terms) if name in found else {}
            own = found[name].score if name in found else 0.0
            if name in spread:
                terms["link"] = spread[name]
            turn = turns.get(note.data["turns"][0])
            if turn is not None:
                scored.append((turn, own + spread.get(name, 0.0), terms))
        scored.sort(key=lambda one: (-one[1], one[0].position))
        return view.hits(scored[:limit])


def _links(view: "View", note: str) -> list[Edge]:
    return [*view.edges(src=note, rel=LINK), *view.edges(dst=note, rel=LINK)]


def _notes_of(view: "View", turns: Sequence[str]) -> list[Item]:
    made = view.derived(turns)
    found = view.get_many(note for some in made.values() for note in some)
    return [item for item in found.values() if item.kind == NOTE]


def _stored(turn: Item, note: _Note) -> Add:
    return Add(
        note.text, kind=NOTE, speaker=turn.speaker, session=turn.session, data=note.data,
        metadata=turn.metadata, valid_from=turn.valid_from, sources=(Source(turn.id),), key=turn.id,
    )  # fmt: skip


def _described(text: str) -> dict[str, Any]:
    """Keywords and context by rules."""
    rules = Rules()
    keywords = tuple(rules.keywords(text, KEYWORDS))
    return {"content": text, "keywords": keywords, "context": rules.summarise([text], CONTEXT)}


def _alone(turn: Item) -> _Note:
    """A note that knows no other."""
    described = _described(turn.text)
    tags = dict.fromkeys(described["keywords"][:2], turn.id)
    return _Note(**described, tags=tags, turns=(turn.id,))


def _decide(view: "View", drafts: Sequence[_Draft], known: Mapping[str | int, _Note]) -> None:
    """Ask a model, where there is one, once about all drafts."""
    texts: dict[str | int, str] = {key: note.text for key, note in known.items()}
    texts |= {number: draft.turn.document for number, draft in enumerate(drafts)}
    asked = [
        {
            "text": draft.turn.document,
            "neighbours": [
                {"number": i, "text": texts[key]} for i, (key, _) in enumerate(draft.near)
            ],
        }
        for draft in drafts
    ]
    answer = view.judgement.ask(_TASK, {"notes": asked}, _ANSWER) if drafts else None
    if answer is None:
        return
    if len(answer["notes"]) != len(drafts):
        _warn(f"{len(answer['notes'])} notes are described of {len(drafts)}")
    for draft, decided in zip(drafts, answer["notes"], strict=False):
        draft.decided = decided


def _settle(
    draft: _Draft, known: Mapping[str | int, _Note]
) -> tuple[_Note, list[str | int], dict[str | int, _Note]]:
    """A draft's note, the neighbours it is linked to, and those that it changes."""
    note = _alone(draft.turn)
    if draft.decided is not None:
        return _as_decided(note, draft, known)
    mine = _stems(note.keywords)
    linked = [
        key
        for key, cosine in draft.near
        if cosine >= LIKE or len(mine & _stems(known[key].keywords)) >= 2
    ]
    seen = Counter(tag for key in linked for tag in known[key].tags)
    common = {
        tag: origin
        for key in linked
        for tag, origin in known[key].tags.items()
        if 2 * seen[tag] > len(linked)
    }
    learnt = {key: known[key].tagged(note.tags) for key in linked}
    evolved = {key: new for key, new in learnt.items() if new != known[key]}
    return note.tagged(common), linked, evolved


def _as_decided(
    note: _Note, draft: _Draft, known: Mapping[str | int, _Note]
) -> tuple[_Note, list[str | int], dict[str | int, _Note]]:
    """What a model has decided, as far as it can be done."""
    decided, near = draft.decided, [key for key, _ in draft.near]
    assert decided is not None
    # The model has read the neighbours: words of each may be in all that it wrote.
    seen = _distinct([*note.turns, *(known[key].turns[0] for key in near)])
    keywords, tags = _words(decided["keywords"], KEYWORDS), _words(decided["tags"], TAGS)
    note = replace(
        note,
        keywords=keywords or note.keywords,
        tags=dict.fromkeys(tags, draft.turn.id) or note.tags,
        context=decided["context"].strip() or note.context,
        turns=seen,
    )
    if not decided["should_evolve"]:
        return note, [], {}
    linked: list[str | int] = []
    evolved: dict[str | int, _Note] = {}
    if "strengthen" in decided["actions"]:
        valid = [n for n in decided["connections"] if 0 <= n < len(near)]
        if len(valid) < len(decided["connections"]):
            _warn(f"connections {decided['connections']} name more than {len(near)} neighbours")
        linked = [near[n] for n in dict.fromkeys(valid)]
    if "update_neighbor" in decided["actions"]:
        for name in ("new_context", "new_tags"):
            if len(decided[name]) != len(near):
                _warn(f"{name} has {len(decided[name])} entries for {len(near)} neighbours")
        rows = zip_longest(
            near, decided["new_context"][: len(near)], decided["new_tags"][: len(near)]
        )
        for key, context, tags in rows:
            old = known[key]
            new = replace(
                old,
                context=(context or "").strip() or old.context,
                tags=dict.fromkeys(_words(tags or (), TAGS), draft.turn.id) or old.tags,
            )
            if new != old:
                evolved[key] = replace(new, turns=_distinct([*old.turns, *seen]))
    return note, linked, evolved


def _distinct(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def _words(given: Iterable[str], limit: int) -> tuple[str, ...]:
    return _distinct(word.strip() for word in given if word.strip())[:limit]


def _stems(words: Iterable[str]) -> set[str]:
    return {stem(word) for word in words}


def _warn(reason: str) -> None:
    warnings.warn(f"part of a model's answer is not used: {reason}", FallbackWarning, stacklevel=2)
