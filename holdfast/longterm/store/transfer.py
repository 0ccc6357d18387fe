"""Export one space as JSON lines, and read it back, without loss: log and past versions included.

The first line says what the file is, the last one how much there should be. Vectors are left out:
the importing memory makes its own.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.errors import UsageError, unknown
from holdfast.longterm.records import Purge, Space, document, text_hash
from holdfast.longterm.retrieval.terms import stems
from holdfast.longterm.store import foreign, importers
from holdfast.longterm.store.apply import Applier, dumps, key_hash, space_row
from holdfast.longterm.store.sqlite import Transaction

if TYPE_CHECKING:
    from holdfast.longterm.memory import Memory

VERSION = 1
_MEMORY = (
    "id", "kind", "text", "speaker", "session", "position", "data", "metadata", "valid_from",
    "valid_to", "recorded_at", "retired_at", "strength", "uses", "used_at", "searchable",
)  # fmt: skip
_EDGE = (
    "id", "src", "rel", "dst", "data", "valid_from", "valid_to", "recorded_at", "retired_at",
)  # fmt: skip
_EVENT = ("seq", "time", "actor", "op", "item", "before", "after", "why")
_SOURCE = ("memory", "origin", "start_byte", "end_byte")
_JSON = ("data", "metadata", "before", "after")
_ID = re.compile(r'"([me][0-9a-f]{20})"')


def export(transaction: Transaction, space: Space, file: Path) -> dict[str, Any]:
    """Write a space to a file, whole or not at all; returns counts and the digest of its content.

    Equal inputs, clocks and policies give equal digests.
    """
    digest, counts = hashlib.blake2b(digest_size=16), dict.fromkeys(_TABLES, 0)
    partial = file.with_name(f".{file.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as out:
            header = {"type": "holdfast-memory", "version": VERSION, "space": str(space)}
            out.write(dumps(header) + "\n")
            for line in _lines(transaction, space):
                counts[line["type"]] += 1
                text = dumps(line)
                digest.update(text.encode() + b"\n")
                out.write(text + "\n")
            end = {"type": "end", **counts, "digest": digest.hexdigest()}
            out.write(dumps(end) + "\n")
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, file)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()
        raise
    return {**counts, "digest": digest.hexdigest()}


def _lines(transaction: Transaction, space: Space) -> Iterator[dict[str, Any]]:
    space_id, _ = space_row(transaction, space, create=False)
    for kind, sql in _TABLES.items():
        names, query = sql
        for row in transaction.rows(query, (space_id,)):
            line: dict[str, Any] = {"type": kind}
            for name, value in zip(names, row, strict=True):
                line[name] = json.loads(value) if name in _JSON and value is not None else value
            yield line


_TABLES = {
    "memory": (
        _MEMORY,
        f"SELECT {', '.join(_MEMORY)} FROM memory WHERE space = ? "
        "ORDER BY recorded_at, position, version",
    ),
    "source": (
        _SOURCE,
        "SELECT s.memory, s.origin, s.start_byte, s.end_byte FROM source s WHERE s.memory IN "
        "(SELECT id FROM memory WHERE space = ?) "
        "ORDER BY s.memory, s.origin, s.start_byte NULLS FIRST, s.end_byte NULLS FIRST",
    ),
    "edge": (
        _EDGE,
        f"SELECT {', '.join(_EDGE)} FROM edge WHERE space = ? ORDER BY recorded_at, id",
    ),
    "event": (_EVENT, f"SELECT {', '.join(_EVENT)} FROM event WHERE space = ? ORDER BY seq"),
}


def import_(memory: "Memory", file: Path, format: str, space: Space) -> dict[str, int]:
    """Read an export into a space; what is there already is left alone.

    Raises:
        UsageError: an unknown format, or a file that is not in it, is cut short or was changed.
    """
    if format == "holdfast":
        lines = _read(file)
        return memory._transact(lambda _, applier: _insert(applier, lines, space), space)
    if format not in importers.FORMATS:
        raise unknown("import format", format, ["holdfast", *importers.FORMATS])
    changes = importers.FORMATS[format](file)
    before = memory.stats()["memories"]
    memory._transact(
        lambda _, applier: applier.apply(foreign.unseen(applier.sql, applier.space_id, changes)),
        space,
    )
    return {"read": len(changes), "memory": memory.stats()["memories"] - before}


def _read(file: Path) -> list[dict[str, Any]]:
    digest, lines = hashlib.blake2b(digest_size=16), []
    try:
        with file.open(encoding="utf-8") as text:
            for number, row in enumerate(text):
                line = json.loads(row)
                lines.append(line)
                if number and line["type"] != "end":
                    digest.update(row.encode())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file} is not an export of a memory: {error}") from None
    if not lines or lines[0].get("type") != "holdfast-memory":
        raise UsageError(
            f"{file} is not an export of a memory; for other libraries' files name --format "
            f"({', '.join(importers.FORMATS)})"
        )
    if lines[0]["version"] > VERSION:
        raise UsageError(
            f"{file} has export version {lines[0]['version']}, this Holdfast reads up to "
            f"{VERSION}; upgrade holdfast"
        )
    end = lines[-1]
    if end["type"] != "end" or end["digest"] != digest.hexdigest():
        raise UsageError(f"{file} is cut short or was changed; export it again")
    return lines


def _insert(applier: Applier, lines: list[dict[str, Any]], space: Space) -> dict[str, int]:
    rows = lines[1:-1]
    if lines[0]["space"] != str(space):
        rows = [_renamed(row, space) for row in rows]
    sql, space_id = applier.sql, applier.space_id
    counts = dict.fromkeys(_TABLES, 0)
    erased = {
        item
        for (item,) in sql.rows(
            "SELECT item FROM event WHERE space = ? AND op = 'purge'", (space_id,)
        )
    }
    known = {
        (item, op, time, after or "")
        for item, op, time, after in sql.rows(
            "SELECT item, op, time, after FROM event WHERE space = ?", (space_id,)
        )
    }
    told = {
        (row["item"], row["op"], row["time"], dumps(row["after"]) if row["after"] else "")
        for row in rows
        if row["type"] == "event"
    }
    # A copy that only lags behind keeps the order of what it copies; else what comes in is newer.
    shift = 0 if known <= told else applier.seq
    for row in rows:
        kind = row["type"]
        # An old export must not bring back what was erased here.
        if erased & {row.get(name) for name in ("id", "item", "memory", "origin", "src", "dst")}:
            continue
        values = {
            name: dumps(value) if name in _JSON and value is not None else value
            for name, value in row.items()
            if name != "type"
        }
        if kind == "memory":
            counts[kind] += _version(applier, values, shift)
        elif kind == "event":
            if row["op"] == "purge" and applier.is_known(row["item"]):
                applier.apply([Purge(row["item"], row["why"])])  # erased there, and so here
                counts[kind] += 1
                continue
            if (values["item"], values["op"], values["time"], values["after"] or "") in known:
                continue
            applier.seq += 1
            values["seq"] = applier.seq
            _put(sql, "event", {**values, "space": space_id})
            counts[kind] += 1
        elif kind == "edge":
            counts[kind] += _put(sql, kind, {**values, "space": space_id})
            if values["retired_at"] is not None:
                sql.run(
                    "UPDATE edge SET retired_at = ? WHERE id = ? AND retired_at IS NULL",
                    (values["retired_at"], values["id"]),
                )
        elif not sql.rows(
            "SELECT 1 FROM source WHERE memory = ? AND origin = ? "
            "AND coalesce(start_byte, -1) = coalesce(?, -1)",
            (values["memory"], values["origin"], values["start_byte"]),
        ):
            counts[kind] += _put(sql, kind, values)
    return counts


def _version(applier: Applier, values: dict[str, Any], shift: int) -> int:
    """Insert one version of a memory, unless it is there; 1 if it was inserted."""
    sql = applier.sql
    same = sql.rows(
        "SELECT version, uses, retired_at FROM memory "
        "WHERE id = ? AND recorded_at = ? AND text_hash = ?",
        (values["id"], values["recorded_at"], text_hash(values["text"])),
    )
    if same:
        version, uses, retired = same[0]
        if retired is None and values["retired_at"] is not None:
            sql.run(
                "UPDATE memory SET retired_at = ? WHERE version = ?",
                (values["retired_at"], version),
            )
        if values["uses"] > uses:
            sql.run(
                "UPDATE memory SET uses = ?, used_at = ?, strength = ?, data = ? WHERE version = ?",
                (values["uses"], values["used_at"], values["strength"], values["data"], version),
            )
        return 0
    current = sql.rows(
        "SELECT version, recorded_at FROM memory WHERE id = ? AND retired_at IS NULL",
        (values["id"],),
    )
    if current and values["retired_at"] is None:
        # Two copies went different ways: the later belief is the current one, both are kept.
        version, recorded = current[0]
        if recorded > values["recorded_at"]:
            values["retired_at"] = recorded
        else:
            sql.run(
                "UPDATE memory SET retired_at = ? WHERE version = ?",
                (values["recorded_at"], version),
            )
    key = "\x1f".join((values["speaker"] or "", values["session"] or "", ""))
    places = sql.rows("SELECT position FROM memory WHERE id = ? LIMIT 1", (values["id"],))
    values = {
        **values,
        "space": applier.space_id,
        "position": places[0][0] if places else values["position"] + shift,
        "text_hash": text_hash(values["text"]),
        "key_hash": key_hash(values["kind"], values["text"], key),
    }
    if values["searchable"]:
        values["terms"] = " ".join(stems(document(values["speaker"], values["text"])))
    names = ", ".join(values)
    rows = sql.rows(
        f"INSERT INTO memory ({names}) VALUES ({', '.join('?' * len(values))}) RETURNING version",
        list(values.values()),
    )
    if values["searchable"]:
        applier.done.versions.append(rows[0][0])
        if values["session"] is not None and values["retired_at"] is None:
            applier.done.moved.append((values["kind"], values["session"], values["position"]))
    return 1


def _put(sql: Transaction, table: str, values: dict[str, Any]) -> int:
    return sql.run(
        f"INSERT INTO {table} ({', '.join(values)}) VALUES ({', '.join('?' * len(values))}) "
        "ON CONFLICT DO NOTHING",
        list(values.values()),
    )


def _renamed(row: dict[str, Any], space: Space) -> dict[str, Any]:
    """A row with ids of the new space: ids are unique over all spaces of a store."""

    def rename(match: re.Match[str]) -> str:
        old = match[1]
        new = hashlib.blake2b(f"{space}\x1f{old}".encode(), digest_size=10).hexdigest()
        return f'"{old[0]}{new}"'

    return json.loads(_ID.sub(rename, json.dumps(row)))
