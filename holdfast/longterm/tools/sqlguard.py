"""One SQL statement that somebody else wrote, run within limits.

SQLite's own parser and authorizer decide what a statement does; its text is never looked at. What
is not on the list is refused: no other file, no pragma, no change of the schema, no transaction, no
table but the given ones, no function that is not listed. Two statements in one text are refused.
"""

import sqlite3
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from holdfast.errors import HoldfastError
from holdfast.longterm.language.slots import listed

READ, INSERT, UPDATE, DELETE = "read", "insert", "update", "delete"
_TABLES = {
    sqlite3.SQLITE_READ: READ,
    sqlite3.SQLITE_INSERT: INSERT,
    sqlite3.SQLITE_UPDATE: UPDATE,
    sqlite3.SQLITE_DELETE: DELETE,
}
_FUNCTIONS = frozenset(
    listed(
        """abs avg coalesce count date datetime format glob group_concat ifnull iif instr julianday
    length like lower ltrim max min nullif printf replace round row_number rank rtrim sign strftime
    substr substring sum time total trim typeof unicode upper"""
    )
)
# What SQLite calls the rest; the numbers of actions and of errors overlap.
_NAMES = {
    getattr(sqlite3, f"SQLITE_{name}"): name.replace("_", " ")
    for name in (
        "ALTER_TABLE", "ANALYZE", "ATTACH", "CREATE_INDEX", "CREATE_TABLE", "CREATE_TEMP_INDEX",
        "CREATE_TEMP_TABLE", "CREATE_TEMP_TRIGGER", "CREATE_TEMP_VIEW", "CREATE_TRIGGER",
        "CREATE_VIEW", "CREATE_VTABLE", "DETACH", "DROP_INDEX", "DROP_TABLE", "DROP_TEMP_INDEX",
        "DROP_TEMP_TABLE", "DROP_TEMP_TRIGGER", "DROP_TEMP_VIEW", "DROP_TRIGGER", "DROP_VIEW",
        "DROP_VTABLE", "FUNCTION", "PRAGMA", "RECURSIVE", "REINDEX", "SAVEPOINT", "TRANSACTION",
    )
}  # fmt: skip
_LONGEST = 1 << 20  # bytes of a text, a row or a statement
_EVERY = 1000  # steps of SQLite's machine between two looks at the clock


class Refused(HoldfastError):
    """A statement was not carried out: what SQLite, or a limit, has against it."""


@dataclass(frozen=True)
class Rows:
    """What a statement returned, and how many rows it changed."""

    columns: tuple[str, ...]
    rows: tuple[tuple, ...]
    changed: int = 0


class Guard:
    """Runs statements on a connection whose other statements are its owner's own.

    Args:
        tables: that statements may name.
        writes: what they may do besides reading: "insert", "update", "delete".
        own: triggers of the owner; what they do is not the statement's doing.
        rows: a statement may return.
        scanned: rows of a table that a statement may read from end to end.
        seconds: a statement may take.
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        tables: Collection[str],
        *,
        writes: Collection[str],
        own: Collection[str] = (),
        rows: int,
        scanned: int,
        seconds: float,
    ):
        self._connection, self._tables, self._own = connection, frozenset(tables), frozenset(own)
        self._writes = frozenset(writes)
        self._rows, self._scanned, self._seconds = rows, scanned, seconds
        self._denied: str | None = None
        self._done: set[str] = set()
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST)
        connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        connection.execute("PRAGMA trusted_schema = OFF")

    def run(self, sql: str, args: Mapping[str, Any]) -> Rows:
        """Run one statement.

        Raises:
            Refused: it is not one statement, not allowed, beyond a limit, or it fails.
        """
        self._within_reach(sql, args)
        before = self._connection.total_changes
        with self._watched():
            cursor = self._connection.execute(sql, args)
            rows = cursor.fetchmany(self._rows + 1)
            cursor.close()
        if len(rows) > self._rows:
            raise Refused(f"more than {self._rows} rows; aggregate them, or add a LIMIT")
        columns = tuple(column[0] for column in cursor.description or ())
        changed = cursor.rowcount if self._connection.total_changes > before else 0
        return Rows(columns, tuple(rows), max(0, changed))

    def does(self, sql: str, args: Mapping[str, Any]) -> frozenset[str]:
        """What a statement would do: of "read", "insert", "update", "delete"; it is not run.

        Raises:
            Refused: as `run` would, as far as that is known without running it.
        """
        self._done.clear()
        self._program(sql, args)
        return frozenset(self._done)

    def _program(self, sql: str, args: Mapping[str, Any]) -> list[tuple]:
        with self._watched():
            return self._connection.execute(f"EXPLAIN {sql}", args).fetchall()

    def _within_reach(self, sql: str, args: Mapping[str, Any]) -> None:
        """Refuse to read a large table from end to end, by the program that SQLite made."""
        program = self._program(sql, args)
        opened = {(p1, p2) for _, op, p1, p2, *_ in program if op in ("OpenRead", "OpenWrite")}
        begun = {p1 for _, op, p1, *_ in program if op in ("Rewind", "Last")}
        looped = {p1 for _, op, p1, *_ in program if op in ("Next", "Prev")}
        pages = {page for cursor, page in opened if cursor in begun & looped}
        for name, table, page in self._connection.execute(
            "SELECT name, tbl_name, rootpage FROM sqlite_master"
        ).fetchall():
            if page not in pages or table not in self._tables:
                continue
            count = self._connection.execute(
                f"SELECT count(*) FROM (SELECT 1 FROM {quoted(table)} LIMIT {self._scanned + 1})"
            ).fetchone()[0]
            if count > self._scanned:
                raise Refused(
                    f"it reads all of {name}, more than {self._scanned} rows; add a condition on "
                    "an indexed column"
                )

    @contextmanager
    def _watched(self) -> Iterator[None]:
        end = time.monotonic() + self._seconds
        self._denied = None
        self._connection.set_authorizer(self._authorize)
        self._connection.set_progress_handler(lambda: time.monotonic() > end, _EVERY)
        try:
            yield
        except (sqlite3.Error, sqlite3.Warning) as error:
            if self._denied:
                raise Refused(f"{self._denied} is not allowed") from error
            if time.monotonic() > end:
                raise Refused(f"it took more than {self._seconds:g} seconds") from error
            raise Refused(str(error)) from error
        finally:
            self._connection.set_progress_handler(None, 0)
            self._connection.set_authorizer(None)

    def _authorize(self, action, first, second, database, trigger) -> int:
        if trigger in self._own or action == sqlite3.SQLITE_SELECT:
            return sqlite3.SQLITE_OK
        if action in _TABLES:
            does = _TABLES[action]
            if (does == READ or does in self._writes) and first in self._tables:
                self._done.add(does)
                return sqlite3.SQLITE_OK
            schema = first.startswith("sqlite_") and first.endswith("master")
            self._denied = "access to the schema" if schema else f"{does} of {first}"
        elif action == sqlite3.SQLITE_FUNCTION:
            if second.lower() in _FUNCTIONS:
                return sqlite3.SQLITE_OK
            self._denied = f"function {second}"
        else:
            what = _NAMES.get(action, f"action {action}")
            self._denied = " ".join(str(part) for part in (what, first) if part)
        return sqlite3.SQLITE_DENY


def quoted(name: str) -> str:
    """A name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'
