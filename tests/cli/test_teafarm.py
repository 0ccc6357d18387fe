import json

import pytest

from holdfast import cli


def run_cli(*args):
    with pytest.raises(SystemExit) as exit_:
        cli.main(list(args))
    return exit_.value.code


def test_prints_a_line_per_policy_and_json(capsys):
    given = ("probe", "teafarm", "--policies", "theanine,keep_updated", "--worlds", "1")
    assert run_cli(*given) == 0
    assert "theanine" in capsys.readouterr().out
    assert run_cli(*given, "--budget", "100", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["probe"] == "teafarm" and found["questions"] == 24 and found["budget"] == 100
    shares = {row["policy"]: row["refuted"] for row in found["rows"]}
    assert shares["theanine"] > shares["keep_updated"] <= 0.5


def test_what_it_refuses(capsys):
    for given, message in (
        (("--policies", "nope"), "unknown memory policy 'nope'"),
        (("--policies", ","), "must name one"),
        (("--budget", "0"), "--budget 0"),
        (("--embedder", "nope"), "unknown embedder 'nope'"),
    ):
        assert run_cli("probe", "teafarm", *given) == 2
        assert message in capsys.readouterr().err
