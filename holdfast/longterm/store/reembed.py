"""Change the embedder of a memory, in batches, while others go on using it.

Vectors of the new embedder are written beside those of the old one, which answer until all are
there; one transaction then encodes what has changed meanwhile and changes over. What is cut off at
any moment goes on where it was when it is started again.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from holdfast.errors import HoldfastError
from holdfast.longterm.records import document
from holdfast.longterm.retrieval.embed import AFTER, BEFORE, Embedder
from holdfast.longterm.retrieval.search import Searcher
from holdfast.longterm.store.apply import Applied
from holdfast.longterm.store.maintain import Tell
from holdfast.longterm.store.rows import dumps
from holdfast.longterm.store.schema import OWN, TOKENS, WINDOW
from holdfast.longterm.store.sqlite import Transaction
from holdfast.longterm.work import ATTEMPTS, Pending, Work

if TYPE_CHECKING:
    from holdfast.longterm.memory import Memory

BATCH = 64  # memories that are encoded at once, outside of any lock
_REMOVED = 2000  # memories whose old vectors are removed in one transaction
_NOTE = "reembed"  # key of `meta`: what a run in progress has seen


@dataclass(frozen=True)
class Reembedded:
    """What was done: texts encoded in this run, and memories whose old vectors were removed."""

    embedder: str
    encoded: int
    removed: int


class _Ahead(Searcher):
    """Encodes under the new model, which the store does not use yet."""

    def model(self, transaction: Transaction) -> int:
        return _model(transaction, self.embedder)

    claim = model


def reembed(
    memory: "Memory",
    embedder: Embedder,
    *,
    batch: int = BATCH,
    tell: Tell = lambda done: None,
) -> Reembedded:
    """Give all versions of all memories vectors of another embedder, and change over to it.

    With the embedder that the memory has already, only missing vectors are made. Afterwards
    `memory` uses `embedder`; others that have the store open are told to open it anew.

    Args:
        batch: memories per transaction.
        tell: called with how many memories have been encoded since it was called last.
    """
    store, ahead = memory.store, _Ahead(memory.store, embedder)
    with store.write() as transaction:
        _begin(transaction, embedder)
    encoded = after = 0
    while True:
        with store.read() as transaction:
            todo = _missing(transaction, _model(transaction, embedder), after, batch)
        if not todo:
            break
        _write(memory, ahead, todo)
        encoded, after = encoded + len(todo), todo[-1][0]
        tell(len(todo))
    encoded += _change_over(memory, ahead)
    memory.embedder = embedder
    memory.searcher = Searcher(store, embedder, memory.searcher.ram)
    return Reembedded(embedder.id, encoded, _remove_others(memory, embedder))


def left_to_do(memory: "Memory", embedder: Embedder) -> int:
    """Versions that have no vectors of an embedder yet."""
    with memory.store.read() as transaction:
        rows = transaction.rows("SELECT id FROM model WHERE name = ?", (embedder.id,))
        return transaction.rows(
            f"SELECT count(*) FROM memory v WHERE {_LACKS}",
            (rows[0][0] if rows else 0, OWN, WINDOW),
        )[0][0]


_LACKS = (
    "v.searchable = 1 AND (SELECT count(*) FROM embedding e WHERE e.version = v.version "
    "AND e.model = ? AND e.part IN (?, ?)) < 2"
)


def _model(transaction: Transaction, embedder: Embedder) -> int:
    rows = transaction.rows("SELECT id FROM model WHERE name = ?", (embedder.id,))
    if not rows:
        raise _overtaken(embedder)
    return rows[0][0]


def _overtaken(embedder: Embedder) -> HoldfastError:
    return HoldfastError(
        f"another run has changed this memory to another embedder than {embedder.id} meanwhile; "
        f"start again if it shall be {embedder.id}"
    )


def _begin(sql: Transaction, embedder: Embedder) -> None:
    """Note up to where each space's log is accounted for, unless a run is in progress."""
    sql.run(
        "INSERT INTO model (name, dim) VALUES (?, ?) ON CONFLICT (name) DO NOTHING",
        (embedder.id, embedder.dim),
    )
    used = sql.rows("SELECT value FROM meta WHERE key = 'embedder'")
    if used and used[0][0] == embedder.id:
        sql.run("DELETE FROM meta WHERE key = ?", (_NOTE,))
        return
    noted = sql.rows("SELECT value FROM meta WHERE key = ?", (_NOTE,))
    if noted and json.loads(noted[0][0])["embedder"] == embedder.id:
        return
    # Left of an earlier time, they may stand for neighbours that are others now.
    sql.run("DELETE FROM embedding WHERE model = ?", (_model(sql, embedder),))
    seqs = {str(number): seq for number, seq in sql.rows("SELECT id, seq FROM space")}
    sql.run(
        "INSERT INTO meta (key, value) VALUES (?, ?) "
        "ON CONFLICT (key) DO UPDATE SET value = excluded.value",
        (_NOTE, dumps({"embedder": embedder.id, "seqs": seqs})),
    )


_Row = tuple[int, int, str, str | None, int, str | None, str, int | None]


def _missing(sql: Transaction, model: int, after: int = 0, limit: int | None = None) -> list[_Row]:
    tail = "" if limit is None else f" LIMIT {limit}"
    return sql.rows(
        "SELECT v.version, v.space, v.kind, v.session, v.position, v.speaker, v.text, "
        f"v.retired_at FROM memory v WHERE v.version > ? AND {_LACKS} ORDER BY v.version{tail}",
        (after, model, OWN, WINDOW),
    )  # type: ignore[return-value]


