"""One durable file (SQLite) under a memory: transactions, readers, migrations, backup.

Every SQL statement of the room goes through a `Transaction`. Writers take turns: a transaction
starts with BEGIN IMMEDIATE, and waits with growing pauses where another process is faster.
"""

import contextlib
import os
import random
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from holdfast.errors import HoldfastError, UsageError, unknown
from holdfast.longterm.store.schema import MIGRATIONS

DURABILITY = {"full": "FULL", "process": "NORMAL"}
PATIENCE = 120.0
_APPLICATION = 0x486F6C64  # "Hold", as PRAGMA application_id
_TYPES = {"serial": "INTEGER PRIMARY KEY AUTOINCREMENT", "blob": "BLOB", "big": "INTEGER"}


class Transaction(Protocol):
    """What a store runs SQL in; placeholders are `?` with every engine."""

    def rows(self, sql: str, args: Sequence[Any] = ()) -> list[tuple]: ...

    def run(self, sql: str, args: Sequence[Any] = ()) -> int:
        """Returns the number of changed rows."""
        ...

    def many(self, sql: str, args: Iterable[Sequence[Any]]) -> None: ...


class Store(Protocol):
    """An engine that keeps a memory's tables."""

    url: str

    @property
    def volatile(self) -> bool:
        """Whether readers and the writer share one connection."""
        ...

    def read(self) -> contextlib.AbstractContextManager[Transaction]: ...

    def write(self) -> contextlib.AbstractContextManager[Transaction]: ...

    def shred(self) -> None:
        """Leave no trace of what was purged."""
        ...

    def backup(self, target: str | os.PathLike[str]) -> None: ...

    def damage(self) -> list[str]: ...

    def nbytes(self) -> int: ...

    def close(self) -> None: ...


class _Sql:
    def __init__(self, connection: sqlite3.Connection):
        self._connection = connection

    def rows(self, sql: str, args: Sequence[Any] = ()) -> list[tuple]:
        return self._connection.execute(sql, args).fetchall()

    def run(self, sql: str, args: Sequence[Any] = ()) -> int:
        return self._connection.execute(sql, args).rowcount

    def many(self, sql: str, args: Iterable[Sequence[Any]]) -> None:
        self._connection.executemany(sql, args)


class Connection(sqlite3.Connection):
    """Can be referred to weakly: a reader ends with its thread, or a server would gather them."""


