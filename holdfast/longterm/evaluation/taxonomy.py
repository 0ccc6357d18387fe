"""What every policy is and what it costs, in one table: traits as declared, the rest measured.

Each policy lives through the same short conversation in a file of its own, with vectors that are
hashes, so that a row says what the policy adds and not what an encoder takes.
"""

import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from holdfast.errors import unknown
from holdfast.longterm.memory import Memory
from holdfast.longterm.policy import policies
from holdfast.longterm.retrieval.embed import Hash

# What a form is to an answering model: statements to look up, or what was said or thought.
SOURCES = {
    "facts": "knowledge base", "graph": "knowledge base", "turns": "explicit memory",
    "notes": "explicit memory", "summaries": "explicit memory", "thoughts": "explicit memory",
    "rationales": "explicit memory", "feedback": "explicit memory",
}  # fmt: skip
_START = datetime(2024, 1, 1, 9, tzinfo=UTC)
_TALK = (
    ("Ann", "I live in {city} now and I work at {firm}."),
    ("Ben", "How do you like it there?"),
    ("Ann", "My cat Miso loves the new flat, it has a balcony."),
    ("Ben", "Yesterday I bought a {colour} bicycle near the station."),
)
_NAMES = (
    ("Bern", "Acme", "red"), ("Basel", "Globex", "blue"), ("Chur", "Initech", "green"),
    ("Zug", "Umbra", "black"), ("Thun", "Hooli", "white"), ("Sion", "Vandel", "yellow"),
)  # fmt: skip
_QUESTIONS = ("Where does Ann live?", "What did Ben buy?", "Who is Miso?", "Where does Ann work?")


def rows(names: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """One row for each policy, or for those named.

    `provenance` is the percentage of memories made by the policy that name their source (None: it
    makes none), `update_events` what the log gains by one correction; times in milliseconds, bytes
    for each turn that came in.

    Raises:
        UsageError: no policy of that name.
    """
    known = policies()
    wanted = list(known) if names is None else list(names)
    for name in wanted:
        if name not in known:
            raise unknown("memory policy", name, known)
    return [
        {"policy": name, **asdict(known[name].traits), "source": SOURCES[known[name].traits.form],
         **_measured(name)}
        for name in wanted
    ]  # fmt: skip


def _measured(name: str) -> dict[str, Any]:
    now = [_START]
    with tempfile.TemporaryDirectory() as folder:
        with Memory(
            Path(folder) / "memory.db", policy=name, embedder=Hash(), clock=lambda: now[0],
            durability="process",
        ) as memory:  # fmt: skip
            memory.store.shred()  # what the log holds is in the file then
            empty = memory.store.nbytes()
            said: list[str] = []
            for n, (city, firm, colour) in enumerate(_NAMES):
                now[0] += timedelta(days=1)
                talk = [
                    {"speaker": who, "content": text.format(city=city, firm=firm, colour=colour)}
                    for who, text in _TALK
                ]
                memory.add(talk, session=f"{n}", metadata={"said": True})
                memory.summarise(f"{n}")
                said += [turn["content"] for turn in talk]
            memory.store.shred()
            size = (memory.store.nbytes() - empty) / len(said)
            took = []
            for question in _QUESTIONS:
                start = time.perf_counter()
                memory.search(question)
                took.append(time.perf_counter() - start)
            with memory.reading() as view:
                items = view.items()
                sources = view.sources([item.id for item in items])
                # What is not searched is a policy's own note of where it stands.
                made = [
                    bool(sources[item.id])
                    for item in items
                    if item.text not in said and view.vector(item.id) is not None
                ]
                turn = next((item for item in items if item.text in said), items[0])
                before = len(view.events())
            start = time.perf_counter()
            memory.update(turn.id, f"{turn.text} That is what I meant.")
            update = time.perf_counter() - start
            with memory.reading() as view:
                events = len(view.events()) - before
    return {
        "provenance": 100 * statistics.mean(made) if made else None,
        "update_events": events,
        "update_ms": 1e3 * update,
        "search_ms": 1e3 * statistics.median(took),
        "bytes_per_turn": round(size),
    }


def cells(row: dict[str, Any]) -> list[str]:
    """A row as texts, in the order of `HEADS`."""
    provenance = row["provenance"]
    return [
        row["policy"], ", ".join(row["types"]), row["form"], ", ".join(row["processes"]),
        "yes" if row["forgets"] else "no", row["conflict"], "yes" if row["needs_llm"] else "no",
        row["source"], "as said" if provenance is None else f"{provenance:.0f} %",
        str(row["update_events"]), f"{row['update_ms']:.1f}", f"{row['search_ms']:.1f}",
        f"{row['bytes_per_turn']:,}",
    ]  # fmt: skip


HEADS = (
    "policy", "types", "form", "processes", "forgets", "conflict", "needs LLM", "source",
    "provenance", "update events", "update ms", "search ms", "B/turn",
)  # fmt: skip


def markdown(table: Sequence[dict[str, Any]]) -> str:
    """The table for a document."""
    lines = [HEADS, ["---"] * len(HEADS), *map(cells, table)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
