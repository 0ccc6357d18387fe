import json
import math
import os

import pytest
import torch

from holdfast import catalogue, checks
from holdfast.checks import Result, docs, tinylm
from holdfast.cli import main
from holdfast.errors import UsageError
from holdfast.files import write_text


def run_cli(*args):
    with pytest.raises(SystemExit) as exit_:
        main(list(args))
    return exit_.value.code


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    """Checks `good`, `bad` and `broken`, with records and docs in a temporary folder."""

    def good(seed, full=False):
        print("noise from a library")
        return Result.ratio(3.0 + seed + 10 * full, 2.0, at_least=1.5, floor=1, name="score")

    def bad(seed):
        return Result({"loss": torch.tensor(float("nan"))}, {"loss": 1.0}, "loss <= 1", False)

    def broken(seed):
        raise RuntimeError("no luck")

    known = {}
    monkeypatch.setattr(checks, "_checks", known)
    for run in (good, bad, broken):
        checks.check(run.__name__, claim=f"is {run.__name__}")(run)
    monkeypatch.setattr(checks, "load", known.__getitem__)
    monkeypatch.setattr(checks, "available", lambda: list(known))
    monkeypatch.setattr(catalogue, "RECORDS", tmp_path / "records")
    monkeypatch.setattr(catalogue, "source_hashes", lambda key: {"check": "0" * 64})
    monkeypatch.setattr(docs, "PATH", tmp_path / "systems.md")
    return tmp_path


def test_ratio_at_least():
    assert Result.ratio(3, 2, at_least=1.5).passed
    assert not Result.ratio(2.9, 2, at_least=1.5).passed
    assert Result.ratio(3, 2, at_least=1.5, name="recall").measured == {"recall": 3, "ratio": 1.5}


def test_ratio_at_most():
    assert Result.ratio(1, 2, at_most=0.5).passed
    assert not Result.ratio(1.1, 2, at_most=0.5).passed
    assert Result.ratio(1, 2, at_most=0.5).threshold == "value <= 0.5 x baseline"


@pytest.mark.parametrize("bound", [{"at_least": 1.5}, {"at_most": 0.5}])
def test_ratio_to_nothing_fails_without_a_floor(bound):
    assert not Result.ratio(0, 0, **bound).passed


def test_ratio_floor_is_for_the_larger_side():
    assert not Result.ratio(0.4, 0.1, at_least=1.5, floor=0.5).passed
    assert Result.ratio(0.5, 0.0, at_least=1.5, floor=0.5).passed
    assert not Result.ratio(1, 9, at_most=0.5, floor=10).passed


def test_ratio_of_nan_fails():
    assert not Result.ratio(float("nan"), 1, at_least=0).passed
    assert not Result.ratio(float("nan"), 1, at_most=9).passed


def test_ratio_of_what_diverged_fails():
    assert not Result.ratio(math.inf, 1, at_least=2).passed
    assert not Result.ratio(1, math.inf, at_most=2).passed


def test_ratio_misuse():
    with pytest.raises(ValueError, match="one of at_least and at_most"):
        Result.ratio(1, 1)
    with pytest.raises(ValueError, match="ratio of -1 to 1 means nothing"):
        Result.ratio(-1, 1, at_least=1)


def test_run_check_keys(sandbox):
    result = checks.run_check("good", seed=2)
    keys = "system claim measured baseline threshold passed seconds peak_bytes seed machine"
    assert list(result) == keys.split()
    assert result["measured"] == {"score": 5.0, "ratio": 2.5}
    assert result["passed"] is True and result["seed"] == 2
    assert set(result["machine"]) == {"cpu", "cores", "torch", "python"}


def test_full_reaches_checks_that_take_it(sandbox):
    assert checks.run_check("good", full=True)["measured"]["score"] == 13.0
    assert checks.run_check("bad", full=True)["passed"] is False


def test_tensors_and_nan_become_json(sandbox):
    assert checks.run_check("bad")["measured"] == {"loss": None}


def test_peak_rss_sees_an_allocation():
    with checks.PeakRss() as rss:
        block = torch.ones(64 << 20, dtype=torch.uint8)
        del block
    assert 60 << 20 <= rss.increase <= 160 << 20


