"""`holdfast memory` from the command line."""

import io
import json
import sqlite3
import sys

import pytest

from holdfast.cli import main
from holdfast.longterm import Memory


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Run a verb on one file; `code=` is the exit code that is expected."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(verb, *args, file=tmp_path / "a.memory", code=0, stdin=None):
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as stop:
            main(["memory", verb, str(file), *map(str, args)])
        out = capsys.readouterr()
        assert stop.value.code == code, out
        assert "Traceback" not in out.err
        return out

    call("add", "Ann lives in Bern.", "--user", "ann", "--embedder", "hash")
    return call


def read(run, verb, *args, **options):
    return json.loads(run(verb, *args, "--user", "ann", "--json", **options).out)


def test_what_was_added_is_found_corrected_and_still_in_the_history(run):
    (hit,) = read(run, "search", "Where does Ann live?")
    assert set(hit) >= {
        "id", "text", "score", "metadata", "valid_from", "valid_to", "provenance",
    }  # fmt: skip
    assert hit["text"] == "Ann lives in Bern." and hit["valid_from"].endswith("+00:00")
    assert json.loads(run("search", "Ann", "--json").out) == []  # another space
    assert read(run, "update", hit["id"], "Ann lives in Basel.") == {"updated": [hit["id"]]}
    assert read(run, "search", "Ann")[0]["text"] == "Ann lives in Basel."
    assert [event["op"] for event in read(run, "history", hit["id"])] == ["add", "revise"]
    assert "Basel" in run("history", hit["id"], "--user", "ann").out
    past = read(run, "show", "--recorded", hit["recorded_at"])["memories"]
    assert [item["text"] for item in past] == ["Ann lives in Bern."]
    assert read(run, "delete", hit["id"], "--why", "moved away") == {"retired": [hit["id"]]}
    assert read(run, "search", "Ann") == []
    assert read(run, "history", hit["id"])[-1]["why"] == "moved away"
    assert read(run, "purge", hit["id"]) == {"purged": [hit["id"]]}
    assert all(event["after"] is None or "text" not in event["after"]
               for event in read(run, "history", hit["id"]))  # fmt: skip


def test_text_comes_from_arguments_pipes_and_lines_of_json(run, tmp_path):
    said = ["--speaker", "Ann", "--session", "s", "--when", "2024-05-08T13:56:00+02:00"]
    (one,) = read(run, "add", "-", *said, "--metadata", "mood=good", "--metadata", "stars=3",
                  stdin="I love\nsailing.")["ids"]  # fmt: skip
    item = read(run, "show", one)
    assert item["text"] == "I love\nsailing." and item["speaker"] == "Ann"
    assert item["metadata"] == {"mood": "good", "stars": 3}
    assert item["valid_from"] == "2024-05-08T11:56:00+00:00"
    lines = [{"role": "user", "content": f"Message {i}."} for i in range(150)]
    file = tmp_path / "talk.jsonl"
    file.write_text("\n\n".join(map(json.dumps, [*lines, "and a text"])))
    ids = read(run, "add", "--jsonl", file, "--session", "t")["ids"]
    assert len(ids) == 151
    # Given again, as after a kill, it stores nothing twice.
    assert read(run, "add", "--jsonl", file, "--session", "t")["ids"] == ids
    piped = file.read_text()
    assert read(run, "add", "--jsonl", "-", "--session", "t", stdin=piped)["ids"] == ids
    assert read(run, "stats")["memories"] == 153
    first = read(run, "show", "--session", "t", "--limit", 100)
    rest = read(run, "show", "--session", "t", "--after", first["next"], "--limit", 100)
    assert [item["id"] for item in first["memories"] + rest["memories"]] == ids
    assert rest["next"] is None
    out = run("show", "--user", "ann", "--limit", 2)
    assert len(out.out.splitlines()) == 3 and "more: --after" in out.err
    newest = read(run, "show", "--newest", "--limit", 1)
    assert newest["memories"][0]["text"] == "and a text"
    then = newest["memories"][0]["recorded_at"]
    for past in ([], ["--recorded", then]):
        page = ["--newest", "--limit", 2, "--after", newest["next"], *past]
        assert [m["text"] for m in read(run, "show", *page)["memories"]] == [
            "Message 149.", "Message 148.",
        ]  # fmt: skip
    found = read(run, "search", "sailing", "--filter", "stars=3", "--kind", "fact")
    assert [hit["id"] for hit in found] == [one]
    context = read(run, "context", "sailing", "--budget", 30)
    assert context["used"] <= 30 and "sailing" in context["text"]