class SqliteStore:
    """A memory in one SQLite file (plus `-wal` and `-shm` while it is open).

    Args:
        path: the file; it is created. ":memory:" keeps everything in RAM.
        durability: "full" survives power loss (each commit is synced), "process" survives the
            death of the process.

    Raises:
        UsageError: an unknown durability, a file that is not a memory, or one that a newer
            Holdfast wrote.
    """

    def __init__(self, path: str | os.PathLike[str], durability: str = "full"):
        if durability not in DURABILITY:
            raise unknown("durability", durability, DURABILITY)
        self.path = str(path)
        self.url = f"sqlite:///{self.path}"
        self.durability = durability
        self._lock = threading.RLock()
        self._local = threading.local()
        self._all: weakref.WeakSet[Connection] = weakref.WeakSet()
        self._closed = False
        if not self.volatile and not Path(self.path).parent.is_dir():
            raise UsageError(
                f"cannot create {self.path}: {Path(self.path).parent} is no directory; make it"
            )
        self._writer = self._connect()
        try:
            self._migrate()
        except BaseException:
            self.close()
            raise

    @property
    def volatile(self) -> bool:
        return self.path == ":memory:"

    def _connect(self) -> sqlite3.Connection:
        if self._closed:
            raise UsageError(f"memory {self.path} is closed; open it again")
        try:
            connection = sqlite3.connect(
                self.path, timeout=5.0, isolation_level=None, check_same_thread=False,
                factory=Connection,
            )  # fmt: skip
        except sqlite3.OperationalError as error:
            raise HoldfastError(f"cannot open {self.path}: {error}") from error
        self._all.add(connection)
        try:
            patiently(lambda: self._identify(connection), self.path)
            patiently(lambda: self._configure(connection), self.path)
        except sqlite3.DatabaseError as error:
            raise UsageError(
                f"{self.path} is not a memory of Holdfast ({error}); name another file"
            ) from error
        return connection

    def _identify(self, connection: sqlite3.Connection) -> None:
        """Refuse what is not ours, before anything is changed."""
        # In this order: another process may make tables and id, together, between the two.
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        if application != _APPLICATION and tables:
            raise UsageError(
                f"{self.path} is a SQLite file of another program; name another file for the memory"
            )
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > len(MIGRATIONS):
            raise UsageError(
                f"{self.path} has schema {version}, this Holdfast knows up to {len(MIGRATIONS)}: a "
                "newer version wrote it; upgrade holdfast, the file is untouched"
            )

    def _configure(self, connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA busy_timeout = 5000")
        connection.execute("PRAGMA foreign_keys = ON")
        # What is purged must not stay in free pages.
        connection.execute("PRAGMA secure_delete = ON")
        if not self.volatile:
            connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(f"PRAGMA synchronous = {DURABILITY[self.durability]}")

    def _migrate(self) -> None:
        if 0 < self._version() < len(MIGRATIONS):
            self.backup(f"{self.path}.schema{self._version()}.backup")
        if self._version() < len(MIGRATIONS):
            with self.write() as transaction:
                # Another process may have done it while this one waited for its turn.
                for number in range(self._version(), len(MIGRATIONS)):
                    for statement in MIGRATIONS[number].format(**_TYPES).split(";"):
                        if statement.strip():
                            transaction.run(statement)
                    transaction.run(f"PRAGMA user_version = {number + 1}")
                transaction.run(f"PRAGMA application_id = {_APPLICATION}")

    def _version(self) -> int:
        return self._writer.execute("PRAGMA user_version").fetchone()[0]

    @contextlib.contextmanager
    def read(self) -> Iterator[Transaction]:
        """One consistent snapshot, whatever others write meanwhile."""
        if self.volatile:
            with self._lock:
                yield _Sql(self._writer)
            return
        connection = getattr(self._local, "reader", None)
        if connection is None or self._closed:
            connection = self._local.reader = self._connect()
            connection.execute("PRAGMA query_only = ON")
        if connection.in_transaction:  # a read within a read sees the same snapshot
            yield _Sql(connection)
            return
        connection.execute("BEGIN")
        try:
            yield _Sql(connection)
        finally:
            connection.execute("ROLLBACK")

    @contextlib.contextmanager
    def write(self) -> Iterator[Transaction]:
        """A transaction that is on disk when the block ends, or has not happened if it raises."""
        with self._lock:
            if self._closed:
                raise UsageError(f"memory {self.path} is closed; open it again")
            patiently(lambda: self._writer.execute("BEGIN IMMEDIATE"), self.path)
            try:
                yield _Sql(self._writer)
                patiently(lambda: self._writer.execute("COMMIT"), self.path)
            except BaseException:
                # A failed commit may have rolled back by itself.
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise

    def backup(self, target: str | os.PathLike[str]) -> None:
        """Copy the whole memory, as of now, into a new file, while others go on writing."""
        target = Path(target)
        partial = target.with_name(f".{target.name}.partial")
        partial.unlink(missing_ok=True)
        try:
            copy = sqlite3.connect(partial)
            with contextlib.closing(copy), self._lock:
                self._writer.backup(copy)
            descriptor = os.open(partial, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
            os.replace(partial, target)
        except (OSError, sqlite3.Error) as error:
            partial.unlink(missing_ok=True)
            raise HoldfastError(f"cannot write the backup {target}: {error}") from error

    def shred(self) -> None:
        """Empty the write-ahead log, so that pages from before a purge are nowhere any more."""
        if not self.volatile:
            with self._lock:
                patiently(self._truncate_log, self.path)

    def _truncate_log(self) -> None:
        (busy, *_) = self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            raise sqlite3.OperationalError("database is locked by a reader")

    def damage(self) -> list[str]:
        """What SQLite's own integrity and foreign key checks find wrong."""
        with self.read() as transaction:
            found = [row[0] for row in transaction.rows("PRAGMA integrity_check")]
            broken = transaction.rows("PRAGMA foreign_key_check")
        return [text for text in found if text != "ok"] + [
            f"row {row[1]} of {row[0]} refers to a missing row of {row[2]}" for row in broken
        ]

    def nbytes(self) -> int:
        """Bytes of the file and its log."""
        if self.volatile:
            with self.read() as t:
                return t.rows("PRAGMA page_count")[0][0] * t.rows("PRAGMA page_size")[0][0]
        files = (Path(self.path + suffix) for suffix in ("", "-wal"))
        return sum(file.stat().st_size for file in files if file.exists())

    def close(self) -> None:
        with self._lock:
            self._closed = True
            while self._all:
                self._all.pop().close()


def patiently(action: Any, path: str) -> Any:
    """Run an action of SQLite, again and again while another connection holds the lock.

    Raises:
        HoldfastError: the lock was not free within `PATIENCE` seconds.
    """
    end = time.monotonic() + PATIENCE
    pause = 0.001
    while True:
        try:
            return action()
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) and "busy" not in str(error):
                raise
            if time.monotonic() > end:
                raise HoldfastError(
                    f"{path} was locked for {PATIENCE:g} seconds by another process; "
                    "find out which one holds a transaction open, and try again"
                ) from error
        time.sleep(pause * random.random())
        pause = min(2 * pause, 0.1)


def open_store(url: str | os.PathLike[str], durability: str = "full") -> Store:
    """A store from a path, `sqlite:///path` or `postgresql://user@host/database`.

    Raises:
        UsageError: a scheme that is neither of these.
    """
    text = os.fspath(url)
    if text.startswith(("postgresql://", "postgres://")):
        from holdfast.longterm.store.postgres import PostgresStore

        return PostgresStore(text, durability)
    if text.startswith("sqlite:///"):
        text = text.removeprefix("sqlite:///")
    elif "://" in text:
        raise UsageError(
            f"memory {text!r}: {text.split('://')[0]} is not known; pass a path, sqlite:///path or "
            "postgresql://user@host/database"
        )
    return SqliteStore(text, durability)
