"""Records of other libraries' files, with errors that say where; and what of them is new here."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from holdfast.errors import UsageError
from holdfast.longterm.records import Add, Change, Link, Revise, Source
from holdfast.longterm.store.rows import key_hash
from holdfast.longterm.store.sqlite import Transaction

_VECTORS = ("embedding", "embedding_config", "name_embedding", "fact_embedding")
FIRST = datetime(1, 1, 1, tzinfo=UTC)


class Record:
    """One object of a file; complains by its place there."""

    def __init__(self, where: Path | str, what: str, fields: Any):
        self.where = f"{where}: {what}"
        if not isinstance(fields, Mapping):
            raise UsageError(f"{self.where} is {_short(fields)}, expected an object")
        self.fields = dict(fields)

    def text(self, name: str) -> str:
        value = self.fields.get(name)
        if not isinstance(value, str) or not value.strip():
            raise UsageError(
                f"{self.where} has {name}={_short(value)}, expected a text; is this file of "
                "another format, or cut short?"
            )
        return value

    def time(self, *names: str) -> datetime | None:
        """The first of some times that is there."""
        for name in names:
            value = self.fields.get(name)
            if value is None:
                continue
            try:
                time = datetime.fromisoformat(value)
            except (TypeError, ValueError):
                raise UsageError(
                    f"{self.where} has {name}={_short(value)}, expected a time such as "
                    "2024-05-08T13:56:00+00:00"
                ) from None
            return time if time.tzinfo else time.replace(tzinfo=UTC)
        return None

    def many(self, name: str, what: str) -> Iterator["Record"]:
        """The objects of a list that may be missing."""
        value = self.fields.get(name)
        if value is not None and not isinstance(value, list):
            raise UsageError(f"{self.where} has {name}={_short(value)}, expected a list")
        for index, one in enumerate(value or ()):
            yield Record(self.where, f"{what} {index}", one)

    def kept(self, library: str, *used: str) -> dict[str, Any]:
        """Metadata: the record's own, and under the library's name all that was not used."""
        own = self.fields.get("metadata") or self.fields.get("metadata_") or {}
        if not isinstance(own, Mapping):
            raise UsageError(f"{self.where} has metadata={_short(own)}, expected an object")
        left_out = {*used, *_VECTORS, "metadata", "metadata_"}
        rest = {
            name: value
            for name, value in self.fields.items()
            if name not in left_out and value not in (None, "", [], {})
        }
        return {**own, library: rest}


def unseen(sql: Transaction, space_id: int, changes: Sequence[Change]) -> list[Change]:
    """Changes without those of memories that were imported before, whatever became of these."""
    known: dict[int, str] = {}
    moved: dict[int, Add] = {}
    rest: list[Change] = []

    def now(end: str | Add) -> str | Add:
        return end if isinstance(end, str) else known.get(id(end)) or moved.get(id(end), end)

    for change in changes:
        match change:
            case Add():
                rows = sql.rows(
                    "SELECT id FROM memory WHERE space = ? AND key_hash = ? "
                    "ORDER BY version DESC LIMIT 1",
                    (space_id, key_hash(change.kind, change.text, change.key)),
                )
                if rows:
                    known[id(change)] = rows[0][0]
                    continue
                sources = [_source(s if isinstance(s, Source) else now(s)) for s in change.sources]
                moved[id(change)] = replace(change, sources=sources)
                rest.append(moved[id(change)])
            case Revise():
                made = now(change.id)
                if isinstance(made, Add):
                    rest.append(replace(change, id=made))
            case Link():
                ends = now(change.src), now(change.dst)
                there = [end for end in ends if isinstance(end, str)]
                if len(there) < 2 and all(_current(sql, space_id, end) for end in there):
                    rest.append(replace(change, src=ends[0], dst=ends[1]))
            case _:
                raise TypeError(f"{change!r} is not for an import")
    return rest


def _source(made: Source | str | Add) -> Source | Add:
    return Source(made) if isinstance(made, str) else made


def _current(sql: Transaction, space_id: int, item: str) -> bool:
    return bool(
        sql.rows(
            "SELECT 1 FROM memory WHERE space = ? AND id = ? AND retired_at IS NULL",
            (space_id, item),
        )
    )


def load(file: Path) -> Any:
    """The JSON of a file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        json.dumps(found, ensure_ascii=False, allow_nan=False).encode()  # NaN, half a character
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{file} cannot be read as JSON: {error}") from None
    return found


def unlike(file: Path, what: str, wanted: str, given: Any) -> UsageError:
    found = ", ".join(map(str, given)) if isinstance(given, Mapping) else _short(given)
    return UsageError(f"{file} is not {what}: expected {wanted}, found {found or 'nothing'}")


def one_owner(file: Path, names: Iterable[Any], what: str) -> None:
    """Refuse a file that would mix memories of several users in one space."""
    found = sorted({str(name) for name in names if name})
    if len(found) > 1:
        raise UsageError(
            f"{file} holds memories of {len(found)} {what} ({', '.join(found[:3])}, ...), which "
            "one space would mix up; export and import each by itself"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
