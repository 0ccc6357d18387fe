"""Memories with a clock that ticks by itself, in a file or on a server, to fill and to ask."""

import importlib.util
import itertools
import shutil
import tempfile
import warnings
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from holdfast.longterm.memory import Memory
from holdfast.longterm.retrieval.embed import Hash
from holdfast.longterm.store import sqlite

START = datetime(2024, 1, 1, tzinfo=UTC)
ENGINES = ["sqlite", "postgresql"]


class Clock:
    """A second later each time it is asked; tests may move it."""

    def __init__(self, start=START):
        self.time = start

    def __call__(self):
        self.time += timedelta(seconds=1)
        return self.time


@pytest.fixture
def clock():
    return Clock()


class Server:
    """A PostgreSQL server with pgvector, in a folder of its own, without a port."""

    def __init__(self, folder):
        import pgserver

        self.folder, self._numbers = folder, itertools.count()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it falls back to a folder in the temporary one
            self._server = pgserver.get_server(folder, cleanup_mode="delete")
        self.url = self._server.get_uri()
        # What is tested is what this process does, and the folder does not outlive it.
        self.run("ALTER SYSTEM SET fsync = off")
        self.run("SELECT pg_reload_conf()")

    def run(self, sql):
        import psycopg

        with psycopg.connect(self.url, autocommit=True) as connection:
            done = connection.execute(sql)
            return done.fetchall() if done.description else None

    def schema(self):
        """The URL of a place that is empty still."""
        return f"{self.url}&schema=test{next(self._numbers)}"

    def files(self):
        """The files in which tables are, as they would be found on the disk."""
        self.run("CHECKPOINT")
        return [file for file in (self.folder / "base").rglob("*") if file.is_file()]

    def stop(self):
        self._server.cleanup()


@pytest.fixture(scope="session")
def server():
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    pytest.importorskip("pgserver", reason="pgserver is not installed")
    # Not in pytest's own folder: that is closed to the user as whom root lets the server run.
    folder = Path(tempfile.mkdtemp(prefix="holdfast-postgres-"))
    try:
        made = Server(folder)
    except Exception as error:
        shutil.rmtree(folder)
        pytest.skip(f"a PostgreSQL server cannot be started here: {error}")
    yield made
    made.stop()


class Place:
    """Where memories are, by name: a file each, or a schema of the server each."""

    def __init__(self, name, files):
        self._name, self.files, self._known = name, files, {}

    def __call__(self, name):
        if name not in self._known:
            self._known[name] = self._name(name)
        return self._known[name]


@pytest.fixture
def place(request, tmp_path):
    if getattr(request, "param", "sqlite") == "sqlite":
        return Place(lambda name: tmp_path / f"{name}.db", lambda: list(tmp_path.iterdir()))
    server = request.getfixturevalue("server")
    return Place(lambda _: server.schema(), server.files)


@pytest.fixture
def memory(place, clock):
    with Memory(place("memory"), embedder=Hash(64), clock=clock) as made:
        yield made


class Fetched:
    """Rows that SQL has handed out so far; `of(act)` counts those of one act."""

    rows = 0

    def of(self, act):
        before = self.rows
        act()
        return self.rows - before

    def count(self, monkeypatch, sql):
        plain = sql.rows

        def rows(transaction, statement, args=()):
            found = plain(transaction, statement, args)
            self.rows += len(found)
            return found

        monkeypatch.setattr(sql, "rows", rows)


@pytest.fixture
def fetched(monkeypatch):
    made = Fetched()
    made.count(monkeypatch, sqlite._Sql)
    if importlib.util.find_spec("psycopg"):
        from holdfast.longterm.store import postgres_session

        made.count(monkeypatch, postgres_session.Sql)
    return made
