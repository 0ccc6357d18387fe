"""A SQLite file whose changes are made in chains, each of which can be taken back.

Triggers keep, for each row that a chain changes, what it was before; undoing puts it back.
"""

import hashlib
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from holdfast.errors import UsageError
from holdfast.longterm.store.sqlite import patiently
from holdfast.longterm.tools.sqlguard import quoted

_EVENTS = ("insert", "update", "delete")
# What the file holds besides the user's tables; `_now` is the chain that is being carried out.
_OWN = (
    "CREATE TABLE _schema (number INTEGER PRIMARY KEY, sql TEXT NOT NULL)",
    "CREATE TABLE _chain (id INTEGER PRIMARY KEY, said TEXT NOT NULL, time TEXT NOT NULL)",
    "CREATE TABLE _log (chain INTEGER, step INTEGER, description TEXT, sql TEXT, "
    "PRIMARY KEY (chain, step))",
    "CREATE TABLE _now (chain INTEGER)",
    "INSERT INTO _now VALUES (NULL)",
)


class Undoable:
    """Tables of a schema, one connection that writes and one that can only read.

    Args:
        path: the SQLite file, or ":memory:"; it is created.
        schema: CREATE TABLE and CREATE INDEX statements, one each; of an existing file the same.

    Raises:
        UsageError: a schema that is none or not the file's, or a file that is no such database.
    """

    def __init__(self, path: str | Path, schema: Sequence[str]):
        if isinstance(schema, str) or not schema:
            raise UsageError("the schema is a list of CREATE statements; pass at least one")
        self.path, self.schema = str(path), tuple(schema)
        self.lock = threading.RLock()
        try:
            self.reader = self.writer = sqlite3.connect(
                self.path, isolation_level=None, check_same_thread=False
            )
        except sqlite3.Error as error:
            raise UsageError(f"{self.path} cannot be opened: {error}") from error
        try:
            self._open()
        except (sqlite3.Error, sqlite3.Warning) as error:
            self.close()
            raise UsageError(
                f"{self.path} cannot be opened with this schema: {error}; correct the schema, or "
                "name another file"
            ) from error
        except BaseException:
            self.close()
            raise
        self.triggers = tuple(f"_kept_{event}_{t}" for event in _EVENTS for t in self.tables)

    def _open(self) -> None:
        execute = self.writer.execute
        self._identify()
        if self.path != ":memory:":
            execute("PRAGMA journal_mode = WAL")
        for pragma in (
            "synchronous = FULL",
            "foreign_keys = ON",
            "recursive_triggers = ON",  # else INSERT OR REPLACE forgets what it replaces
            "busy_timeout = 5000",
        ):
            execute(f"PRAGMA {pragma}")
        with self.transaction():
            if not self._identify():
                self._create()
            self.tables = self._tables()
        if self.path != ":memory:":
            uri = f"{Path(self.path).absolute().as_uri()}?mode=ro"
            self.reader = sqlite3.connect(
                uri, uri=True, isolation_level=None, check_same_thread=False
            )

    def _identify(self) -> bool:
        """Whether the file holds this schema; refuses what is not ours before changing anything."""
        execute = self.writer.execute
        if not execute("SELECT 1 FROM sqlite_master").fetchone():
            return False
        if not execute("SELECT 1 FROM sqlite_master WHERE name = '_schema'").fetchone():
            raise UsageError(f"{self.path} is another program's database; name another file")
        held = tuple(s for (s,) in execute("SELECT sql FROM _schema ORDER BY number"))
        if held != self.schema:
            raise UsageError(
                f"{self.path} was made with another schema, {list(held)}; pass that one, or name "
                "another file"
            )
        return True

    def _create(self) -> None:
        execute = self.writer.execute
        for statement in self.schema:
            execute(statement)
        own = execute("SELECT name FROM sqlite_master WHERE name LIKE '!_%' ESCAPE '!'").fetchone()
        if own:
            raise UsageError(f"{own[0]} begins with _, as our own tables do; rename it")
        self.tables = self._tables()
        for statement in _OWN:
            execute(statement)
        rows = list(enumerate(self.schema))
        self.writer.executemany("INSERT INTO _schema VALUES (?, ?)", rows)
        for table in self.tables:
            for statement in _keeping(table, self._stored(table)):
                execute(statement)

    def _tables(self) -> dict[str, tuple[str, ...]]:
        """Columns by table."""
        found = self.writer.execute(
            "SELECT name, wr FROM pragma_table_list WHERE schema = 'main' AND type = 'table' "
            "AND name NOT LIKE 'sqlite!_%' ESCAPE '!' AND name NOT LIKE '!_%' ESCAPE '!' "
            "ORDER BY name"
        ).fetchall()
        for name, without_rowid in found:
            if without_rowid:
                raise UsageError(
                    f"table {name} is WITHOUT ROWID and could not be undone; omit that"
                )
        if not found:
            raise UsageError("the schema makes no table; pass CREATE TABLE statements")
        query = "SELECT name FROM pragma_table_info(?) ORDER BY cid"
        return {
            name: tuple(column for (column,) in self.writer.execute(query, (name,)))
            for name, _ in found
        }

    def _stored(self, table: str) -> tuple[str, ...]:
        """What makes up a row: its columns, and its rowid unless a column is that."""
        keys = self.writer.execute(
            "SELECT upper(type) FROM pragma_table_info(?) WHERE pk > 0", (table,)
        ).fetchall()
        columns = self.tables[table]
        return columns if keys == [("INTEGER",)] else ("rowid", *columns)

    @contextmanager
    def transaction(self, connection: sqlite3.Connection | None = None) -> Iterator[None]:
        """All or nothing; a snapshot of the reader's, or the writer's turn."""
        connection = connection or self.writer
        kind = "IMMEDIATE" if connection is self.writer else "DEFERRED"
        patiently(lambda: connection.execute(f"BEGIN {kind}"), self.path)
        try:
            yield
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    @contextmanager
    def chain(self, said: str, time: datetime) -> Iterator[list[tuple[str, str]]]:
        """A transaction that can be undone if (description, statement) of its steps are noted."""
        with self.transaction():
            execute = self.writer.execute
            (chain,) = execute("SELECT coalesce(max(id), 0) + 1 FROM _chain").fetchone()
            execute("UPDATE _now SET chain = ?", (chain,))
            log: list[tuple[str, str]] = []
            yield log
            execute("UPDATE _now SET chain = NULL")
            if log:
                row = (chain, said, time.isoformat())
                execute("INSERT INTO _chain (id, said, time) VALUES (?, ?, ?)", row)
                rows = [(chain, i, *step) for i, step in enumerate(log, 1)]
                self.writer.executemany("INSERT INTO _log VALUES (?, ?, ?, ?)", rows)

    def undo(self, n: int = 1) -> list[str]:
        """Take back the last `n` chains that changed something; returns what had been said.

        Raises:
            UsageError: `n` below 1, or there are not so many.
        """
        with self.lock, self.transaction():
            execute = self.writer.execute
            chains = execute("SELECT id, said FROM _chain ORDER BY id DESC LIMIT ?", (max(n, 0),))
            last = chains.fetchall()
            if n < 1 or len(last) < n:
                raise UsageError(f"cannot undo {n} chains; there are {len(last)} to undo")
            execute("PRAGMA defer_foreign_keys = ON")
            for chain, _ in last:
                for table in self.tables:
                    self._restore(chain, table)
                execute("DELETE FROM _log WHERE chain = ?", (chain,))
                execute("DELETE FROM _chain WHERE id = ?", (chain,))
        return [said for _, said in last]

    def _restore(self, chain: int, table: str) -> None:
        kept, name, stored = quoted(f"_kept_{table}"), quoted(table), self._stored(table)
        columns, marks = ", ".join(map(quoted, stored)), ", ".join("?" * len(stored))
        execute = self.writer.execute
        for _, _, before, after, *values in execute(
            f"SELECT * FROM {kept} WHERE chain = ? ORDER BY seq DESC", (chain,)
        ).fetchall():
            if before is None:
                execute(f"DELETE FROM {name} WHERE rowid = ?", (after,))
            elif after is None:
                execute(f"INSERT INTO {name} ({columns}) VALUES ({marks})", values)
            else:
                execute(
                    f"UPDATE {name} SET ({columns}) = ({marks}) WHERE rowid = ?", (*values, after)
                )
        execute(f"DELETE FROM {kept} WHERE chain = ?", (chain,))

    def log(self) -> list[tuple[int, str, str]]:
        """(chain, what was said, statement) of all that changed something, oldest first."""
        with self.lock:
            return self.reader.execute(
                "SELECT chain, said, sql FROM _log JOIN _chain ON id = chain ORDER BY chain, step"
            ).fetchall()

    def digest(self) -> str:
        """SHA-256 of all rows of the user's tables."""
        found = hashlib.sha256()
        with self.lock, self.transaction(self.reader):
            for table in self.tables:
                found.update(repr(table).encode())
                for row in self.reader.execute(
                    f"SELECT rowid, * FROM {quoted(table)} ORDER BY rowid"
                ):
                    found.update(repr(row).encode())
        return found.hexdigest()

    def nbytes(self) -> int:
        """Bytes of the file, without its write-ahead log."""
        with self.lock:
            ask = self.reader.execute
            return ask("PRAGMA page_count").fetchone()[0] * ask("PRAGMA page_size").fetchone()[0]

    def close(self) -> None:
        self.reader.close()
        self.writer.close()

    def __enter__(self) -> "Undoable":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _keeping(table: str, stored: Sequence[str]) -> Iterator[str]:
    """A table for rows as they were, and triggers that fill it while a chain is carried out."""
    kept = quoted(f"_kept_{table}")
    places = [f"c{i}" for i in range(len(stored))]
    yield (
        f"CREATE TABLE {kept} (seq INTEGER PRIMARY KEY, chain INTEGER, before INTEGER, "
        f"after INTEGER, {', '.join(places)})"
    )
    old = [f"old.{quoted(column)}" for column in stored]
    for event in _EVENTS:
        values = ["NULL" if event == "insert" else "old.rowid"]
        values += ["NULL" if event == "delete" else "new.rowid"]
        values += ["NULL"] * len(stored) if event == "insert" else old
        yield (
            f"CREATE TRIGGER {quoted(f'_kept_{event}_{table}')} AFTER {event} ON {quoted(table)} "
            f"WHEN (SELECT chain FROM _now) IS NOT NULL BEGIN INSERT INTO {kept} "
            f"(chain, before, after, {', '.join(places)}) "
            f"VALUES ((SELECT chain FROM _now), {', '.join(values)}); END"
        )
