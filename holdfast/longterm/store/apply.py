"""Carry out changes in a transaction: rows, versions and the event of each, all or nothing."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from holdfast.errors import UsageError
from holdfast.longterm.records import (
    Add,
    Change,
    Link,
    Purge,
    Retire,
    Revise,
    Source,
    Space,
    Touch,
    Unlink,
    document,
    micros,
    text_hash,
)
from holdfast.longterm.retrieval.terms import stems
from holdfast.longterm.store.rows import (
    STATE,
    dumps,
    key_hash,
    logged,
    made_from,
    space_row,
    state,
)
from holdfast.longterm.store.sqlite import Transaction


@dataclass
class Applied:
    """What changes did: what was added and purged, and what has to be encoded anew."""

    added: list[str] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    # (kind, session, position) whose neighbours read differently now.
    moved: list[tuple[str, str, int]] = field(default_factory=list)
    purged: list[str] = field(default_factory=list)


class Applier:
    """Applies changes to one space inside one transaction.

    Args:
        now: microseconds; moved up to the space's last event, so that recorded time never runs
            backwards within a space.
    """

    def __init__(self, transaction: Transaction, space: Space, *, actor: str, now: int):
        self.sql, self.space, self._actor = transaction, space, actor
        self.space_id, self.seq = space_row(transaction, space)
        last = transaction.rows(
            "SELECT time FROM event WHERE space = ? AND seq = ?", (self.space_id, self.seq)
        )
        self.now = max(now, last[0][0]) if last else now
        self._made: dict[int, str] = {}
        self.done = Applied()

    def apply(self, changes: Iterable[Change]) -> list[str]:
        """Apply in order; returns the id of the memory or edge that each change concerns.

        Raises:
            UsageError: an id that is not current here, an empty text, an interval that ends
                before it begins.
        """
        ids = []
        for change in changes:
            match change:
                case Add():
                    ids.append(self._add(change))
                    self._made[id(change)] = ids[-1]
                case Revise():
                    ids.append(self._revise(change))
                case Retire():
                    ids.append(self._retire(change))
                case Link():
                    ids.append(self._link(change))
                case Unlink():
                    ids.append(self._unlink(change.id, change.why))
                case Touch():
                    ids.append(self._touch(change))
                case Purge():
                    ids.append(self._purge(change))
                case _:
                    raise TypeError(f"{change!r} is no change; see holdfast.longterm.records")
        return ids

    def is_current(self, item: str) -> bool:
        """Whether there is such a memory now."""
        return bool(
            self.sql.rows(
                "SELECT 1 FROM memory WHERE id = ? AND space = ? AND retired_at IS NULL",
                (item, self.space_id),
            )
        )

    def is_known(self, item: str) -> bool:
        """Whether there is or was such a memory, and not purged."""
        return bool(
            self.sql.rows(
                "SELECT 1 FROM memory WHERE id = ? AND space = ? LIMIT 1", (item, self.space_id)
            )
        )

    def finish(self) -> None:
        """Note how far the space's log goes, for whoever keeps an index of it."""
        self.sql.run("UPDATE space SET seq = ? WHERE id = ?", (self.seq, self.space_id))

    def _log(
        self, op: str, item: str, before: Mapping | None, after: Mapping | None, why: str = ""
    ) -> int:
        self.seq += 1
        self.sql.run(
            "INSERT INTO event (space, seq, time, actor, op, item, before, after, why) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                self.space_id, self.seq, self.now, self._actor, op, item,
                None if before is None else dumps(before), None if after is None else dumps(after),
                why,
            ),
        )  # fmt: skip
        return self.seq

    def _id(self, letter: str, *parts: Any) -> str:
        text = "\x1f".join(map(str, (self.space, self.seq + 1, self.now, *parts)))
        return letter + hashlib.blake2b(text.encode(), digest_size=10).hexdigest()

    def _resolve(self, given: "str | Add") -> str:
        if isinstance(given, str):
            return given
        if id(given) not in self._made:
            raise UsageError(f"{given.text!r} is referred to before it is added; put its Add first")
        return self._made[id(given)]

    def _current(self, item: str, what: str) -> dict[str, Any]:
        rows = self.sql.rows(
            f"SELECT {STATE} FROM memory WHERE id = ? AND space = ? AND retired_at IS NULL",
            (item, self.space_id),
        )
        if not rows:
            raise UsageError(
                f"cannot {what} {item}: there is no such memory now in space {self.space}; "
                "get_all() lists those that there are"
            )
        return state(rows[0])

    def _add(self, change: Add) -> str:
        if not change.text.strip():
            raise UsageError("a memory without text cannot be added; give it a text")
        key = key_hash(change.kind, change.text, change.key)
        same = self.sql.rows(
            "SELECT id FROM memory WHERE space = ? AND key_hash = ? AND retired_at IS NULL",
            (self.space_id, key),
        )
        if same:
            self._made_from(same[0][0], change.sources)
            return self._touch(Touch(same[0][0]))
        item = self._id("m", change.kind, change.text)
        new = {
            "id": item, "kind": change.kind, "text": change.text, "speaker": change.speaker,
            "session": change.session, "position": self.seq + 1, "data": dict(change.data),
            "metadata": dict(change.metadata),
            "valid_from": micros(change.valid_from, "valid_from"),
            "valid_to": micros(change.valid_to, "valid_to"), "strength": float(change.strength),
            "uses": 0, "used_at": None, "searchable": int(change.searchable),
        }  # fmt: skip
        self._insert(new, key)
        sources = self._made_from(item, change.sources)
        after = {k: v for k, v in new.items() if k != "id"}
        if sources:
            after["sources"] = sources
        self._log("add", item, None, after)
        self.done.added.append(item)
        return item

    def _made_from(self, item: str, given: "Sequence[Source | Add]") -> list[list]:
        """Note what a memory is made from; returns what was not known of that before."""
        known = self.sql.rows(
            "SELECT origin, start_byte, end_byte FROM source WHERE memory = ?", (item,)
        )
        found: dict[tuple, None] = {}
        for one in given:
            source = one if isinstance(one, Source) else Source(self._resolve(one))
            row = (source.id, source.start, source.end)
            if row not in known:
                found[row] = None
        self.sql.many(
            "INSERT INTO source (memory, origin, start_byte, end_byte) VALUES (?, ?, ?, ?)",
            [(item, *row) for row in found],
        )
        return [list(row) for row in found]

    def _insert(self, new: Mapping[str, Any], key: bytes) -> None:
        first, last = new["valid_from"], new["valid_to"]
        if first is not None and last is not None and last < first:
            raise UsageError(
                f"{new['text']!r} would end ({last}) before it begins ({first}); swap valid_from "
                "and valid_to"
            )
        terms = None
        if new["searchable"]:
            terms = " ".join(stems(document(new["speaker"], new["text"])))
        rows = self.sql.rows(
            "INSERT INTO memory (id, space, kind, text, speaker, session, position, data, "
            "metadata, valid_from, valid_to, recorded_at, strength, uses, used_at, text_hash, "
            f"key_hash, searchable, terms, shelf) VALUES ({', '.join('?' * 20)}) RETURNING version",
            (
                new["id"], self.space_id, new["kind"], new["text"], new["speaker"], new["session"],
                new["position"], dumps(new["data"]), dumps(new["metadata"]), first, last, self.now,
                new["strength"], new["uses"], new["used_at"], text_hash(new["text"]), key,
                new["searchable"], terms, new["data"].get("shelf"),
            ),
        )  # fmt: skip
        self.done.versions.append(rows[0][0])
        self._moved(new)

    def _moved(self, item: Mapping[str, Any]) -> None:
        if item["session"] is not None and item["searchable"]:
            self.done.moved.append((item["kind"], item["session"], item["position"]))

    def _revise(self, change: Revise) -> str:
        item = self._resolve(change.id)
        old = self._current(item, "revise")
        new = dict(old)
        if change.text is not None:
            if not change.text.strip():
                raise UsageError(f"{item} cannot be revised to an empty text; delete it")
            new["text"] = change.text
        for name in ("data", "metadata"):
            if getattr(change, name) is not None:
                new[name] = dict(getattr(change, name))
        for name in ("valid_from", "valid_to"):
            if getattr(change, name) is not None:
                new[name] = micros(getattr(change, name), name)
        sources = self._made_from(item, change.sources)
        if new == old and not sources:
            return item
        self._end(old["version"])
        # A revised text is found again by itself, not by what it was when it came in.
        key = "\x1f".join((new["speaker"] or "", new["session"] or "", ""))
        self._insert(new, key_hash(new["kind"], new["text"], key))
        after = {**logged(new), "sources": sources} if sources else logged(new)
        self._log("revise", item, logged(old), after, change.why)
        return item

    def _end(self, version: int) -> None:
        self.sql.run("UPDATE memory SET retired_at = ? WHERE version = ?", (self.now, version))

    def _retire(self, change: Retire) -> str:
        old = self._current(change.id, "retire")
        self._end(old["version"])
        for (edge,) in self.sql.rows(
            "SELECT id FROM edge WHERE space = ? AND (src = ? OR dst = ?) AND retired_at IS NULL "
            "ORDER BY recorded_at, id",
            (self.space_id, change.id, change.id),
        ):
            self._unlink(edge, "its memory was retired")
        self._log("retire", change.id, logged(old), None, change.why)
        self._moved(old)
        return change.id

    def _link(self, change: Link) -> str:
        src, dst = self._resolve(change.src), self._resolve(change.dst)
        for end in (src, dst):
            self._current(end, "link")
        first, last = micros(change.valid_from, "valid_from"), micros(change.valid_to, "valid_to")
        if first is not None and last is not None and last < first:
            raise UsageError(f"edge {change.rel} would end before it begins; swap its times")
        same = self.sql.rows(
            "SELECT id, data, valid_from, valid_to FROM edge "
            "WHERE space = ? AND src = ? AND rel = ? AND dst = ? AND retired_at IS NULL",
            (self.space_id, src, change.rel, dst),
        )
        for edge, data, *interval in same:
            if [first, last] == interval and json.loads(data) == dict(change.data):
                return edge
        edge = self._id("e", src, change.rel, dst)
        new = {
            "src": src, "rel": change.rel, "dst": dst, "data": dict(change.data),
            "valid_from": first, "valid_to": last,
        }  # fmt: skip
        self.sql.run(
            "INSERT INTO edge (id, space, src, rel, dst, data, valid_from, valid_to, recorded_at) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (edge, self.space_id, src, change.rel, dst, dumps(change.data), first, last, self.now),
        )
        self._log("link", edge, None, new)
        return edge

    def _unlink(self, edge: str, why: str) -> str:
        rows = self.sql.rows(
            "SELECT src, rel, dst, data, valid_from, valid_to FROM edge "
            "WHERE id = ? AND space = ? AND retired_at IS NULL",
            (edge, self.space_id),
        )
        if not rows:
            raise UsageError(f"cannot unlink {edge}: there is no such edge now in {self.space}")
        old = dict(
            zip(("src", "rel", "dst", "data", "valid_from", "valid_to"), rows[0], strict=True)
        )
        old["data"] = json.loads(old["data"])
        self.sql.run("UPDATE edge SET retired_at = ? WHERE id = ?", (self.now, edge))
        self._log("unlink", edge, old, None, why)
        return edge

    def _touch(self, change: Touch) -> str:
        old = self._current(change.id, "touch")
        new = {
            "strength": old["strength"] if change.strength is None else float(change.strength),
            "uses": old["uses"] + 1,
            "used_at": self.now,
        }
        before: dict[str, Any] = {name: old[name] for name in new}
        after: dict[str, Any] = dict(new)
        if change.data is not None:
            before["data"], after["data"] = old["data"], dict(change.data)
            self.sql.run(
                "UPDATE memory SET data = ?, shelf = ? WHERE version = ?",
                (dumps(change.data), change.data.get("shelf"), old["version"]),
            )
        self.sql.run(
            "UPDATE memory SET strength = ?, uses = ?, used_at = ? WHERE version = ?",
            (*new.values(), old["version"]),
        )
        self._log("touch", change.id, before, after)
        return change.id

    def _purge(self, change: Purge) -> str:
        if not self.is_known(change.id):
            raise UsageError(
                f"cannot purge {change.id}: there was never such a memory in space {self.space}"
            )
        for item in sorted([change.id, *made_from(self.sql, change.id)]):
            self._erase(item, "" if item == change.id else f"made from {change.id}")
        return change.id

    def _erase(self, item: str, why: str) -> None:
        self._log("purge", item, None, self.wipe(item), why)

    def wipe(self, item: str) -> dict[str, list]:
        """Delete all rows of a memory and the texts in its log; returns what its tombstone says."""
        versions, places = [], []
        for version, *place in self.sql.rows(
            "SELECT version, kind, session, position FROM memory WHERE id = ? ORDER BY version",
            (item,),
        ):
            versions.append(version)
            if place[1] is not None:
                places.append(tuple(place))
        self.done.moved += places
        edges = self.sql.rows("SELECT id FROM edge WHERE src = ? OR dst = ?", (item, item))
        for (edge,) in edges:
            self._scrub(edge)
            self.sql.run("DELETE FROM edge WHERE id = ?", (edge,))
        self.sql.run(
            "DELETE FROM embedding WHERE version IN (SELECT version FROM memory WHERE id = ?)",
            (item,),
        )
        self.sql.run("DELETE FROM memory WHERE id = ?", (item,))
        self.sql.run("DELETE FROM source WHERE memory = ? OR origin = ?", (item, item))
        self._scrub(item)
        self.done.purged.append(item)
        # Whoever keeps an index learns from the tombstone what to forget; it holds no text.
        return {"versions": versions, "places": places}

    def _scrub(self, item: str) -> None:
        self.sql.run(
            "UPDATE event SET before = NULL, after = NULL, why = '' WHERE space = ? AND item = ?",
            (self.space_id, item),
        )
