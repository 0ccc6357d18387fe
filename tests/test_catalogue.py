import hashlib
import json

import pytest

from holdfast import catalogue, checks
from holdfast.checks import docs
from holdfast.errors import UsageError


def test_all_210_systems_once():
    rows = catalogue.systems()
    assert [row.number for row in rows] == list(range(1, 211))
    assert len({row.key for row in rows}) == 210
    assert all(row.key.isidentifier() and row.key == row.key.lower() for row in rows)
    assert all(row.title and row.paper for row in rows)


def test_modules_live_in_their_room():
    for row in catalogue.systems():
        assert row.module.startswith(f"holdfast.{row.room}."), row
        assert row.module.split(".")[-1].isidentifier(), row


def test_fixed_keys():
    want = {
        192: ("adamw4", "holdfast.training.optim.adamw4"),
        65: ("qgalore", "holdfast.training.optim.qgalore"),
        177: ("peqa", "holdfast.training.adapters.peqa"),
        66: ("randlora", "holdfast.training.adapters.randlora"),
        172: ("memsave", "holdfast.training.saved.memsave"),
        180: ("fewbit", "holdfast.training.saved.fewbit"),
        160: ("recipes", "holdfast.training.recipes"),
    }
    for number, (key, module) in want.items():
        row = catalogue.find(number)
        assert (row.key, row.module) == (key, module)


def test_find_by_key_and_number():
    assert catalogue.find("065") is catalogue.find(65) is catalogue.find("qgalore")
    with pytest.raises(UsageError, match="unknown system 'qgalor'; nearest known: qgalore"):
        catalogue.find("qgalor")
    with pytest.raises(UsageError, match="unknown system '211'"):
        catalogue.find(211)


def test_core_checks_take_no_systems_key():
    assert not set(checks.core_names()) & set(catalogue.keys())


def test_bad_row_is_refused():
    row = catalogue.find("qgalore")
    with pytest.raises(UsageError, match=r"unknown status of system 65 'work'.*works"):
        catalogue.System(**(vars(row) | {"status": "work"}))


@pytest.mark.parametrize(
    "row", [row for row in catalogue.systems() if row.status == "works"], ids=lambda row: row.key
)
def test_works_is_earned(row):
    assert row.missing() == []


@pytest.fixture
def house(tmp_path, monkeypatch):
    """An empty package in which the row of qgalore has everything that `works` asks for."""
    package = tmp_path / "holdfast"
    monkeypatch.setattr(catalogue, "_PACKAGE", package)
    monkeypatch.setattr(catalogue, "RECORDS", package / "checks" / "records")
    row = catalogue.System(**(vars(catalogue.find("qgalore")) | {"status": "works"}))
    monkeypatch.setattr(catalogue, "systems", lambda: [row])
    for path in (row.module_path, row.test_path, row.check_path, row.record_path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    hashes = dict.fromkeys(("module", "check"), hashlib.sha256(b"").hexdigest())
    row.record_path.write_text(json.dumps({"passed": True, "sha256": hashes}))
    return row


def test_complete_row_may_work(house):
    assert house.missing() == []


@pytest.mark.parametrize("what", ["module", "test", "check"])
def test_missing_file_refuses_works(house, what):
    getattr(house, f"{what}_path").unlink()
    assert [reason.split(":")[0] for reason in house.missing()] == [
        {"module": "no module", "test": "no tests", "check": "no check"}[what]
    ]


def test_missing_record_refuses_works(house):
    house.record_path.unlink()
    assert house.missing() == ["no record: run `holdfast check qgalore --write`"]


@pytest.mark.parametrize("what", ["module", "check"])
def test_changed_source_refuses_works(house, what):
    getattr(house, f"{what}_path").write_text("# changed")
    assert house.missing() == ["its record is stale: run `holdfast check qgalore --write`"]


def test_failed_record_refuses_works(house):
    record = json.loads(house.record_path.read_text())
    house.record_path.write_text(json.dumps(record | {"passed": False}))
    assert house.missing() == ["its recorded check failed"]


def test_records_belong_to_checks():
    assert {path.stem for path in catalogue.RECORDS.glob("*.json")} <= set(checks.available())


@pytest.mark.parametrize("name", checks.core_names())
def test_core_records_are_fresh(name):
    record = catalogue.read_record(name)
    if record is None:
        pytest.skip(f"{name} has no record; run `holdfast check {name} --write`")
    assert record["passed"] and record["sha256"] == catalogue.source_hashes(name)


def test_docs_show_what_works(house):
    record = {
        "system": "qgalore",
        "claim": "keeps less",
        "measured": {"bytes": 1024},
        "baseline": {"bytes": 4096},
        "threshold": "bytes <= 0.5 x baseline",
        "passed": True,
        "seconds": 2.0,
        "peak_bytes": 1 << 20,
        "seed": 0,
        "machine": {"cpu": "abacus", "cores": 2, "torch": "2.13.0", "python": "3.11"},
    }
    house.record_path.write_text(json.dumps(record))
    page = docs.generate()
    assert "1 of 1 work." in page and "| 065 | `qgalore` | Q-GaLore | system | works |" in page
    assert "keeps less. Passed: bytes 1,024; baseline: bytes 4,096;" in page


def test_docs_page_is_generated():
    assert docs.PATH.read_text(encoding="utf-8") == docs.generate(), (
        "docs/systems.md is stale; run `holdfast check KEY --write`"
    )