def test_json_of_one_and_of_several(sandbox, capsys):
    assert run_cli("check", "good", "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["system"] == "good"
    assert "noise from a library" in err
    assert run_cli("check", "good", "bad", "--json") == 1
    assert [r["passed"] for r in json.loads(capsys.readouterr().out)] == [True, False]


def test_a_check_that_raises_fails_and_the_rest_run(sandbox, capsys):
    assert run_cli("check", "broken", "good", "--json") == 1
    out, err = capsys.readouterr()
    broken, good = json.loads(out)
    assert broken["error"] == "RuntimeError: no luck" and not broken["passed"]
    assert set(broken) == set(good) | {"error"}
    assert good["passed"] and "Traceback" in err


def test_write_stores_records_and_regenerates_docs(sandbox, capsys):
    assert run_cli("check", "good", "--write") == 0
    record = catalogue.read_record("good")
    assert record["sha256"] == {"check": "0" * 64} and record["measured"]["score"] == 3.0
    assert docs.PATH.read_text() == docs.generate()
    assert run_cli("check", "--all", "--write") == 1
    assert sorted(path.name for path in catalogue.RECORDS.iterdir()) == ["bad.json", "good.json"]


def test_write_outside_a_checkout_leaves_docs_alone(sandbox, monkeypatch, capsys):
    monkeypatch.setattr(docs, "PATH", sandbox / "nowhere" / "systems.md")
    assert run_cli("check", "good", "--write") == 0
    assert "source checkout: not written" in capsys.readouterr().err
    assert catalogue.read_record("good")["passed"] and not docs.PATH.exists()


def test_failed_write_keeps_the_old_record(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["record.json"]


def test_usage(capsys):
    assert run_cli("check") == 2
    assert "name the checks to run, or --all" in capsys.readouterr().err
    assert run_cli("check", "qgalor") == 2
    assert "unknown check 'qgalor'; nearest known: qgalore" in capsys.readouterr().err


def test_planned_system_has_no_check_yet():
    with pytest.raises(UsageError, match="PIFuHD has no check yet: it is planned"):
        checks.load("pifuhd")


def test_every_check_loads_and_claims():
    for key in checks.available():
        found = checks.load(key)
        assert found.key == key and found.claim and not found.claim.endswith("."), key


def test_tinylm_corpus():
    train, val = tinylm.corpus()
    assert len(tinylm.FILES) == len(set(tinylm.FILES)) == 120
    assert train.dtype == torch.int64 and int(train.max()) < 128
    assert 0.03 < len(val) / (len(train) + len(val)) < 0.07
    assert bytes(train[:40].tolist()).isascii()
    assert len(tinylm.corpus_hash()) == 64


def test_tinylm_batches_are_seeded_windows():
    tokens = torch.arange(1000)
    first = list(tinylm.batches(tokens, 3, seed=1, batch=2, length=8))
    assert [b.shape for b in first] == [(2, 8)] * 3
    assert all((b.diff(dim=1) == 1).all() for b in first)
    again = tinylm.batches(tokens, 3, seed=1, batch=2, length=8)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(UsageError, match="5 tokens are fewer than one window of 8"):
        next(tinylm.batches(tokens[:5], 1, seed=0, length=8))


def test_tinylm_model_leaves_the_random_state():
    before = torch.get_rng_state()
    one, two = tinylm.model(seed=3), tinylm.model(seed=3, num_hidden_layers=1)
    assert torch.equal(before, torch.get_rng_state())
    assert len(two.model.layers) == 1 and sum(p.numel() for p in one.parameters()) == 117_056


def test_tinylm_train_reports_steps():
    model, seen = tinylm.model(), []
    optimizer = torch.optim.Adam(model.parameters(), lr=tinylm.LR)
    losses = tinylm.train(model, optimizer, steps=3, on_step=lambda *step: seen.append(step))
    assert seen == list(enumerate(losses)) and losses[2] < losses[0]


def test_tinylm_trained_is_cached(monkeypatch):
    first = tinylm.trained()
    monkeypatch.setattr(tinylm, "train", lambda *a, **k: pytest.fail("trained again"))
    second = tinylm.trained()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert tinylm.evaluate(second) == pytest.approx(2.26, abs=0.06)