def test_dry_runs_say_what_they_would_do_and_do_nothing(run, tmp_path):
    (item,) = read(run, "show")["memories"]
    before = read(run, "stats")
    for args, op in (
        (["add", "Ann has a cat."], "add"),
        (["add", "Ann lives in Bern."], "touch"),
        (["update", item["id"], "Ann lives in Rome."], "revise"),
        (["delete", item["id"]], "retire"),
        (["forget", item["id"]], "retire"),
        (["purge", item["id"]], "purge"),
    ):
        (would,) = read(run, *args, "--dry-run")["would"]
        assert would["op"] == op
    assert read(run, "forget", "--dry-run") == {"would": []}
    assert "would add" in run("add", "x", "--dry-run").out
    new = tmp_path / "new.memory"
    run("add", "x", "--dry-run", "--embedder", "hash", file=new)
    after = read(run, "stats")
    assert not new.exists() and after["events"] == before["events"]


def test_explain_shows_what_a_score_is_made_of_and_nothing_moves_the_cursor(run):
    run("add", "Ann said \x1b[2J hello\nand more", "--user", "ann", "--speaker", "E\x1bve")
    out = run("search", "hello", "--user", "ann", "--explain").out
    assert "\x1b" not in out and "\\x1b[2J hello\n        and more" in out
    assert "bm25" in out and "+1.000 ####" in out
    assert "\x1b" not in run("show", "--user", "ann").out + run("context", "hello").out


def test_spaces_go_through_files_and_backups(run, tmp_path):
    run("add", "Eve sails.", "--user", "eve", "--tenant", "t", "--agent", "a", "--run", "r")
    rows = json.loads(run("spaces", "--json").out)
    assert rows == [{"space": "ann", "memories": 1}, {"space": "t/eve/a/r", "memories": 1}]
    done = read(run, "export", tmp_path / "ann.jsonl")
    assert done["memory"] == 1 and done["digest"]
    other = tmp_path / "b.memory"
    hash_ = ["--embedder", "hash"]
    dry = read(run, "import", tmp_path / "ann.jsonl", "--dry-run", *hash_, file=other)
    assert dry["memory"] == 1 and dry["dry_run"] and not other.exists()
    assert read(run, "import", tmp_path / "ann.jsonl", *hash_, file=other)["memory"] == 1
    assert read(run, "import", tmp_path / "ann.jsonl", file=other)["memory"] == 0
    assert read(run, "search", "Bern", file=other)[0]["text"] == "Ann lives in Bern."
    copy = tmp_path / "copy.memory"
    assert read(run, "backup", copy)["bytes"] == copy.stat().st_size
    assert read(run, "stats", file=copy)["memories"] == 2
    assert "is there already" in run("backup", copy, code=2).err


def test_verify_exits_1_on_damage_and_reembed_mends_vectors(run, tmp_path):
    assert read(run, "verify")["ok"]
    connection = sqlite3.connect(tmp_path / "a.memory")
    connection.execute("DELETE FROM embedding")
    connection.commit()
    report = read(run, "verify", code=1)
    assert not report["ok"] and report["problems"][0]["kind"] == "vector"
    assert "1 problems" in run("verify", code=1).out
    assert read(run, "reembed")["encoded"] == 1
    assert read(run, "verify")["ok"]
    assert read(run, "reembed", "--embedder", "hash:32")["embedder"] == "hash:32"
    assert read(run, "stats")["embedder"] == "hash:32" and read(run, "search", "Bern")
    connection.execute("UPDATE memory SET text = 'lie'")
    connection.commit()
    connection.close()
    assert "text is 'lie', the log says 'Ann lives in Bern.'" in run("verify", code=1).out


