import os
import random
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("psycopg", reason="psycopg is not installed")

from psycopg import errors

from holdfast.errors import HoldfastError, UsageError
from holdfast.longterm import Memory
from holdfast.longterm.records import Add, Purge
from holdfast.longterm.retrieval.embed import Hash
from holdfast.longterm.retrieval.index import Exact
from holdfast.longterm.retrieval.pgvector_index import PgVector, own_vectors
from holdfast.longterm.retrieval.vectors import unit
from holdfast.longterm.store import postgres, sqlite
from holdfast.longterm.store.postgres import PostgresStore
from holdfast.longterm.store.postgres_session import Sql, numbered
from holdfast.longterm.store.sqlite import open_store
from tests.longterm.conftest import Clock
from tests.longterm.world import DEEDS, SPACES, live, stay_apart


@pytest.fixture
def url(server):
    return server.schema()


@pytest.fixture
def opened(url):
    made = PostgresStore(url)
    yield made
    made.close()


def count(opened, table="meta"):
    with opened.read() as transaction:
        return transaction.rows(f"SELECT count(*) FROM {table}")[0][0]


def put(opened, key):
    with opened.write() as transaction:
        transaction.run("INSERT INTO meta (key, value) VALUES (?, 'x')", (key,))


def make(url, **options):
    return Memory(url, embedder=Hash(32), clock=Clock(), **options)


def test_question_marks_outside_of_quotes_are_placeholders(opened):
    assert numbered("a = ? AND b = 'really? %' AND \"c?\" IN (?, ?)") == (
        "a = $1 AND b = 'really? %' AND \"c?\" IN ($2, $3)"
    )
    with opened.read() as transaction:
        assert transaction.rows("SELECT 'it''s 100 %?', ?::text", ["a%b?"]) == [
            ("it's 100 %?", "a%b?")
        ]
        (row,) = transaction.rows("SELECT ?, coalesce(?, -1)", (b"\x00\xff", None))
        assert row == (b"\x00\xff", -1) and type(row[0]) is bytes


def test_settings_that_durability_rests_on(url):
    for durability, commit in (("full", "on"), ("process", "off")):
        opened = PostgresStore(url, durability)
        with opened.read() as transaction:
            assert transaction.rows("SHOW synchronous_commit") == [(commit,)]
            assert (
                transaction.rows(
                    "SELECT table_name::text, column_name::text FROM information_schema.columns "
                    "WHERE table_schema = ? AND data_type = 'text' AND collation_name <> 'C'",
                    (opened.schema,),
                )
                == []
            ), "texts are in the order of their bytes, as SQLite has them"
        opened.close()
    with pytest.raises(UsageError, match="nearest known: full"):
        PostgresStore(url, "fully")


def test_a_transaction_that_raises_has_not_happened_and_uses_no_number(url):
    with make(url) as memory:
        memory.add("one")
        with pytest.raises(RuntimeError, match="half way"), memory.store.write() as transaction:
            transaction.rows("SELECT nextval('memory_version_seq')")
            transaction.run("INSERT INTO meta (key, value) VALUES ('a', 'b')")
            raise RuntimeError("half way")
        (last,) = memory.add("two")
        assert count(memory.store) == 1, "the embedder's name and nothing else"
        memory.purge(last)
        three = memory.get(memory.add("three")[0])
        assert three.version == 3, "neither a gap, nor the number of what was purged"


def test_a_reader_keeps_its_snapshot_and_cannot_write(opened):
    with opened.read() as transaction:
        before = transaction.rows("SELECT count(*) FROM meta")
        put(opened, "a")
        with opened.read() as within:
            assert within.rows("SELECT count(*) FROM meta") == before == [(0,)]
        with pytest.raises(errors.ReadOnlySqlTransaction):
            transaction.run("DELETE FROM meta")
    assert count(opened) == 1


def test_writers_wait_for_each_other(url, monkeypatch):
    first, second = PostgresStore(url), PostgresStore(url)
    with first.write() as transaction:
        transaction.run("INSERT INTO meta (key, value) VALUES ('a', 'b')")
        waiting = threading.Thread(target=put, args=(second, "b"))
        waiting.start()
        time.sleep(0.1)
        assert waiting.is_alive()
    waiting.join(30)
    assert count(first) == 2
    monkeypatch.setattr(sqlite, "PATIENCE", 0.05)
    third = PostgresStore(url)
    with first.write(), pytest.raises(HoldfastError, match=r"locked for 0\.05 seconds"):
        put(third, "c")
    put(third, "c")
    for one in (first, second, third):
        one.close()


