import sqlite3
import subprocess
import sys
import threading
import time

import pytest

from holdfast.errors import HoldfastError, UsageError
from holdfast.longterm.memory import Memory
from holdfast.longterm.records import Add
from holdfast.longterm.retrieval.embed import Hash
from holdfast.longterm.store import schema, sqlite
from holdfast.longterm.store.sqlite import SqliteStore, open_store


def count(opened, table="meta"):
    with opened.read() as transaction:
        return transaction.rows(f"SELECT count(*) FROM {table}")[0][0]


def put(opened, key):
    with opened.write() as transaction:
        transaction.run("INSERT INTO meta (key, value) VALUES (?, 'x')", (key,))


def test_settings_that_durability_rests_on(tmp_path):
    for durability, synchronous in (("full", 2), ("process", 1)):
        opened = SqliteStore(tmp_path / f"{durability}.db", durability)
        pragma = {
            name: opened._writer.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("journal_mode", "synchronous", "foreign_keys", "secure_delete")
        }
        assert pragma == {
            "journal_mode": "wal", "synchronous": synchronous, "foreign_keys": 1,
            "secure_delete": 1,
        }  # fmt: skip
        opened.close()


def test_a_transaction_that_raises_has_not_happened(tmp_path):
    opened = SqliteStore(tmp_path / "m.db")
    with pytest.raises(RuntimeError, match="half way"), opened.write() as transaction:
        transaction.run("INSERT INTO meta (key, value) VALUES ('a', 'b')")
        raise RuntimeError("half way")
    assert count(opened) == 0
    put(opened, "a")
    assert count(opened) == 1


def test_a_reader_keeps_its_snapshot_and_cannot_write(tmp_path):
    opened = SqliteStore(tmp_path / "m.db")
    with opened.read() as transaction:
        before = transaction.rows("SELECT count(*) FROM meta")
        writer = threading.Thread(target=put, args=(opened, "a"))
        writer.start()
        writer.join()
        assert transaction.rows("SELECT count(*) FROM meta") == before == [(0,)]
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            transaction.run("DELETE FROM meta")
    assert count(opened) == 1


def test_writers_wait_for_each_other(tmp_path, monkeypatch):
    first, second = (SqliteStore(tmp_path / "m.db") for _ in range(2))
    second._writer.execute("PRAGMA busy_timeout = 0")
    with first.write() as transaction:
        transaction.run("INSERT INTO meta (key, value) VALUES ('a', 'b')")
        waiting = threading.Thread(target=put, args=(second, "b"))
        waiting.start()
        time.sleep(0.1)
        assert waiting.is_alive()
    waiting.join(10)
    assert count(first) == 2
    monkeypatch.setattr(sqlite, "PATIENCE", 0.05)
    with first.write(), pytest.raises(HoldfastError, match=r"locked for 0\.05 seconds"):
        put(second, "c")


def test_what_is_not_a_memory_is_left_alone(tmp_path):
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    text = tmp_path / "notes.txt"
    text.write_text("not a database at all, but long enough to have a header" * 20)
    for path, message in ((other, "another program"), (text, "not a memory")):
        content = path.read_bytes()
        with pytest.raises(UsageError, match=message):
            SqliteStore(path)
        assert path.read_bytes() == content
    with pytest.raises(UsageError, match="no directory"):
        SqliteStore(tmp_path / "nowhere" / "m.db")
    with pytest.raises(UsageError, match="mysql is not known"):
        open_store("mysql://host/db")
    with pytest.raises(UsageError, match="nearest known: full"):
        SqliteStore(tmp_path / "m.db", "fully")


