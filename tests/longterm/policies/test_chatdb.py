import os
import random
import signal
import sqlite3
import subprocess
import sys
import textwrap

import pytest

from holdfast.errors import UsageError
from holdfast.longterm import ground
from holdfast.longterm.language.llm import LLMError, Scripted
from holdfast.longterm.policies.chatdb import ChainError, ChatDB
from holdfast.longterm.tools.sqlguard import Refused
from holdfast.longterm.tools.steps import Step, Template, bound, earlier

SCHEMA = [
    "CREATE TABLE customer (id INTEGER PRIMARY KEY, name TEXT UNIQUE, phone TEXT)",
    "CREATE TABLE sale (id INTEGER PRIMARY KEY, customer INTEGER REFERENCES customer "
    "ON DELETE CASCADE, fruit TEXT, kilos REAL CHECK (kilos > 0))",
    "CREATE TABLE note (text TEXT)",
]
SALE = Template(
    r"(?P<name>\w+) bought (?P<kilos>[\d.]+) kg of (?P<fruit>\w+)",
    (
        Step("who", "SELECT id FROM customer WHERE name = <said.name>"),
        Step("sell", "INSERT INTO sale (customer, fruit, kilos) "
                     "VALUES (<step1.id>, <said.fruit>, <said.kilos>)"),
    ),
)  # fmt: skip


def shop(path=":memory:", **options):
    db = ChatDB(path, SCHEMA, templates=[SALE], **options)
    if not db.log():
        for name in ("Ann", "Ben"):
            db.run(f"add customer name={name}, phone=0123")
    return db


def planned(*statements, answer=None):
    return {"answer": answer, "steps": [{"description": "", "sql": sql} for sql in statements]}


def test_a_later_step_uses_what_an_earlier_one_found():
    with shop() as db:
        assert db.run("Ann bought 2.5 kg of apples").rows[0].rows == ((1,),)
        db.run("Ben bought 4 kg of apples")
        assert db.run("the total kilos of sale where fruit is apples").answer == "6.5"
        assert db.run("how many sale where customer is 1?").answer == "1"
        assert db.run("list name, phone of customer where name contains 'n'").answer == (
            "Ann, 0123; Ben, 0123"
        )
        assert db.run("the largest kilos of sale per customer").answer == "1, 2.5; 2, 4.0"
        assert db.run("set phone of customer to '44; 55' where name is Ann").answer == (
            "1 rows changed"
        )
        assert db.run("list phone of customer where name is Ann").answer == "44; 55"
        db.run("remove sale where kilos above 3")
        assert db.run("how many sale").answer == "1"


def test_text_never_becomes_sql():
    with shop() as db:
        evil = "x'); DROP TABLE sale; --"
        db.run(f'add customer name="{evil}"')
        assert db.run(f'how many customer where name is "{evil}"').answer == "1"
        sql, args = bound("SELECT '<b>', '<said.n>' -- <said.n>", earlier([], {"n": evil}))
        assert sql == "SELECT '<b>', :from_n_0 -- <said.n>" and args == {"from_n_0": evil}
        with pytest.raises(Refused, match="reference within a text"):
            bound("SELECT 'so <said.n>'", earlier([], {"n": 1}))


def test_several_rows_fill_a_list():
    with shop() as db:
        db.llm = Scripted(
            [
                planned(
                    "SELECT id FROM customer ORDER BY id",
                    "SELECT count(*) AS n FROM customer WHERE id IN (<step1.id>)",
                ),
                "Two.",
            ]
        )
        steps = db.run("How many customers?")
        assert steps.rows[1].rows == ((2,),) and steps.answer == "Two."
        assert '"rows": [[2]]' in db.llm.requests[-1][-1]["content"]


def test_a_failing_chain_changes_nothing(tmp_path):
    with shop(tmp_path / "shop.db") as db:
        before, log = db.digest(), db.log()
        for text in ("Zed bought 1 kg of apples", "Ann bought 0 kg of apples"):
            with pytest.raises(ChainError, match="step 2 of 2 failed, and nothing was changed"):
                db.run(text)
        db.llm = Scripted(
            [
                planned("INSERT INTO note VALUES ('a;b')", "INSERT INTO nope VALUES (1)"),
                {"sql": "INSERT INTO neither VALUES (1)"},
            ]
        )
        with pytest.raises(ChainError, match="no such table: neither"):
            db.run("Note something.")
        assert "no such table: nope" in db.llm.requests[1][-1]["content"]
        db.llm = Scripted([planned("DELETE FROM customer", "SELECT nope"), LLMError("busy")])
        with pytest.raises(LLMError, match="busy"):
            db.run("Forget all.")
        assert db.digest() == before and db.log() == log