def together(count, act):
    """Run act(0), act(1), ... at once; raises what one of them raised."""
    wrong, gate = [], threading.Barrier(count)

    def run(number):
        gate.wait()
        try:
            act(number)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong:
        raise wrong[0]


def test_many_sessions_write_without_losing_anything(url):
    def write(number):
        with make(url, space=f"user {number % 2}") as memory:
            for i in range(10):
                memory.add(f"session {number} says {i}")
                assert memory.search(f"session {number}", limit=3)

    together(4, write)  # the schema is made by all four at once, too
    with make(url) as memory, memory.store.read() as transaction:
        versions = transaction.rows("SELECT version FROM memory ORDER BY version")
        assert versions == [(n,) for n in range(1, 41)]
        for space, seq in transaction.rows("SELECT id, seq FROM space"):
            found = transaction.rows("SELECT seq FROM event WHERE space = ? ORDER BY seq", (space,))
            assert found == [(n,) for n in range(1, seq + 1)] and seq == 20


class PowerCut(Exception):
    pass


def test_a_failure_at_any_statement_leaves_before_or_after(server, monkeypatch):
    """The session ends at its n-th statement; what was acknowledged is there, nothing half."""
    run, left = Sql.run, [None]

    def failing(sql, statement, args=()):
        if left[0] is not None:
            left[0] -= 1
            if left[0] == 0:
                sql._cursor.connection.close()
                raise PowerCut
        return run(sql, statement, args)

    monkeypatch.setattr(Sql, "run", failing)
    for number in range(1, 100):
        url = server.schema()
        with make(url) as memory:
            left[0] = number
            try:
                ids = memory.add(["one", "two"])
            except PowerCut:
                ids = []
            finished, left[0] = left[0] > 0, None
        with make(url) as memory:
            assert [item.id for item in memory.get_all()] == ids
            assert memory.stats()["events"] == len(ids)
            if not ids:
                assert len(memory.add(["one", "two"])) == 2
            assert memory.search("two")[0].text == "two" and memory.get_all()[-1].version == 2
        if finished:
            break
    assert number > 4 and finished


def test_sessions_that_the_server_ended_are_replaced(server, opened):
    end = (
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
        "WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
    )
    put(opened, "a")
    server.run(end)
    put(opened, "b")
    assert count(opened) == 2
    with pytest.raises(HoldfastError, match=r"gave up.*has not happened"):
        with opened.write() as transaction:
            transaction.run("INSERT INTO meta (key, value) VALUES ('c', 'x')")
            server.run(end)
            transaction.run("INSERT INTO meta (key, value) VALUES ('d', 'x')")
    with pytest.raises(HoldfastError, match="may have happened or not"), opened.write():
        server.run(end)
    assert count(opened) == 2


def test_what_is_not_a_memory_is_left_alone(server, url):
    schema = url.rpartition("=")[2]
    server.run(f"CREATE SCHEMA {schema} CREATE TABLE memory (theirs INTEGER)")
    with pytest.raises(UsageError, match=rf"{schema} of .* of another program.*\?schema=name"):
        PostgresStore(url)
    assert server.run(f"SELECT * FROM {schema}.memory") == []


def test_a_newer_schema_is_refused(server, url):
    PostgresStore(url).close()
    server.run(f"UPDATE {url.rpartition('=')[2]}.store SET migration = 99")
    with pytest.raises(UsageError, match=r"schema 99.*knows up to"):
        PostgresStore(url)


def test_an_older_schema_is_upgraded_and_its_copy_is_a_memory(url, monkeypatch):
    with make(url) as memory:
        memory.add("Ann likes tea.")
    old = sqlite.MIGRATIONS
    monkeypatch.setattr(sqlite, "MIGRATIONS", [*old, "CREATE TABLE later (x TEXT); nonsense"])
    with pytest.raises(errors.SyntaxError):
        make(url)
    monkeypatch.setattr(sqlite, "MIGRATIONS", [*old, "CREATE TABLE later (x TEXT)"])
    with make(url) as memory:
        assert memory.search("tea")[0].text == "Ann likes tea."
        assert count(memory.store, "later") == 0
    monkeypatch.setattr(sqlite, "MIGRATIONS", old)
    with make(f"{url}_{len(old)}_backup") as memory:
        assert memory.search("tea")[0].text == "Ann likes tea."
        assert memory.get(memory.add("Ben likes milk.", space="ben")[0], space="ben").version == 2


