"""MaLP (150): notes rise from working to short- to long-term memory as they are used.

Keeps    turns as the origin of notes, not searched; notes, each in one tier: working (the dialogue
         that goes on), short (of past dialogues), long (used often), archive (kept, not recalled).
Form     a note is an item with its tier as its shelf, its sort (user, common, summary) and how
         often it was used; a move between tiers changes neither text nor history.
Bytes    text + 4*d + row per note, text + row per turn; a user's adapter: see `personal`. A call
         reads the notes of three tiers: the dialogue's, as many as the short-term memory may hold,
         and what was asked for often. The archive, where all else goes, is not read.
Source   K. Zhang et al., "LLM-based Medical Assistant Personalization with Short- and Long-Term
         Memory Coordination", 2024; authors' code read.
Departs  the authors' code leaves the transfer between tiers empty: here a note rises with its third
         use, and the least recently used of a full short-term memory go to the archive. The edit
         distance is between words, so that the order and the length of a question do not count, and
         a note that has risen is still found by the words by which it rose.
"""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from holdfast.errors import UsageError
from holdfast.longterm.language.extract import Fact
from holdfast.longterm.language.llm import Rules
from holdfast.longterm.language.shapes import listing, record
from holdfast.longterm.language.wording import content
from holdfast.longterm.policy import Policy, Traits, as_turn
from holdfast.longterm.records import Add, Change, Hit, Item, Retire, Revise, Source, Touch, Turn

if TYPE_CHECKING:
    from holdfast.longterm.store.view import View

NOTE = "note"
WORKING, SHORT, LONG, ARCHIVE = "working", "short", "long", "archive"
USER, COMMON, SUMMARY = "user", "common", "summary"
LIKE = 0.5  # of a question's words, how far they may be from a note's to be found by them

_STRING = {"type": "string"}
_ANSWER = record(
    notes=listing(record(turn={"type": "integer"}, note=_STRING, sort={"enum": [USER, COMMON]}))
)
_TASK = (
    "Take notes of the numbered turns: sentences in the third person that can be read alone. Sort "
    "`user`: what is true of the speaker or wanted by them; `common`: knowledge about the world."
)


class MaLP(Policy):
    """Note each turn, recall by words and by meaning, let what is used rise.

    Args:
        capacity: notes in the short-term memory.
        uses: of a note in the short-term memory, with which it rises to the long-term memory.
        near: notes that are found by their words at most.
        alike: cosine from which a note in the long-term memory is found.
        summary: words of a dialogue's summary.

    Raises:
        UsageError: a number below 1, or a cosine outside -1..1.
    """

    traits = Traits(
        types=("episodic", "semantic"),
        form="notes",
        processes=("encode", "consolidate", "store", "retrieve"),
    )

    def __init__(
        self,
        *,
        capacity: int = 256,
        uses: int = 3,
        near: int = 6,
        alike: float = 0.6,
        summary: int = 40,
    ):
        if min(capacity, uses, near, summary) < 1:
            raise UsageError(
                f"capacity={capacity}, uses={uses}, near={near} and summary={summary} must be at "
                "least 1"
            )
        if not -1 <= alike <= 1:
            raise UsageError(f"alike={alike} is no cosine; give a number in -1..1")
        self.capacity, self.uses, self.near = capacity, uses, near
        self.alike, self.summary = alike, summary

    def write(self, view: "View", turns: Sequence[Turn]) -> list[Change]:
        return [as_turn(turn, searchable=False) for turn in turns]

    def link(self, view: "View", items: Sequence[Item]) -> list[Change]:
        """Working memory: what the coordinator notes of new turns."""
        return list(_noted(view, [item for item in items if item.kind != NOTE]))

    def summarise(self, view: "View", session: str | None) -> list[Change]:
        """A dialogue's notes go to the short-term memory, its oldest ones to the archive."""
        ended = [n for n in _in(view, WORKING) if session in (None, n.session)]
        if not ended:
            return []
        changes: list[Change] = [Touch(n.id, data={**n.data, "shelf": SHORT}) for n in ended]
        made = 0
        for name in dict.fromkeys(n.session for n in ended if n.session is not None):
            turns = [item for item in view.items(session=name) if item.kind != NOTE]
            text = view.judgement.summarise([turn.document for turn in turns], self.summary)
            if text:
                made += 1
                changes.append(
                    Add(
                        text, NOTE, session=name, data=_data(SHORT, SUMMARY),
                        valid_from=turns[-1].valid_from, sources=[Source(t.id) for t in turns],
                    )
                )  # fmt: skip
        short = _in(view, SHORT) + ended
        short.sort(key=lambda n: (n.used_at or n.recorded_at, n.position))
        over = short[: max(0, len(short) + made - self.capacity)]
        return changes + [Touch(n.id, data={**n.data, "shelf": ARCHIVE}) for n in over]

    def update(self, view: "View", item: Item, text: str) -> list[Change]:
        """A corrected turn is noted anew."""
        changes: list[Change] = [Revise(item.id, text=text, why="updated")]
        if item.kind == NOTE:
            return changes
        old, new = _notes_of(view, [item.id]), _noted(view, [replace(item, text=text)])
        pairs = zip(old, new, strict=False)
        changes += [Revise(note.id, text=add.text, why="updated") for note, add in pairs]
        changes += [Retire(note.id, "its turn was corrected") for note in old[len(new) :]]
        return [*changes, *new[len(old) :]]

    def removed(self, view: "View", gone: Sequence[str], *, purged: bool) -> list[Change]:
        if purged:
            return []
        return [Retire(note.id, "its turn was deleted") for note in _notes_of(view, gone)]

    def retrieve(self, view: "View", query: str, limit: int) -> list[Hit]:
        """All but the archive by words, long-term memory by meaning too."""
        risen = _in(view, LONG)
        notes = [*_in(view, WORKING), *_in(view, SHORT), *risen]
        asked = content(query)
        worded = [(note, content(note.text)) for note in notes]
        # A summary has some word for everything: of equally near notes the shortest, then newest.
        far = [(distance(asked, w), len(w), -note.position, note) for note, w in worded]
        close = sorted(one for one in far if one[0] <= LIKE)[: self.near]
        found = {note.id: (note, {"words": 1 - d}) for d, _, _, note in close}
        if risen:
            held = [note.id for note in risen]
            for note, cosine in view.nearest(query, limit, kinds=(NOTE,), among=held):
                if cosine >= self.alike:
                    found.setdefault(note.id, (note, {}))[1]["cosine"] = cosine
        ranked = [(note, max(terms.values()), terms) for note, terms in found.values()]
        ranked.sort(key=lambda one: (-one[1], len(one[0].text), -one[0].position))
        return view.hits(ranked[:limit])

    def recalled(self, view: "View", hits: Sequence[Hit]) -> list[Change]:
        """The executive: a use is counted, and what is used often rises."""
        changes: list[Change] = []
        for note in view.get_many(hit.id for hit in hits).values():
            if note.kind == NOTE:
                data = {**note.data, "uses": note.data["uses"] + 1}
                if data["shelf"] == SHORT and data["uses"] >= self.uses:
                    data["shelf"] = LONG
                changes.append(Touch(note.id, data=data))
        return changes


