import json
import random
import re

import pytest

from holdfast import cli
from holdfast.cli import probe
from holdfast.cli.progress import bar


def run_cli(*args):
    with pytest.raises(SystemExit) as exit_:
        cli.main(list(args))
    return exit_.value.code


@pytest.fixture
def news(tmp_path):
    """Two classes whose evidence lies behind stop words."""
    rng = random.Random(0)
    for name, word in (("birds", "wing"), ("fish", "fin")):
        (tmp_path / "news" / name).mkdir(parents=True)
        for i in range(40):
            text = " ".join(rng.choices(["the", "of", "and"], k=12)) + f" {word} x{i}"
            (tmp_path / "news" / name / f"{i}.txt").write_text(text)
    return tmp_path / "news"


def test_data_pruning_prints_the_ways_and_json(capsys):
    arguments = ("probe", "data-pruning", "--examples", "2000", "--seeds", "1", "--keep", "0.05")
    assert run_cli(*arguments) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^0\.05 +hardest +0\.[0-4]", shown, re.M)
    assert re.search(r"^0\.05 +random +0\.[78]", shown, re.M)
    assert run_cli(*arguments, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["probe"] == "data-pruning" and found["examples"] == 2000
    ways = {row["way"]: row["accuracy"] for row in found["rows"]}
    assert len(ways) == len(found["rows"]) == 6 and ways["hardest"] < 0.5 < ways["calibrated 0.1"]


def test_shrink_compares_lengths(news, capsys):
    arguments = ("probe", "shrink", "--data", str(news), "--lengths", "16,4", "--epochs", "6")
    assert run_cli(*arguments, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["train"], found["test"], found["classes"]) == (60, 20, ["birds", "fish"])
    rows = {(row["length"], row["text"]): row for row in found["rows"]}
    assert len(rows) == 4 and found["search"] is None
    assert rows[4, "shortened"]["words_seen"] == 1 and rows[4, "as it is"]["words_seen"] < 0.4
    assert rows[4, "shortened"]["accuracy"] > rows[4, "as it is"]["accuracy"] + 0.2
    assert rows[4, "shortened"]["saved_bytes"] < rows[16, "shortened"]["saved_bytes"]


def test_shrink_searches_and_resumes(news, tmp_path, capsys, monkeypatch):
    from holdfast.training.reduction import classify

    calls = []

    def accuracy(train, test, setting, *_):
        calls.append(setting)
        return 0.5 + 0.1 * (setting.lr == 5e-3) - 0.01 * setting.length

    monkeypatch.setattr(classify, "accuracy", accuracy)
    log = tmp_path / "log.json"
    arguments = ("probe", "shrink", "--data", str(news), "--lengths", "16,4", "--search", str(log))
    assert run_cli(*arguments) == 0
    shown = capsys.readouterr().out
    assert "best of 21 searched runs: {'lr': 0.005" in shown and "'length': 4" in shown
    assert len(calls) == 4 + 21 + 1
    assert run_cli(*arguments) == 0
    assert len(calls) == 4 + 21 + 1 + 4 + 1  # the log's runs are not repeated


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("data-pruning", "--keep", "much"), "--keep 'much': expected positive numbers"),
        (("data-pruning", "--keep", "2"), "keep=2.0 of 20000 examples"),
        (("data-pruning", "--seeds", "0"), "--seeds 0 must be at least 1"),
        (("shrink", "--data", "nowhere"), "one folder per class"),
        (("shrink", "--data", "nowhere", "--lengths", "12,x"), "expected positive whole numbers"),
        (("shrink", "--data", "nowhere", "--held-out", "1"), "--held-out 1.0 must be in"),
    ],
)
def test_bad_input_exits_2(arguments, message, capsys):
    assert run_cli("probe", *arguments) == 2
    assert message in capsys.readouterr().err


def test_every_probe_is_a_command_with_an_example(capsys):
    for name in probe.PROBES:
        assert run_cli("probe", name, "--help") == 0
        assert f"Example: holdfast probe {name}" in capsys.readouterr().out


def test_the_bar_counts(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with bar("counting", 2) as advance:
        advance()
        advance()
    assert "2/2" in capsys.readouterr().err