def test_a_memory_of_the_first_schema_is_upgraded(url, monkeypatch):
    with monkeypatch.context() as older:
        older.setattr(sqlite, "MIGRATIONS", sqlite.MIGRATIONS[:1])
        older.setattr(postgres, "_SAYING", {"memory": ("text",)})
        PostgresStore(url).close()
    with make(url) as memory:
        memory.transact(lambda view: [Add("new", data={"shelf": "s"})])
        with memory.reading() as view:
            assert [item.text for item in view.items(kind="fact", shelf="s")] == ["new"]


def test_both_engines_write_the_same_export(tmp_path, url):
    counts = []
    for place in (tmp_path / "m.db", url):
        with make(place) as memory:
            live(memory)
            counts.append(memory.export(tmp_path / f"{len(counts)}.jsonl"))
    one, other = ((tmp_path / f"{n}.jsonl").read_bytes() for n in range(2))
    assert one == other and counts[0] == counts[1]
    with make(f"{url}_2") as memory:
        memory.import_(tmp_path / "0.jsonl")
        assert memory.export(tmp_path / "again.jsonl") == counts[0]


@pytest.mark.parametrize("seed", range(2))
def test_whatever_is_done_spaces_stay_apart(url, seed):
    draw = random.Random(seed)
    with make(url) as memory:
        stay_apart(
            memory,
            [(draw.choice(SPACES), draw.choice(DEEDS), draw.randrange(6)) for _ in range(25)],
        )


def test_a_purge_leaves_no_text_in_tables_nor_in_samples_of_them(server, url):
    secret = [f"Zanzibar xylophone number {n}" for n in range(20)]
    with make(url) as memory:
        memory.add("The others stay.")
        ids = memory.add(secret)
        memory.update(ids[0], "Zanzibar again")
        server.run("ANALYZE")

        def traces():
            return [file for file in server.files() if b"Zanzibar" in file.read_bytes()]

        assert traces()
        for item in ids:
            memory.transact(lambda view, item=item: [Purge(item)])
        memory.store.shred()
        assert not traces()
        assert memory.search("others")[0].text == "The others stay."


def test_a_purge_waits_for_those_who_still_see_it(url, monkeypatch):
    with make(url) as memory, make(url) as other:
        (item,) = memory.add("Zanzibar")
        monkeypatch.setattr(sqlite, "PATIENCE", 0.2)
        with other.reading() as view:
            assert view.get(item)
            with pytest.raises(HoldfastError, match=r"1 session\(s\) have read from before"):
                memory.purge(item)
        memory.store.shred()


def test_what_postgresql_cannot_keep_is_said_so(url):
    with make(url) as memory:
        with pytest.raises(UsageError, match="character NUL"):
            memory.add("a\0b")
        long = "".join(map(str, random.Random(0).choices(range(10), k=9000)))
        with pytest.raises(UsageError, match="at most about 2,700 bytes"):
            memory.add("text", session=long)
        assert memory.add("\\u0000 'quoted' \"twice\" %s ?", metadata={"a": "x\0y"})
        assert memory.get_all()[0].metadata == {"a": "x\0y"}
        assert memory.stats()["memories"] == 1


def test_damage_is_found(server, url):
    with make(url) as memory:
        memory.add("Ann likes tea.")
        assert memory.store.damage() == [] and memory.store.nbytes() > 100_000
        schema = url.rpartition("=")[2]
        server.run(
            f"SET session_replication_role = replica; DELETE FROM {schema}.memory; "
            "UPDATE pg_index SET indisvalid = false "
            f"WHERE indexrelid = '{schema}.edge_src'::regclass"
        )
        assert memory.store.damage() == [
            f"index edge_src is not valid; REINDEX INDEX {schema}.edge_src",
            "2 row(s) of embedding refer to missing rows of memory",
        ]


def test_a_backup_is_restored_by_the_tools_of_postgresql(server, url, tmp_path, monkeypatch):
    import pgserver

    tools = Path(pgserver.__file__).parent / "pginstall" / "bin"
    with make(url) as memory:
        memory.add("Ann likes tea.")
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(HoldfastError, match="no pg_dump on the PATH"):
            memory.store.backup(tmp_path / "m.dump")
        monkeypatch.setenv("PATH", f"{tools}{os.pathsep}/usr/bin{os.pathsep}/bin")
        memory.store.backup(tmp_path / "m.dump")
        with pytest.raises(HoldfastError, match="cannot write the backup"):
            memory.store.backup(tmp_path / "nowhere" / "m.dump")
    assert [file.name for file in tmp_path.iterdir()] == ["m.dump"]
    server.run("CREATE DATABASE restored")
    elsewhere = url.replace("/postgres?", "/restored?")
    target = server.url.replace("/postgres?", "/restored?")
    subprocess.run([tools / "pg_restore", "-d", target, tmp_path / "m.dump"], check=True)
    with make(elsewhere) as memory:
        assert memory.search("tea")[0].text == "Ann likes tea."