def distance(asked: Sequence[str], words: Sequence[str]) -> float:
    """Mean over the words asked of the edits to the nearest word, as shares of the longer one."""
    if not asked or not words:
        return 1.0
    return sum(min(_edits(a, w) / max(len(a), len(w)) for w in words) for a in asked) / len(asked)


@functools.lru_cache(maxsize=1 << 16)
def _edits(one: str, other: str) -> int:
    """Letters to insert, delete or replace (Levenshtein)."""
    if one == other:
        return 0
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        last, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (a != b))
    return row[-1]


def _noted(view: "View", turns: Sequence[Item]) -> list[Add]:
    """What is worth noting of turns, at least themselves; a model is asked once."""
    given = [{"turn": i, "text": turn.document} for i, turn in enumerate(turns)]
    answer = view.judgement.ask(_TASK, {"turns": given}, _ANSWER) if turns else None
    found: list[list[tuple[str, str, Source]]] = [[] for _ in turns]
    for one in answer["notes"] if answer is not None else ():
        if 0 <= one["turn"] < len(turns) and one["note"].strip():
            source = Source(turns[one["turn"]].id)
            found[one["turn"]].append((one["note"].strip(), one["sort"], source))
    rules = Rules()
    for turn, notes in zip(turns, found, strict=True):
        if answer is None:
            for fact in rules.facts(turn.text, turn.valid_from, turn.speaker):
                source = Source(turn.id, fact.start, fact.end)
                notes.append((fact.text, _sort(fact, turn.speaker), source))
        if not notes:
            notes.append((turn.document, COMMON, Source(turn.id)))
    return [
        Add(
            text, NOTE, session=turn.session, data=_data(WORKING, sort), metadata=turn.metadata,
            valid_from=turn.valid_from, sources=(source,), key=turn.session or "",
        )
        for turn, notes in zip(turns, found, strict=True)
        for text, sort, source in notes
    ]  # fmt: skip


def _sort(fact: Fact, speaker: str | None) -> str:
    owner = fact.subject.split("'s ")[0]
    return USER if owner in (speaker, "I") else COMMON


def _data(tier: str, sort: str) -> dict[str, str | int]:
    return {"shelf": tier, "sort": sort, "uses": 0}


def _in(view: "View", tier: str) -> list[Item]:
    return view.items(kind=NOTE, shelf=tier)


def _notes_of(view: "View", turns: Sequence[str]) -> list[Item]:
    made = view.derived(turns)
    found = view.get_many(note for some in made.values() for note in some)
    notes = [n for n in found.values() if n.kind == NOTE and n.data["sort"] != SUMMARY]
    return sorted(notes, key=lambda note: note.position)