def test_a_step_is_repaired_once_with_the_error():
    with shop() as db:
        db.llm = Scripted(
            [
                planned("INSERT INTO note VALUES ('kept')", "INSERT INTO note (txt) VALUES ('x')"),
                {"sql": "INSERT INTO note (text) VALUES ('x')"},
                "Noted.",
                planned(answer="Hello!"),
            ]
        )
        assert db.run("Note it.").sql[1] == "INSERT INTO note (text) VALUES ('x')"
        assert "no column named txt" in db.llm.requests[1][-1]["content"]
        assert db.run("Hi").answer == "Hello!", "no memory is needed"
        db.llm = None
        assert db.run("how many note").answer == "2"


def test_undo_brings_back_exactly_what_was():
    draw = random.Random(0)
    with shop() as db:
        digests = [db.digest()]
        for i in range(40):
            pick = draw.randrange(6)
            name = f"N{draw.randrange(8)}"
            before = len(db.log())
            db.llm = Scripted(
                [
                    planned(
                        [
                            "INSERT OR REPLACE INTO customer (id, name) "
                            f"VALUES ({i % 5 + 1}, '{name}')",
                            f"UPDATE customer SET name = name || 'x', phone = {i / 7} WHERE id < 3",
                            "DELETE FROM customer WHERE id = (SELECT max(id) FROM customer)",
                            "INSERT INTO sale (customer, fruit, kilos) SELECT id, 'kiwi', 0.1 "
                            "FROM customer",
                            f"INSERT INTO note VALUES (x'00ff{i:02x}'), (NULL), ({i / 3})",
                            f"UPDATE sale SET id = id + 100 WHERE id % 3 = {i % 3}",
                        ][pick]
                    ),
                    "Done.",
                ]
            )  # fmt: skip
            db.run(f"step {i}")
            if len(db.log()) > before:
                digests.append(db.digest())
        assert len(set(digests)) > 30
        for digest in reversed(digests[:-1]):
            db.undo()
            assert db.digest() == digest
        db.undo(2)  # the customers that were there at first
        with pytest.raises(UsageError, match="cannot undo 1 chains; there are 0"):
            db.undo()