def test_a_broken_file_is_one_line(run, tmp_path):
    run("add", "-", "--user", "ann", stdin="long " * 60_000)
    with Memory(tmp_path / "a.memory") as memory:
        memory.store.shred()
    blob = bytearray((tmp_path / "a.memory").read_bytes())
    for page in range(12, len(blob) // 4096):
        blob[page * 4096 : (page + 1) * 4096] = b"\xff" * 4096
    (tmp_path / "a.memory").write_bytes(blob)
    error = run("search", "Bern", "--user", "ann", code=1).err
    assert "cannot be used (database disk image is malformed)" in error and "verify" in error
    out = run("verify", code=1)
    assert out.out or "malformed" in out.err


@pytest.mark.parametrize(
    "args, message",
    [
        (["show", "m0"], "there is no memory m0 now in space ''"),
        (["history", "m0"], "there never was a memory m0"),
        (["delete", "m0"], "cannot retire m0"),
        (["purge", "m0"], "cannot purge m0"),
        (["update", "m0", "x"], "cannot update m0"),
        (["add"], "give a TEXT"),
        (["add", "x", "--jsonl", "y"], "give a TEXT"),
        (["add", " "], "has no text"),
        (["add", "x", "--when", "2024-05-08"], "--when '2024-05-08' has no time zone"),
        (["add", "x", "--when", "noon"], "--when 'noon' is no time; write it as 2024-"),
        (["add", "x", "--metadata", "y"], "--metadata y: write name=value"),
        (["add", "--jsonl", "/nowhere"], "cannot read /nowhere: No such file"),
        (["add", "x", "--llm", "http://x"], "--llm URL and --model NAME go together"),
        (["add", "x", "--policy", "hybri"], "unknown memory policy 'hybri'; nearest known: hybrid"),
        (["add", "x", "--option", "depth=3"], "unknown option of hybrid 'depth'"),
        (["add", "x", "--embedder", "mini"], "unknown embedder 'mini'"),
        (["add", "x", "--embedder", "hash:8"], "embedded by hash, not by hash:8"),
        (["add", "x", "--durability", "none"], "unknown durability 'none'"),
        (["search", ""], "the query is empty"),
        (["search", "x", "--limit", "0"], "Invalid value for '--limit'"),
        (["import", "/nowhere"], "there is no file /nowhere"),
        (["export", "/nowhere/x"], "no folder /nowhere"),
        (["serve", "--host", "0.0.0.0"], "lets other machines in; set a token"),
        (["serve", "--rate", "0"], "lets nobody in"),
    ],
)
def test_bad_use_is_one_message_and_exit_code_2(run, monkeypatch, args, message):
    monkeypatch.delenv("HOLDFAST_TOKEN", raising=False)
    out = run(*args, code=2)
    assert message in out.err and out.out == ""


def test_lines_that_are_no_messages_are_named(run, tmp_path):
    file = tmp_path / "lines"
    for lines, message in (
        ("{", "line 1 is not JSON"),
        ('{"content": "x"}\n\n[1]', "line 3 is a list"),
        ('{"role": "user"}', "has keys role and no text"),
    ):
        file.write_text(lines)
        assert message in run("add", "--jsonl", file, code=2).err


def test_input_that_is_no_text_is_refused(run, tmp_path):
    file = tmp_path / "lines"
    for bytes_ in (b"\xff", b'{"content": "a\\ud800"}'):
        file.write_bytes(bytes_)
        assert "is not text in UTF-8" in run("add", "--jsonl", file, code=2).err
    assert "is not text in UTF-8" in run("add", "a\udcff", code=2).err
    early = run("add", "x", "--when", "0001-01-01T00:00:00+10:00", code=2).err
    assert "not in the years 1 to 9999 in UTC" in early
    assert read(run, "stats")["memories"] == 1


def test_a_name_that_was_mistyped_makes_no_file(run, tmp_path):
    for verb in (["search", "x"], ["show"], ["stats"], ["verify"], ["forget"]):
        error = run(*verb, file=tmp_path / "typo", code=2).err
        assert "there is no memory" in error and "holdfast memory add" in error
    assert not (tmp_path / "typo").exists()


def test_policies_are_listed_with_what_they_are(capsys):
    with pytest.raises(SystemExit):
        main(["memory", "policies", "--json"])
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["hybrid"]["options"] == {} and rows["hybrid"]["traits"]["form"] == "turns"
    with pytest.raises(SystemExit):
        main(["memory", "policies"])
    assert "hybrid" in capsys.readouterr().out
