import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from holdfast import catalogue, cli
from holdfast.cli import systems

ROOT = Path(__file__).parents[2]


def run_cli(*args):
    with pytest.raises(SystemExit) as exit_:
        cli.main(list(args))
    return exit_.value.code


def test_json_rows(capsys):
    assert run_cli("systems", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 210
    assert set(rows[0]) == {"number", "key", "title", "room", "kind", "module", "status"}


def test_filters(capsys):
    assert run_cli("systems", "--room", "parallel", "--status", "planned", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    want = [
        row.key for row in catalogue.systems() if row.room == "parallel" and row.status == "planned"
    ]
    assert [row["key"] for row in rows] == want


def test_table_lists_every_row_with_brackets_intact(capsys):
    assert run_cli("systems") == 0
    out = capsys.readouterr().out
    assert all(f"{row.number:03d}  {row.key}" in out for row in catalogue.systems())
    assert "210 systems:" in out


def test_planned_card_says_so(capsys):
    assert run_cli("systems", "155") == 0
    out = capsys.readouterr().out
    assert "155 Endor (endor)" in out
    assert "Planned: not part of this version. It will live in holdfast.weights.endor." in out


@pytest.mark.parametrize(
    "args, message",
    [
        (["--room", "weight"], "unknown room 'weight'; nearest known: weights"),
        (["--status", "done"], "unknown status 'done'; nearest known: planned, works"),
        (["qgalor"], "unknown system 'qgalor'; nearest known: qgalore"),
        (["endor", "--room", "weights"], "KEY already names one system"),
        (["--bogus"], "No such option"),
    ],
)
def test_bad_usage_exits_2_on_stderr(args, message, capsys):
    assert run_cli("systems", *args) == 2
    out, err = capsys.readouterr()
    assert message in err and out == "" and "Traceback" not in err


MODULE = '''"""Toy (000): keeps little.

Keeps    nothing.
"""
import not_installed_anywhere
from dataclasses import dataclass

class Toy(Base):
    """A toy."""
    def __init__(self, params, *, rank: int = 4):
        pass

@dataclass(frozen=True)
class Options:
    bits: int = 4

def apply(model: "Module", lr=0.1) -> None:
    pass

def _hidden():
    pass
'''


def test_card_reads_the_module_without_importing_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(catalogue, "_PACKAGE", tmp_path)
    row = catalogue.find("endor")
    row.module_path.parent.mkdir(parents=True)
    row.module_path.write_text(MODULE)
    card = systems.describe(row)
    assert card["doc"].splitlines()[-1] == "Keeps    nothing."
    assert card["public"] == [
        "Toy(params, *, rank: int=4)",
        "Options(bits: int = 4)",
        "apply(model: 'Module', lr=0.1) -> None",
    ]
    assert run_cli("systems", "endor") == 0
    assert "Toy(params, *, rank: int=4)" in capsys.readouterr().out


def test_card_shows_the_record(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(catalogue, "RECORDS", tmp_path)
    record = {
        "passed": True,
        "claim": "is small",
        "measured": {"bytes": 1234567, "ratio": 0.25},
        "baseline": {"bytes": 4938268},
        "threshold": "bytes <= 0.3 x baseline",
        "seconds": 1.5,
        "machine": {"cpu": "abacus"},
        "seed": 0,
    }
    (tmp_path / "endor.json").write_text(json.dumps(record))
    assert run_cli("systems", "endor") == 0
    out = capsys.readouterr().out
    assert "Check passed: is small" in out and "bytes 1,234,567, ratio 0.25" in out


def test_catalogue_answers_without_torch():
    program = (
        "import sys, holdfast.cli as cli\n"
        "try: cli.main(['systems', '--json'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert len(json.loads(run.stdout)) == 210 and run.stderr.strip() == "[]"


def verbs():
    """Every command line that has a help page: verbs, and verbs under nouns."""

    def walk(command, path):
        below_it = getattr(command, "commands", {})
        yield path, bool(below_it)
        for name, below in below_it.items():
            yield from walk(below, [*path, name])

    group = cli.group()
    for verb in cli.COMMANDS:
        yield from walk(group.get_command(None, verb), [verb])


@pytest.mark.parametrize("path, is_noun", list(verbs()), ids=str)
def test_help_has_an_example(path, is_noun, capsys):
    assert run_cli(*path, "--help") == 0
    wanted = r"Commands:\n" if is_noun else rf"Example:\s+holdfast {' '.join(path)}\b"
    assert re.search(wanted, capsys.readouterr().out)


def test_help_lists_every_verb_with_one_whole_line(capsys):
    assert run_cli("--help") == 0
    out = capsys.readouterr().out
    lines = out[out.index("Commands:") :].splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(cli.COMMANDS)
    assert all(line.endswith(".") and not line.endswith("...") for line in lines), out


def test_unknown_command(capsys):
    assert run_cli("system") == 2
    assert "unknown command 'system'; nearest known: systems" in capsys.readouterr().err


def test_interrupt_exits_130(monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(catalogue, "systems", interrupted)
    assert run_cli("systems") == 130


def test_python_m_holdfast():
    run = subprocess.run(
        [sys.executable, "-m", "holdfast", "--version"], capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 0 and run.stdout.startswith("holdfast ")