def test_urls(server):
    one = PostgresStore(server.url.replace("postgres:@", "postgres:secret@") + "&schema=shown")
    assert "secret" not in one.url and "schema=shown" in one.url
    assert open_store(one.url).schema == "shown"
    for url, message in (
        (f"{server.url}&schema=Upper", "'Upper' is not a plain name"),
        ("postgresql://u:secret@host/db?nonsense=1", "nonsense"),
    ):
        with pytest.raises(UsageError, match=message):
            PostgresStore(url)
    with pytest.raises(HoldfastError, match="cannot open postgresql://u@127") as found:
        PostgresStore("postgresql://u:secret@127.0.0.1:1/db")
    assert "secret" not in str(found.value)


def test_a_closed_store_says_so(opened):
    with opened.read():
        opened.close()
    assert not opened._idle
    for way in (opened.write, opened.read):
        with pytest.raises(UsageError, match="is closed"), way():
            pass


DIM = 24


def rows(count, seed=0):
    return unit(np.random.default_rng(seed).normal(size=(count, DIM)))


def test_pgvector_finds_what_brute_force_finds_after_any_history(opened):
    index, exact = PgVector(opened, "test_index", DIM, beam=400), Exact(DIM)
    assert len(index.search(rows(1)[0], 3)[0]) == 0
    rng = np.random.default_rng(1)
    for step in range(4):
        ids = rng.choice(200, 60, replace=False)  # some are here already and change
        gone = rng.choice(200, 20, replace=False)
        for one in (index, exact):
            one.add(ids, rows(60, seed=step))
            one.remove(gone)
        assert len(index) == len(exact)
    assert index.nbytes() > 4 * DIM * len(index)
    for q in rows(8, seed=99):
        for allow in (None, range(0, 200, 7), [3], []):
            for found, want in zip(
                index.search(q, 5, allow), exact.search(q, 5, allow), strict=True
            ):
                np.testing.assert_allclose(found, want, atol=1e-5)
        assert index.search(q, 2000)[0].tolist() == exact.search(q, 2000)[0].tolist()
    with opened.read() as transaction:
        transaction.rows("SELECT set_config('enable_seqscan', 'off', true)")
        plan = transaction.rows(
            f"EXPLAIN SELECT id FROM {index._table} ORDER BY v {index._far} '{[0.1] * DIM}' LIMIT 5"
        )
    assert "test_index_graph" in str(plan)
    with pytest.raises(UsageError, match=r"a query of shape \(3,\).*\(24,\)"):
        index.search(np.zeros(3), 1)
    with pytest.raises(UsageError, match="twice in one add"):
        index.add(np.zeros(2, np.int64), rows(2))
    with pytest.raises(UsageError, match=r"beam=2000 is outside 1\.\.1000"):
        PgVector(opened, "test_index", DIM, beam=2000)


def test_own_vectors_follow_the_memory(url, tmp_path):
    with make(url) as memory:
        ids = memory.add([f"Ann likes tea number {n}." for n in range(30)])
        memory.update(ids[0], "Ann likes coffee.")
        memory.purge(ids[1])
        index = own_vectors(memory)
        assert len(index) == 29
        q = memory.embedder.encode(["coffee"])[0]
        with memory.reading() as view:
            near = view.nearest(q, 5)
            found, cosines = index.search(q, 5)
            assert found[0] == near[0][0].version
            np.testing.assert_allclose(cosines, [cosine for _, cosine in near], atol=1e-5)
        memory.delete(ids[0])
        assert len(own_vectors(memory)) == 28
    with make(tmp_path / "m.db") as memory, pytest.raises(UsageError, match="not in PostgreSQL"):
        own_vectors(memory)


def test_without_rights_it_says_what_to_do(server, url):
    server.run("CREATE ROLE guest LOGIN")
    server.run("CREATE DATABASE guests OWNER guest")
    opened = PostgresStore(url.replace("postgres:@/postgres", "guest:@/guests"))
    with pytest.raises(UsageError, match="administrator run CREATE EXTENSION vector"):
        PgVector(opened, "test_index", DIM)
    opened.close()
    with pytest.raises(UsageError, match=r"may not do what a memory needs.*GRANT CREATE"):
        PostgresStore(url.replace("postgres:@", "guest:@"))
    server.run(f"CREATE SCHEMA {opened.schema} AUTHORIZATION guest")
    with make(url.replace("postgres:@", "guest:@")) as memory:
        memory.purge(memory.add("The schema is enough.")[0])