def test_a_newer_file_is_refused_and_untouched(tmp_path):
    path = tmp_path / "m.db"
    SqliteStore(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    content = path.read_bytes()
    with pytest.raises(UsageError, match=r"schema 99.*knows up to"):
        SqliteStore(path)
    assert path.read_bytes() == content


def test_an_older_file_is_upgraded_after_a_backup(tmp_path, monkeypatch):
    path = tmp_path / "m.db"
    with Memory(path, embedder=Hash(32)) as memory:
        memory.add("Ann likes tea.")
    monkeypatch.setattr(
        schema, "MIGRATIONS", [*schema.MIGRATIONS, "CREATE TABLE later (x TEXT); SELECT 1"]
    )
    monkeypatch.setattr(sqlite, "MIGRATIONS", schema.MIGRATIONS)
    with Memory(path, embedder=Hash(32)) as memory:
        assert [hit.text for hit in memory.search("tea")] == ["Ann likes tea."]
        assert count(memory.store, "later") == 0
    backup = tmp_path / f"m.db.schema{len(schema.MIGRATIONS) - 1}.backup"
    monkeypatch.setattr(sqlite, "MIGRATIONS", schema.MIGRATIONS[:-1])
    with Memory(backup, embedder=Hash(32)) as memory:
        assert [hit.text for hit in memory.search("tea")] == ["Ann likes tea."]


def test_a_file_of_the_first_schema_is_upgraded(tmp_path, monkeypatch):
    path = tmp_path / "m.db"
    monkeypatch.setattr(sqlite, "MIGRATIONS", schema.MIGRATIONS[:1])
    with SqliteStore(path).write() as transaction:
        transaction.run(
            "INSERT INTO space (tenant, user_id, agent_id, run_id) VALUES ('','','','')"
        )
        transaction.run(
            "INSERT INTO memory (id, space, kind, text, position, data, metadata, recorded_at, "
            "text_hash, key_hash) VALUES (?, 1, 'fact', 'old', 1, '{}', '{}', 1, ?, ?)",
            ("m" + 20 * "0", b"", b""),
        )
    monkeypatch.setattr(sqlite, "MIGRATIONS", schema.MIGRATIONS)
    with Memory(path, embedder=Hash(32)) as memory:
        memory.transact(lambda view: [Add("new", data={"shelf": "s"})])
        with memory.reading() as view:
            assert [item.text for item in view.items()] == ["old", "new"]
            assert [item.text for item in view.items(kind="fact", shelf="s")] == ["new"]
    assert (tmp_path / "m.db.schema1.backup").exists()


def test_a_migration_that_fails_leaves_the_old_schema(tmp_path, monkeypatch):
    path = tmp_path / "m.db"
    SqliteStore(path).close()
    good = sqlite.MIGRATIONS
    monkeypatch.setattr(sqlite, "MIGRATIONS", [*good, "CREATE TABLE later (x TEXT); nonsense"])
    with pytest.raises(sqlite3.OperationalError):
        SqliteStore(path)
    monkeypatch.setattr(sqlite, "MIGRATIONS", good)
    opened = SqliteStore(path)
    with opened.read() as transaction:
        assert not transaction.rows("SELECT 1 FROM sqlite_master WHERE name = 'later'")


OPEN = """
import pathlib, sys, time
from holdfast.longterm.store.sqlite import SqliteStore
print("ready", flush=True)
sys.stdin.readline()
opened = SqliteStore(sys.argv[1])
with opened.read() as transaction:
    print(transaction.rows("SELECT count(*) FROM meta")[0][0])
"""


def test_many_processes_may_create_one_file(tmp_path):
    command = [sys.executable, "-c", OPEN, tmp_path / "m.db"]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:  # all at once
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        assert process.communicate(timeout=60)[0] == "0\n" and process.returncode == 0


def test_a_backup_is_whole_while_others_write(tmp_path):
    opened = SqliteStore(tmp_path / "m.db")
    put(opened, "a")
    opened.backup(tmp_path / "copy.db")
    put(opened, "b")
    copy = SqliteStore(tmp_path / "copy.db")
    assert count(copy) == 1 and copy.damage() == []
    with pytest.raises(HoldfastError, match="cannot write the backup"):
        opened.backup(tmp_path / "nowhere" / "copy.db")


def test_a_closed_store_says_so(tmp_path):
    opened = SqliteStore(tmp_path / "m.db")
    opened.close()
    with pytest.raises(UsageError, match="is closed"), opened.write():
        pass
    with pytest.raises(UsageError, match="is closed"), opened.read():
        pass
