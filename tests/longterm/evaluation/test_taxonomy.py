import json

import pytest

from holdfast.cli import main
from holdfast.errors import UsageError
from holdfast.longterm.evaluation import taxonomy
from holdfast.longterm.policy import CONFLICTS, FORMS, PROCESSES, TYPES, policies

POLICIES = ["hybrid", "keep_updated"]


@pytest.fixture(scope="module")
def rows():
    return {row["policy"]: row for row in taxonomy.rows(POLICIES)}


def test_every_policy_declares_its_own_traits_in_full():
    assert taxonomy.SOURCES.keys() == set(FORMS)
    for name, cls in policies().items():
        traits = cls.traits
        # The default's are the base class's; every other policy says what it is.
        assert name == "hybrid" or "traits" in vars(cls), f"{name} declares no traits"
        assert traits.types and set(traits.types) <= set(TYPES)
        assert traits.processes and set(traits.processes) <= set(PROCESSES)
        assert traits.conflict in CONFLICTS
        assert "forget" in traits.processes or not traits.forgets


def test_costs_are_measured(rows):
    plain, digest = rows["hybrid"], rows["keep_updated"]
    assert plain["provenance"] is None and digest["provenance"] == 100
    assert plain["source"] == "explicit memory" and digest["source"] == "knowledge base"
    assert plain["update_events"] == 1
    assert digest["bytes_per_turn"] > plain["bytes_per_turn"] > 1000  # turns and facts; vectors
    assert all(row[name] > 0 for row in rows.values() for name in ("update_ms", "search_ms"))


def test_markdown_has_a_row_for_each(rows):
    head, rule, *lines = taxonomy.markdown(list(rows.values())).splitlines()
    assert head.startswith("| policy | types | form |") and set(rule) == {"|", "-", " "}
    assert [line.split(" | ")[0].strip("| ") for line in lines] == POLICIES
    assert {line.count("|") for line in (head, rule, *lines)} == {len(taxonomy.HEADS) + 1}


def test_an_unknown_policy_is_refused():
    with pytest.raises(UsageError, match=r"memory policy 'hybird'.*hybrid"):
        taxonomy.rows(["hybird"])


@pytest.mark.parametrize("option", [[], ["--md"], ["--json"], ["--md", "--json"]])
def test_the_command(option, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["memory", "table", "--policy", "hybrid", *option])
    shown = capsys.readouterr()
    if len(option) == 2:
        assert stop.value.code == 2 and "exclude each other" in shown.err
        return
    assert stop.value.code == 0 and "hybrid" in shown.out
    if option == ["--json"]:
        (row,) = json.loads(shown.out)
        assert row["types"] == ["episodic"] and row["forgets"] is False
