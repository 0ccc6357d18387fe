"""Export one space as JSON lines, and read it back, without loss: log and past versions included.

The first line says what the file is, the last one how much there should be. Vectors are left out:
the importing memory makes its own.

A space takes in a file whose log goes on where its own ends, or an empty one any file; of a file
whose log ends before its own it needs nothing. Two copies that have both gone on are two
histories: they are never mixed, the file is refused.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.errors import UsageError, unknown
from holdfast.longterm.records import Space, document, moment, text_hash
from holdfast.longterm.retrieval.terms import stems
from holdfast.longterm.store import foreign, importers
from holdfast.longterm.store.apply import Applier
from holdfast.longterm.store.rows import dumps, key_hash, space_row
from holdfast.longterm.store.sqlite import Transaction

if TYPE_CHECKING:
    from holdfast.longterm.memory import Memory

VERSION = 2
_MEMORY = (
    "id", "kind", "text", "speaker", "session", "position", "data", "metadata", "valid_from",
    "valid_to", "recorded_at", "retired_at", "strength", "uses", "used_at", "searchable",
    "key_hash",
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
            if kind == "memory":
                line["key_hash"] = line["key_hash"].hex()
            if line.get("op") == "purge":
                line["after"] = None  # the numbers of versions are this store's own
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
    """Read an export into a space, whole or not at all; what is there already is left alone.

    Raises:
        UsageError: an unknown format, a file that is not in it, is cut short or was changed, or
            one that neither goes on from what is there nor is a part of it.
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
    counts = dict.fromkeys(_TABLES, 0)
    told = [row for row in rows if row["type"] == "event"]
    known = _common(applier, told, space)
    if known == len(told):
        return counts
    sql, space_id = applier.sql, applier.space_id
    # Of each memory the versions that are here are the first of those in the file.
    here: dict[str, list[tuple]] = {}
    for item, *version in sql.rows(
        "SELECT id, version, retired_at FROM memory WHERE space = ? "
        "ORDER BY recorded_at DESC, version DESC",
        (space_id,),
    ):
        here.setdefault(item, []).append(tuple(version))
    for row in rows:
        kind = row["type"]
        values = {
            name: dumps(value) if name in _JSON and value is not None else value
            for name, value in row.items()
            if name != "type"
        }
        if kind == "memory":
            if same := here.get(row["id"]):
                _update(applier, values, *same.pop())
            else:
                _version(applier, values)
                counts[kind] += 1
        elif kind == "event" and row["seq"] > known:
            if row["op"] == "purge":
                gone = row["item"] in here
                values["after"] = dumps(applier.wipe(row["item"]) if gone else _NOTHING)
            _put(sql, kind, {**values, "space": space_id})
            counts[kind] += 1
        elif kind == "edge":
            counts[kind] += _put(sql, kind, {**values, "space": space_id})
            if values["retired_at"] is not None:
                sql.run(
                    "UPDATE edge SET retired_at = ? WHERE id = ? AND retired_at IS NULL",
                    (values["retired_at"], values["id"]),
                )
        elif kind == "source" and not sql.rows(
            "SELECT 1 FROM source WHERE memory = ? AND origin = ? "
            "AND coalesce(start_byte, -1) = coalesce(?, -1) "
            "AND coalesce(end_byte, -1) = coalesce(?, -1)",
            [values[name] for name in _SOURCE],
        ):
            counts[kind] += _put(sql, kind, values)
    applier.seq = len(told)
    return counts


_NOTHING: dict[str, list] = {"versions": [], "places": []}


def _common(applier: Applier, told: list[dict[str, Any]], space: Space) -> int:
    """How many events a space and a file share, which is all that one of them has.

    Raises:
        UsageError: both have others besides.
    """
    names = ("time", "op", "item", "before", "after")
    here = [
        dict(zip(names, row, strict=True))
        for row in applier.sql.rows(
            f"SELECT {', '.join(names)} FROM event WHERE space = ? ORDER BY seq",
            (applier.space_id,),
        )
    ]
    for number, (own, other) in enumerate(zip(here, told, strict=False), 1):
        if not _same(own, other):
            own_at, other_at = (
                f"{e['op']} of {e['item']} at {moment(e['time'])}" for e in (own, other)
            )
            raise UsageError(
                f"space {str(space)!r} and the file have gone different ways: of {len(here)} and "
                f"{len(told)} changes the first {number - 1} are the same, then here came the "
                f"{own_at}, in the file the {other_at}. Import it into a space of its own, e.g. "
                'space="copy" (--user copy); nothing was changed'
            )
    return min(len(here), len(told))


def _same(own: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two entries are of one change; of what was purged since there is no text any more."""
    if any(own[name] != other[name] for name in ("time", "op", "item")):
        return False
    return own["op"] == "purge" or all(
        own[name] is None or other[name] is None or own[name] == dumps(other[name])
        for name in ("before", "after")
    )


def _update(
    applier: Applier, values: Mapping[str, Any], version: int, retired_at: int | None
) -> None:
    """Bring a version of a memory that is here up to date."""
    applier.sql.run(
        "UPDATE memory SET retired_at = ?, uses = ?, used_at = ?, strength = ?, data = ?, "
        "shelf = ? WHERE version = ?",
        (
            values["retired_at"], values["uses"], values["used_at"], values["strength"],
            values["data"], json.loads(values["data"]).get("shelf"), version,
        ),
    )  # fmt: skip
    if retired_at is None and values["retired_at"] is not None:
        _moved(applier, values)


def _version(applier: Applier, values: dict[str, Any]) -> None:
    """Insert a version of a memory."""
    key = "\x1f".join((values["speaker"] or "", values["session"] or "", ""))
    given = values.get("key_hash")  # which the first version of the format left out
    values = {
        **values,
        "space": applier.space_id,
        "text_hash": text_hash(values["text"]),
        "key_hash": bytes.fromhex(given)
        if given
        else key_hash(values["kind"], values["text"], key),
        "shelf": json.loads(values["data"]).get("shelf"),
    }
    if values["searchable"]:
        values["terms"] = " ".join(stems(document(values["speaker"], values["text"])))
    names = ", ".join(values)
    rows = applier.sql.rows(
        f"INSERT INTO memory ({names}) VALUES ({', '.join('?' * len(values))}) RETURNING version",
        list(values.values()),
    )
    if values["searchable"]:
        applier.done.versions.append(rows[0][0])
    if values["retired_at"] is None:
        _moved(applier, values)


def _moved(applier: Applier, values: Mapping[str, Any]) -> None:
    """Note that the turns beside a memory read differently now."""
    if values["searchable"] and values["session"] is not None:
        applier.done.moved.append((values["kind"], values["session"], values["position"]))


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
