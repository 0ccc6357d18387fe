"""A session with PostgreSQL: what a URL means, its settings, SQL and errors as SQLite's users know.

Statements come with `?` as placeholders, and leave with `$1`; integers all go as one type, texts
and bytes come back as they are.
"""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import count
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

from holdfast.errors import HoldfastError, UsageError
from holdfast.longterm.store import sqlite

try:
    import psycopg
    from psycopg import conninfo, errors
    from psycopg.types.numeric import Int8BinaryDumper
except ImportError as error:
    raise UsageError(
        f"a memory in PostgreSQL needs psycopg ({error}); pip install 'holdfast[memory]'"
    ) from error

DURABILITY = {"full": "on", "process": "off"}
_TOKEN = re.compile(r"'[^']*'|\"[^\"]*\"|\?")


@lru_cache(512)
def numbered(sql: str) -> str:
    """`?` outside of quotes as `$1`, `$2`, and so on."""
    number = count(1)
    return _TOKEN.sub(lambda found: f"${next(number)}" if found[0] == "?" else found[0], sql)


class Sql:
    """A transaction that has begun on a connection."""

    def __init__(self, connection: psycopg.Connection):
        self._cursor = psycopg.RawCursor(connection)

    def rows(self, sql: str, args: Sequence[Any] = ()) -> list[tuple]:
        with explained():
            return self._cursor.execute(numbered(sql), args, binary=True).fetchall()

    def run(self, sql: str, args: Sequence[Any] = ()) -> int:
        with explained():
            return self._cursor.execute(numbered(sql), args).rowcount

    def many(self, sql: str, args: Iterable[Sequence[Any]]) -> None:
        with explained():
            self._cursor.executemany(numbered(sql), args)


class explained:
    """Says what to do about errors that a caller, or a server, can be the reason of."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        if kind is None or not isinstance(error, psycopg.Error):
            return
        if isinstance(error, errors.ProgramLimitExceeded):
            raise UsageError(
                f"PostgreSQL cannot keep this ({first_line(error)}); names of spaces, sessions, "
                "kinds and relations have at most about 2,700 bytes there"
            ) from error
        if isinstance(error, errors.InsufficientPrivilege):
            raise UsageError(
                f"this user of PostgreSQL may not do what a memory needs ({first_line(error)}); "
                "let an administrator GRANT CREATE ON DATABASE, or CREATE SCHEMA ... AUTHORIZATION"
            ) from error
        if isinstance(error, errors.LockNotAvailable):
            raise HoldfastError(
                f"the memory was locked for {sqlite.PATIENCE:g} seconds by another session; find "
                "out which one holds a transaction open (pg_stat_activity), and try again"
            ) from error
        if isinstance(error, psycopg.OperationalError):
            raise HoldfastError(
                f"PostgreSQL gave up ({first_line(error)}); what was not acknowledged has not "
                "happened, try again"
            ) from error
        if isinstance(error, psycopg.DataError) and "NUL" in str(error):
            raise UsageError(
                "a text holds the character NUL, which PostgreSQL cannot keep; remove it"
            ) from error


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def parsed(url: str) -> tuple[str, str, str]:
    """(what libpq reads, the memory's schema, what may be shown) of a URL."""
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    schema = options.pop("schema", "holdfast")
    if not re.fullmatch(r"(?!pg_)[a-z_][a-z0-9_]{0,48}", schema):
        raise UsageError(
            f"schema {schema!r} is not a plain name; use up to 49 small letters, digits and _, "
            "not beginning with a digit or pg_"
        )
    plain = urlunsplit(parts._replace(query=urlencode(options, quote_via=quote)))
    try:
        conninfo.conninfo_to_dict(plain)
    except psycopg.ProgrammingError as error:
        raise UsageError(
            f"memory URL: {str(error).strip()}; it is postgresql://user:password@host/database"
        ) from None
    options.pop("password", None)
    user, at, host = parts.netloc.rpartition("@")
    shown = parts._replace(
        netloc=user.partition(":")[0] + at + host,
        query=urlencode({**options, "schema": schema}, quote_via=quote, safe="/"),
    )
    return plain, schema, urlunsplit(shown)


def connect(url: str, schema: str, shown: str, durability: str) -> psycopg.Connection:
    """A connection that commits by itself and finds a schema's tables.

    Raises:
        HoldfastError: the server cannot be reached.
    """
    try:
        connection = psycopg.connect(url, autocommit=True)
    except psycopg.OperationalError as error:
        raise HoldfastError(f"cannot open {shown}: {str(error).strip()}") from error
    # A statement is planned once, whatever the size of its integers.
    connection.adapters.register_dumper(int, Int8BinaryDumper)
    connection.execute(
        f"SET search_path = {schema}; SET synchronous_commit = {DURABILITY[durability]}; "
        f"SET lock_timeout = {round(sqlite.PATIENCE * 1000)}; SET statement_timeout = 0; "
        "SET idle_in_transaction_session_timeout = 0; SET client_min_messages = warning"
    )
    return connection
