import json

import pytest
import typer
from typer.testing import CliRunner

from holdfast.cli.place import place
from holdfast.errors import DoesNotFit, UsageError
from holdfast.plan.pack import parse_csv, validate
from holdfast.plan.placement_program import Program

BUFFERS = "id,lower,upper,size\nb1,0,3,4\nb2,3,9,4\nb3,0,9,4\nb4,9,21,4\nb5,0,21,4\n"


def run_cli(*args):
    app = typer.Typer(rich_markup_mode=None)
    app.command()(place)
    result = CliRunner().invoke(app, list(map(str, args)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def buffers(tmp_path):
    path = tmp_path / "buffers.csv"
    path.write_text(BUFFERS)
    return path


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.csv"
    path.write_text(Program.generate(2).to_csv())
    return path


def test_buffers_are_printed_with_offsets(buffers):
    result = run_cli(buffers, "--capacity", "12")
    assert result.exit_code == 0
    found, offsets = parse_csv(result.stdout)
    assert validate(found, offsets, 12) == 12


@pytest.mark.parametrize("method", ["portfolio", "exact", "greedy"])
def test_buffers_as_json(buffers, method):
    found = json.loads(run_cli(buffers, "--capacity", "1KiB", "--method", method, "--json").stdout)
    assert found["kind"] == "packing" and found["height_bytes"] == 12 and found["optimal"]
    assert found["lower_bound_bytes"] == 12
    assert sorted(found["offsets"]) == ["b1", "b2", "b3", "b4", "b5"]


def test_buffers_that_do_not_fit_name_what_they_need(buffers):
    with pytest.raises(DoesNotFit, match=r"do not fit 11 bytes.*at least 12"):
        run_cli(buffers, "--capacity", "11")
    with pytest.raises(DoesNotFit, match="best-fit needs 12 bytes, capacity is 8"):
        run_cli(buffers, "--capacity", "8", "--method", "greedy")


def test_a_program_is_placed_beside_greedy_and_the_bound(program):
    found = json.loads(run_cli(program, "--capacity", "256KiB", "--json").stdout)
    assert found["kind"] == "placement" and found["optimal"] and found["method"] == "exact"
    assert found["bound_ns"] == found["total_ns"] <= found["greedy_ns"] < found["slow_ns"]
    assert found["height_bytes"] <= 256 * 1024 and found["residencies"]
    assert found["hardware"]["capacity"] == 256 * 1024
    text = run_cli(program, "--capacity", "256KiB").stdout
    assert f"{found['total_ns']} ns (optimal, proven; learning skipped)" in text
    assert f"greedy {found['greedy_ns']} ns" in text
    assert len(text.splitlines()) == 4 + len(found["residencies"])


def test_other_methods_stand_beside_the_exact_optimum(program):
    args = (program, "--capacity", "512KiB", "--method", "greedy")
    found = json.loads(run_cli(*args, "--json").stdout)
    assert found["total_ns"] == found["greedy_ns"] > found["exact_ns"] == found["bound_ns"]
    assert not found["optimal"]
    gap = found["total_ns"] / found["bound_ns"] - 1
    text = run_cli(*args).stdout
    assert text.startswith(f"greedy: {found['total_ns']} ns ({gap:.2%} above the bound)\n")
    assert f"exact {found['exact_ns']} ns" in text


def test_bad_input_is_said(program, buffers, tmp_path):
    with pytest.raises(UsageError, match=r"absent.csv cannot be read"):
        run_cli(tmp_path / "absent.csv", "--capacity", "1")
    with pytest.raises(UsageError, match=r"unknown method 'exakt'.*exact"):
        run_cli(program, "--capacity", "1", "--method", "exakt")
    with pytest.raises(UsageError, match="unknown method for buffers 'muzero'"):
        run_cli(buffers, "--capacity", "1", "--method", "muzero")
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(UsageError, match="has columns a, b; a packing problem has"):
        run_cli(other, "--capacity", "1")


def test_help_ends_with_an_example():
    assert "holdfast plan place buffers.csv --capacity 1MiB" in run_cli("--help").stdout
