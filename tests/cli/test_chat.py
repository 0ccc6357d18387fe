"""`holdfast chat` and `holdfast cache` from the command line."""

import json
import sys
from types import SimpleNamespace

import pytest

from holdfast.cli import main
from holdfast.context.cache.conformance import model
from holdfast.training.tokenizers import byte_tokenizer


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model directory with a tokenizer, and text."""
    folder = tmp_path_factory.mktemp("small")
    model(vocab_size=264).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "corpus.txt").write_text("She sells sea shells by the sea shore. " * 60)
    return folder


def run(capsys, *args, code=0):
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    out = capsys.readouterr()
    assert stop.value.code == code, out.err
    return out


def test_prompts_answered_in_a_budget_saved_and_gone_on_with(small, tmp_path, capsys):
    options = ["--context-budget", "24KiB", "--temperature", "0", "--max-tokens", "6", "--json"]
    say = ["--prompt", "hello there", "--prompt", "and again"]
    document = json.loads(
        run(capsys, "chat", small, *options, *say, "--save", tmp_path / "talk").out
    )
    context = document["context"]
    assert [turn["prompt"] for turn in document["turns"]] == ["hello there", "and again"]
    assert context["peak_bytes"] <= context["budget_bytes"] == 24 * 1024
    assert 0 < context["kept_tokens"] <= context["capacity"]
    again = json.loads(
        run(capsys, "chat", small, *options, "--load", tmp_path / "talk", "--prompt", "x").out
    )
    assert again["context"]["read_tokens"] > context["read_tokens"]


def test_lines_of_a_pipe_are_turns_and_commands(small, tmp_path, capsys, monkeypatch):
    talk = tmp_path / "talk"
    typed = ["hi", "", "/bytes", f"/save {talk}", "/reset", f"/load {talk}", "/nothing", "/help"]
    lines = iter([f"{line}\n" for line in (*typed, "/exit", "no")])
    pipe = SimpleNamespace(isatty=lambda: False, readline=lambda: next(lines, ""))
    monkeypatch.setattr(sys, "stdin", pipe)
    out = run(capsys, "chat", small, "--context-budget", "1MiB", "--max-tokens", "3")
    assert "kept_tokens" in out.out and "/save FILE" in out.out
    assert "unknown command '/nothing'" in out.err
    assert talk.exists() and list(lines) == ["no\n"]


def test_bad_use_says_what_to_do(small, capsys):
    say = ["--prompt", "x"]
    assert "raise it" in run(capsys, "chat", small, "--context-budget", "1KiB", *say, code=3).err
    wrong = run(capsys, "chat", small, "--policy", "sinks", *say, code=2).err
    assert "unknown cache policy 'sinks'" in wrong and "sinks_recent" in wrong
    wrong = run(capsys, "chat", small, "--option", "sink=3", *say, code=2).err
    assert "unknown option of sinks_recent 'sink'" in wrong
    wrong = run(capsys, "chat", small, "--option", "3", *say, code=2).err
    assert "write name=value" in wrong
    assert "unknown form" in run(capsys, "chat", small, "--form", "int5", *say, code=2).err
    assert "does not open as a causal" in run(capsys, "chat", "/nowhere", *say, code=2).err


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_stored_forms_hold_more_tokens_in_the_same_bytes(small, capsys, form):
    options = ["--context-budget", "32KiB", "--max-tokens", "2", "--prompt", "x", "--json"]
    dense, less = (
        json.loads(run(capsys, "chat", small, "--form", name, *options).out)["context"]
        for name in ("dense", form)
    )
    assert less["capacity"] > 1.5 * dense["capacity"]


def test_compare_measures_every_policy_and_resumes(small, tmp_path, capsys):
    args = ["cache", "compare", small, "--data", small / "corpus.txt", "--budgets", "16KiB,64KiB",
            "--tokens", "256", "--texts", "2", "--policy", "sinks_recent", "--policy", "random",
            "--form", "dense,int8", "--out", tmp_path, "--json"]  # fmt: skip
    first = run(capsys, *args)
    document = json.loads(first.out)
    rows = document["rows"]
    assert len(rows) == 1 + 2 * 2 * 2 and rows[0]["policy"] == "full"
    for row in rows[1:]:
        assert row["peak_bytes"] <= row["budget_bytes"]
        assert row["perplexity"] > 1 and 0 <= row["recall"] <= 1
    roomy = [r for r in rows if r["budget_bytes"] == 64 * 1024 and r["policy"] == "sinks_recent"]
    assert len(roomy) == 2 and roomy[1]["capacity"] > roomy[0]["capacity"]
    again = run(capsys, *args)
    assert "full dense" in first.err and "full dense" not in again.err
    assert json.loads(again.out) == document
    assert (tmp_path / "compare.md").read_text().count("\n") == 2 + len(rows)
    assert (tmp_path / "compare.png").stat().st_size > 1000


def test_compare_refuses_too_little_text(small, tmp_path, capsys):
    out = run(capsys, "cache", "compare", small, "--data", small / "corpus.txt", "--budgets",
              "64KiB", "--tokens", "99999", "--out", tmp_path, code=2)  # fmt: skip
    assert "add data, or lower --tokens" in out.err


def test_policies_are_listed_with_their_options(capsys):
    rows = {row["name"]: row for row in json.loads(run(capsys, "cache", "policies", "--json").out)}
    assert rows["sinks_recent"]["options"] == {"sinks": 4}
    assert "sinks=4" in run(capsys, "cache", "policies").out
