"""Units of memory of the same conversation: chunks, triples, facts, summaries, each with sources.

Besides LoCoMo, questions over several documents are read: HotpotQA, 2WikiMultihopQA (`context` and
`supporting_facts`) and MuSiQue (`paragraphs`), each question with its documents as a conversation
whose sessions are documents and whose speakers are their titles.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from holdfast.errors import UsageError, unknown
from holdfast.longterm.evaluation import locomo
from holdfast.longterm.evaluation.locomo import Conversation, Question
from holdfast.longterm.language.judgement import Rules

SINGLE = ("chunks", "triples", "facts", "summaries")
STRUCTURES = (*SINGLE, "mixed")
CHUNK = 100  # tokens of a chunk, where its first turn is not longer
PIECE = re.compile(r"\w+|[^\w\s]")
# Documents were not said at any time; only what a conversation says is dated.
_UNDATED = datetime(1, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Unit:
    """A piece of memory; `sources` are "conversation/turn" ids of what it was made from."""

    text: str
    structure: str
    sources: tuple[str, ...]
    when: datetime | None = None

    def __post_init__(self) -> None:
        if not self.sources:
            raise UsageError(
                f"the unit {self.text[:60]!r} has no source; name the turns that it was made from"
            )

    @property
    def line(self) -> str:
        """As it stands in a context: what was said last year depends on when it was said."""
        return f"{self.when:%-d %B %Y}: {self.text}" if self.when else self.text


@dataclass(frozen=True)
class Material:
    """A conversation, and facts and summaries of it as (text, ids of turns)."""

    conversation: Conversation
    facts: tuple[tuple[str, tuple[str, ...]], ...]
    summaries: tuple[tuple[str, tuple[str, ...]], ...]

    @classmethod
    def of(
        cls, conversation: Conversation, annotated: Mapping[str, Any] | None = None
    ) -> "Material":
        """From a data set's `observation` and `session_summary`, or by rules where it has none."""
        annotated = annotated or {}
        by_session = _sessions(conversation)
        known = [turn.id for turn in conversation.turns]
        facts: list[tuple[str, tuple[str, ...]]] = []
        for said in annotated.get("observation", {}).values():
            for text, ids in (pair for pairs in said.values() for pair in pairs):
                ids = [ids] if isinstance(ids, str) else ids
                facts.append((text, locomo.repair(ids, known)))
        rules = Rules()
        if "observation" not in annotated:
            facts = [
                (fact.text, (turn.id,))
                for turn in conversation.turns
                for fact in rules.facts(turn.text, _said(turn), turn.speaker)
            ]
        given = annotated.get("session_summary", {})
        summaries = []
        for session, turns in by_session.items():
            text = given.get(f"session_{session}_summary")
            text = text or rules.summarise([turn.line for turn in turns], CHUNK)
            if text:
                summaries.append((text, tuple(turn.id for turn in turns)))
        return cls(conversation, tuple(facts), tuple(summaries))


def _said(turn: locomo.Turn) -> datetime | None:
    return None if turn.when == _UNDATED else turn.when


def _sessions(conversation: Conversation) -> dict[str, list[locomo.Turn]]:
    found: dict[str, list[locomo.Turn]] = {}
    for turn in conversation.turns:
        found.setdefault(turn.session, []).append(turn)
    return found


def load(source: str | Path) -> list[Material]:
    """LoCoMo's conversations with their observations and summaries, or questions with documents.

    Raises:
        UsageError: no such file, or none of the known layouts.
    """
    try:
        text = Path(source).read_text(encoding="utf-8")
        items = _lines(text) if str(source).endswith(".jsonl") else json.loads(text)
    except FileNotFoundError:
        raise UsageError(f"{source} does not exist; name the benchmark's JSON file") from None
    except ValueError as error:
        raise UsageError(f"{source} is not JSON: {error}") from None
    items = items if isinstance(items, list) else [items]
    if items and all(isinstance(item, dict) for item in items):
        for key, read in (("supporting_facts", _sentences), ("paragraphs", _paragraphs)):
            if all(key in item for item in items):
                return [Material.of(read(item)) for item in items]
    conversations = locomo.load(source)
    return [Material.of(one, item) for one, item in zip(conversations, items, strict=True)]


def _lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _sentences(item: Mapping[str, Any]) -> Conversation:
    """HotpotQA's or 2WikiMultihopQA's: documents as [title, sentences]."""
    turns = [
        locomo.Turn(f"{document}:{n}", str(document), title, sentence.strip(), _UNDATED)
        for document, (title, sentences) in enumerate(item["context"])
        for n, sentence in enumerate(sentences)
        if sentence.strip()
    ]
    titles = {title: document for document, (title, _) in enumerate(item["context"])}
    wanted = [f"{titles[t]}:{n}" for t, n in item["supporting_facts"] if t in titles]
    return _conversation(str(item["_id"]), turns, item, item.get("type", "multi-hop"), wanted)


def _paragraphs(item: Mapping[str, Any]) -> Conversation:
    """MuSiQue's: paragraphs, of which some support the answer."""
    turns = [
        locomo.Turn(str(n), str(n), one["title"], one["paragraph_text"], _UNDATED)
        for n, one in enumerate(item["paragraphs"])
    ]
    wanted = [str(n) for n, one in enumerate(item["paragraphs"]) if one.get("is_supporting")]
    return _conversation(str(item["id"]), turns, item, "multi-hop", wanted)


def _conversation(
    name: str,
    turns: Sequence[locomo.Turn],
    item: Mapping[str, Any],
    category: str,
    wanted: Sequence[str],
) -> Conversation:
    session_of = {turn.id: turn.session for turn in turns}
    evidence = tuple(one for one in dict.fromkeys(wanted) if one in session_of)
    sessions = tuple(dict.fromkeys(session_of[one] for one in evidence))
    question = Question(item["question"], str(item["answer"]), category, evidence, sessions)
    return Conversation(name, tuple(turns), (question,))


def units(material: Material, structure: str) -> list[Unit]:
    """All units of one structure; "mixed" is the union of the others.

    Raises:
        UsageError: an unknown structure, or a unit without source.
    """
    if structure == "mixed":
        return [unit for one in SINGLE for unit in units(material, one)]
    if structure not in SINGLE:
        raise unknown("structure", structure, STRUCTURES)
    said = {turn.id: _said(turn) for turn in material.conversation.turns}
    made: Iterable[tuple[str, tuple[str, ...]]]
    if structure == "chunks":
        made = _chunks(material.conversation)
    elif structure == "triples":
        rules = Rules()
        made = [
            (f"{one.head} {one.relation.replace('_', ' ')} {one.tail}".strip(), sources)
            for text, sources in material.facts
            for one in rules.triples(text)
        ]
    else:
        made = material.facts if structure == "facts" else material.summaries
    name = material.conversation.id
    return [
        Unit(
            text, structure, tuple(f"{name}/{source}" for source in sources),
            said[sources[0]] if sources else None,
        )
        for text, sources in dict.fromkeys(made)
    ]  # fmt: skip


def _chunks(conversation: Conversation) -> list[tuple[str, tuple[str, ...]]]:
    chunks: list[list[locomo.Turn]] = []
    for turns in _sessions(conversation).values():
        used = CHUNK + 1
        for turn in turns:
            size = count(turn.line)
            if used + size > CHUNK:
                chunks.append([])
                used = 0
            chunks[-1].append(turn)
            used += size
    return [("\n".join(t.line for t in turns), tuple(t.id for t in turns)) for turns in chunks]


def count(text: str) -> int:
    """Tokens of a text: words and marks."""
    return len(PIECE.findall(text))