def _write(memory: "Memory", ahead: _Ahead, rows: Sequence[_Row]) -> None:
    with memory.store.read() as transaction:
        turns = [_among(transaction, row) for row in rows]
    parts = _encode(rows, turns, Work(ahead.embedder, None))
    with memory.store.write() as transaction:
        _put(transaction, ahead.model(transaction), parts)


def _encode(
    rows: Sequence[_Row], turns: Sequence[tuple[tuple[str, ...], int]], work: Work
) -> list[tuple[int, int, bytes]]:
    """(version, part, bytes) of all that is kept of some versions."""
    own, windows = work.encode_both([document(row[5], row[6]) for row in rows], turns)
    parts: list[tuple[int, int, bytes]] = []
    for (version, *_), vector, found in zip(rows, own, windows, strict=True):
        parts.append((version, OWN, vector.astype(np.float32).tobytes()))
        parts.append((version, WINDOW, found.window.astype(np.float32).tobytes()))
        if found.tokens is not None:
            parts.append((version, TOKENS, found.tokens))
    return parts


def _put(sql: Transaction, model: int, parts: Sequence[tuple[int, int, bytes]]) -> None:
    # A version may have been purged while it was encoded.
    sql.many(
        "INSERT INTO embedding (version, model, part, bytes) "
        "SELECT version, ?, ?, ? FROM memory WHERE version = ? "
        "ON CONFLICT (version, model, part) DO UPDATE SET bytes = excluded.bytes",
        [(model, part, blob, version) for version, part, blob in parts],
    )


def _among(sql: Transaction, row: _Row) -> tuple[tuple[str, ...], int]:
    """(texts around a version, its place among them); a retired one's from when it was retired."""
    _, space, kind, session, position, speaker, text, retired = row
    if session is None:
        return (document(speaker, text),), 0
    then, args = "retired_at IS NULL", []
    if retired is not None:
        then = "recorded_at < ? AND (retired_at IS NULL OR retired_at >= ?)"
        args = [retired, retired]
    found = []
    for beyond, order, reach in (("<", "DESC", BEFORE), (">", "ASC", AFTER)):
        found.append([
            document(*words)
            for words in sql.rows(
                "SELECT speaker, text FROM memory WHERE space = ? AND kind = ? AND session = ? "
                f"AND position {beyond} ? AND searchable = 1 AND {then} "
                f"ORDER BY position {order} LIMIT ?",
                [space, kind, session, position, *args, reach],
            )
        ])  # fmt: skip
    before, after = found
    return (*reversed(before), document(speaker, text), *after), len(before)


def _change_over(memory: "Memory", ahead: _Ahead) -> int:
    """Encode what changed since the run began, and make the new embedder the memory's own."""
    work = Work(ahead.embedder, None)
    for attempt in range(ATTEMPTS + 1):
        work.deferring = attempt < ATTEMPTS
        try:
            with memory.store.write() as transaction:
                encoded = _catch_up(transaction, ahead, work)
                transaction.run(
                    "INSERT INTO meta (key, value) VALUES ('embedder', ?) "
                    "ON CONFLICT (key) DO UPDATE SET value = excluded.value",
                    (ahead.embedder.id,),
                )
                transaction.run("DELETE FROM meta WHERE key = ?", (_NOTE,))
            return encoded
        except Pending:
            work.settle()
    raise AssertionError("the last attempt encodes by itself")


def _catch_up(sql: Transaction, ahead: _Ahead, work: Work) -> int:
    model = ahead.model(sql)
    rows = _missing(sql, model)
    _put(sql, model, _encode(rows, [_among(sql, row) for row in rows], work))
    meta = dict(sql.rows("SELECT key, value FROM meta"))
    seqs = None
    if meta.get("embedder") != ahead.embedder.id:
        note = json.loads(meta.get(_NOTE, "{}"))
        if note.get("embedder") != ahead.embedder.id:
            raise _overtaken(ahead.embedder)
        seqs = note["seqs"]
    for space, seq in sql.rows("SELECT id, seq FROM space"):
        before = seq if seqs is None else seqs.get(str(space), 0)
        moved = _moved(sql, space, before)
        if moved:
            ahead.encode(sql, space, Applied(moved=moved), work)
    return len(rows)


def _moved(sql: Transaction, space: int, seq: int) -> list[tuple[str, str, int]]:
    """(kind, session, position) beside which something has changed since an event."""
    moved = []
    for op, item, after in sql.rows(
        "SELECT op, item, after FROM event WHERE space = ? AND seq > ? "
        "AND op IN ('add', 'revise', 'retire', 'purge')",
        (space, seq),
    ):
        if op == "purge":
            moved += [tuple(place) for place in json.loads(after)["places"]]
        else:
            moved += sql.rows(
                "SELECT DISTINCT kind, session, position FROM memory "
                "WHERE id = ? AND session IS NOT NULL",
                (item,),
            )
    return list(dict.fromkeys(moved))


def _remove_others(memory: "Memory", embedder: Embedder) -> int:
    """Remove vectors of all other embedders, a few at a time."""
    removed = 0
    with memory.store.read() as transaction:
        others = transaction.rows("SELECT id FROM model WHERE name <> ?", (embedder.id,))
    for (model,) in others:
        while True:
            with memory.store.write() as transaction:
                some = transaction.rows(
                    "SELECT DISTINCT version FROM embedding WHERE model = ? LIMIT ?",
                    (model, _REMOVED),
                )
                if not some:
                    transaction.run("DELETE FROM model WHERE id = ?", (model,))
                    break
                transaction.many(
                    "DELETE FROM embedding WHERE version = ? AND model = ?",
                    [(version, model) for (version,) in some],
                )
            removed += len(some)
    return removed
