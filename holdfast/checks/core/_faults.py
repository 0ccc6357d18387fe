"""SQLite connections whose current fails before or after their n-th statement."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from holdfast.longterm.store import sqlite


class PowerCut(Exception):
    """The statement at which it happened."""


class Failing(sqlite.Connection):
    """Runs `left` more statements, then fails for ever: before the next one, or `after` it."""

    left: int | None = None
    after = False

    def execute(self, sql: str, *args: Any) -> Any:
        return self._guarded(super().execute, sql, *args)

    def executemany(self, sql: str, *args: Any) -> Any:
        return self._guarded(super().executemany, sql, *args)

    def _guarded(self, run: Any, sql: str, *args: Any) -> Any:
        # A dead process rolls nothing back; SQLite itself does, when the file is opened again.
        if Failing.left is None or sql == "ROLLBACK":
            return run(sql, *args)
        Failing.left -= 1
        if Failing.left < 0 and not Failing.after:
            raise PowerCut(sql)
        done = run(sql, *args)
        if Failing.left < 0:
            raise PowerCut(sql)
        return done


@contextmanager
def failing() -> Iterator[type[Failing]]:
    """Stores opened inside use failing connections; set `left` to arm them, None to disarm."""
    real, sqlite.Connection = sqlite.Connection, Failing  # type: ignore[misc]
    try:
        yield Failing
    finally:
        Failing.left, Failing.after = None, False
        sqlite.Connection = real  # type: ignore[misc]