def test_killed_in_the_middle_of_a_chain(tmp_path):
    path = tmp_path / "shop.db"
    with shop(path) as db:
        db.run("Ann bought 1 kg of apples")
        before = db.digest()
    child = textwrap.dedent(
        f"""
        import time
        from holdfast.longterm.language.llm import LLMError, Scripted
        from holdfast.longterm.policies.chatdb import ChatDB
        from tests.longterm.policies.test_chatdb import SCHEMA, planned

        def reply(messages, schema):
            if "failed" in messages[-1]["content"]:
                print("in the middle", flush=True)
                time.sleep(60)
            return planned("DELETE FROM customer", "INSERT INTO note VALUES ('x')", "SELECT nope")

        ChatDB({str(path)!r}, SCHEMA, Scripted(reply)).run("Forget all.")
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", child], stdout=subprocess.PIPE, text=True, cwd=os.getcwd()
    )
    assert process.stdout.readline() == "in the middle\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with shop(path) as db:
        assert db.digest() == before
        db.run("Ben bought 1 kg of apples")
        assert len(db.undo(1)) == 1 and db.digest() == before


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("ATTACH 'other.db' AS other", "ATTACH other.db is not allowed"),
        ("PRAGMA user_version = 3", "PRAGMA user_version is not allowed"),
        ("DROP TABLE sale", "access to the schema is not allowed"),
        ("CREATE TABLE t (x)", "access to the schema is not allowed"),
        ("SELECT * FROM sqlite_master", "access to the schema is not allowed"),
        ("SELECT sql FROM _schema", "read of _schema is not allowed"),
        ("UPDATE _now SET chain = NULL", "update of _now is not allowed"),
        ("DELETE FROM _kept_sale", "delete of _kept_sale is not allowed"),
        ("COMMIT", "TRANSACTION COMMIT is not allowed"),
        ("RELEASE step", "SAVEPOINT RELEASE is not allowed"),
        ("SELECT 1; DELETE FROM sale", "one statement at a time"),
        ("SELECT load_extension('x')", "function load_extension is not allowed"),
        ("SELECT randomblob(1000000000)", "function randomblob is not allowed"),
        ("VACUUM INTO 'copy.db'", "cannot VACUUM from within|ATTACH copy.db is not allowed"),
        ("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n",
         "RECURSIVE is not allowed"),
        ("SELECT text FROM note", "it reads all of note, more than 50 rows"),
        ("SELECT n.text FROM customer c, note AS n", "it reads all of note"),
        ("UPDATE note SET text = ''", "it reads all of note"),
        ("SELECT text FROM note WHERE rowid > 0 AND text LIKE 'a%'", "more than 20 rows"),
        ("SELECT sum(length(replace(a.text || b.text || c.text, d.text, e.text))) FROM note a, "
         "note b, note c, note d, note e WHERE a.rowid > 0 AND b.rowid > 0 AND c.rowid > 0 AND "
         "d.rowid > 0 AND e.rowid > 0", "it took more than 0.2 seconds"),
    ],
)  # fmt: skip
def test_what_a_statement_may_not_do(tmp_path, sql, message):
    with shop(tmp_path / "shop.db", rows=20, scanned=50, seconds=0.2) as db:
        db.writer.executemany("INSERT INTO note VALUES (?)", [(f"a{i}",) for i in range(60)])
        before = db.digest()
        reply = planned("INSERT INTO note VALUES ('b')", sql), {"sql": sql}
        for first in (reply, (planned(sql), {"sql": sql})):
            db.llm = Scripted(list(first))
            with pytest.raises(ChainError, match=message):
                db.run("Do it.")
            assert db.digest() == before


def test_questions_are_asked_of_a_connection_that_cannot_write(tmp_path):
    with shop(tmp_path / "shop.db") as db:
        other = sqlite3.connect(db.path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        assert db.run("how many customer").answer == "2", "no lock is needed"
        other.close()
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            db.reader.execute("DELETE FROM customer")


def test_rows_are_a_source_to_ground_answers_on():
    with shop() as db:
        db.run("Ann bought 2 kg of cherries")
        source = db.as_source()
        (best, *_) = source("How many kilos of cherries?", 3)
        assert best.uri == "chatdb:sale/1" and "fruit cherries; kilos 2.0" in best.text
        assert source("weather", 3) == []
        assert not ground.ask(source, "How many kilos of cherries?").abstained


def test_what_it_refuses(tmp_path):
    with shop() as db:
        for text, message in (
            (" ", "the text is empty"),
            ("sing a song", "is not understood without a model. Forms: add TABLE"),
            ("how many dragons", "there is no table dragons; there are: customer, note, sale"),
            ("list age of customer", "there is no column age; there are: id, name, phone"),
            ("how many customer where name", "is no condition"),
            ("how many customer where name is Ann or 1", "join conditions with and"),
            ("add customer nothing", "says no COLUMN=VALUE"),
        ):
            with pytest.raises(UsageError, match=message):
                db.run(text)
    for schema, message in (
        ("CREATE TABLE t (x)", "a list of CREATE statements"),
        (["CREATE TABLE t (x); CREATE TABLE u (x)"], "one statement at a time"),
        (["CREATE TABL t (x)"], "syntax error"),
        (["CREATE TABLE t (x PRIMARY KEY) WITHOUT ROWID"], "table t is WITHOUT ROWID"),
        (["CREATE TABLE _t (x)"], "_t begins with _"),
        (["CREATE VIEW v AS SELECT 1"], "makes no table"),
    ):
        with pytest.raises(UsageError, match=message):
            ChatDB(":memory:", schema)
    path = tmp_path / "shop.db"
    shop(path).close()
    with pytest.raises(UsageError, match="was made with another schema"):
        ChatDB(path, SCHEMA[:1])
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("CREATE TABLE t (x)")
    other.close()
    with pytest.raises(UsageError, match="another program's database"):
        ChatDB(tmp_path / "other.db", SCHEMA)
    with pytest.raises(UsageError, match="cannot be opened"):
        ChatDB(tmp_path / "no" / "shop.db", SCHEMA)
