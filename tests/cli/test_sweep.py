import json
import subprocess
import sys

import pytest
import torch
import typer

from holdfast.cli.sweep import sweep
from holdfast.errors import DoesNotFit, UsageError
from holdfast.plan.profile import Profile

FIELDS = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(autouse=True)
def traced_once(monkeypatch):
    """All tests sweep one model."""
    from holdfast.plan import vtrain

    made = vtrain.StepGraph

    def once(source, *shape):
        key = (source.fingerprint(), *shape)
        if key not in graphs:
            graphs[key] = made(source, *shape)
        return graphs[key]

    monkeypatch.setattr(vtrain, "StepGraph", once)


graphs: dict = {}


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(FIELDS))
    return str(path)


def call(model, **changes):
    options = {
        "devices": 2, "batch": 2, "sequence": 8, "dtype": "float32", "budget": None,
        "hardware": "l4-24gb", "profile": None, "price": 1.5, "steps": 100, "top": 3, "json": True,
    }  # fmt: skip
    sweep(model, **(options | changes))


def test_one_document_with_every_plan_by_time_and_price(model, capsys):
    call(model)
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["fits"] and found["times"] == "the roofline of l4-24gb"
    assert "replaying t=1 d=2 p=1 micro=1" in printed.err
    rows = found["plans"]
    times = [row["step_seconds"] for row in rows]
    assert times == sorted(times)
    kinds = {(row["t"], row["d"], row["p"], row["micro"], row["recompute"]) for row in rows}
    # d=2 takes micro-batches of 1; p=2 and t=2 also of 2.
    assert len(kinds) == len(rows) == 2 * (1 + 2 + 2)
    first = rows[0]
    assert first["hours"] == pytest.approx(100 * times[0] / 3600)
    assert first["cost"] == pytest.approx(first["hours"] * 2 * 1.5)
    assert first["tokens_per_second"] == pytest.approx(2 * 8 / times[0])


def test_what_does_not_fit_exits_3_with_the_smallest_budget(model, capsys):
    with pytest.raises(typer.Exit) as exit_:
        call(model, budget="1KiB")
    assert exit_.value.exit_code == 3
    rows = json.loads(capsys.readouterr().out)["plans"]
    least = min(row["peak_bytes"] for row in rows)
    with pytest.raises(DoesNotFit, match=f"no plan fits.*--budget {least}"):
        call(model, budget="1KiB", json=False)
    shown = capsys.readouterr().out.splitlines()
    assert shown[1].split()[:3] == ["fits", "plan", "s/step"] and len(shown) == 2 + 3
    call(model, budget=str(least), json=False, top=1)
    assert capsys.readouterr().out.splitlines()[2].startswith("yes")


def test_a_profile_is_made_once_and_read_again(model, tmp_path, capsys):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        path = tmp_path / "profile.json"
        one = {"devices": 1, "batch": 1, "profile": path, "hardware": "cpu-2core"}
        call(model, **one)
        first = capsys.readouterr()
        assert "measured" in first.err
        kept = Profile.load(path)
        call(model, **one)
        second = capsys.readouterr()
        assert "measured" not in second.err and Profile.load(path) == kept
        assert json.loads(first.out) == json.loads(second.out)
        assert json.loads(first.out)["times"] == f"operations measured on {kept.machine}"
        torch.set_num_threads(2)
        with pytest.raises(UsageError, match="of cpu with 1 threads, this process has cpu with 2"):
            call(model, **one)
    finally:
        torch.set_num_threads(threads)


def test_bad_numbers_are_named(model):
    for name in ("devices", "batch", "steps"):
        with pytest.raises(UsageError, match=f"--{name} 0 is not positive"):
            call(model, **{name: 0})
    with pytest.raises(UsageError, match="--price -1 is negative"):
        call(model, price=-1)


def test_help_does_not_import_torch():
    code = "import sys, holdfast.cli.sweep; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
