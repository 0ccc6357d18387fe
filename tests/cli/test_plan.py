import gc
import json

import pytest

from holdfast import cli
from holdfast.plan.file import PlanFile, write

# One tiny model, few recipes: the table itself is tested in tests/training.
MODEL = "holdfast.training.models.evoformer:small"


def run_cli(*args):
    with pytest.raises(SystemExit) as exit_:
        cli.main(list(args))
    return exit_.value.code


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """A meter collects garbage first; searching through what was imported before is slow."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def few(monkeypatch):
    from holdfast.training import recipes

    def two(model, batch, *, on_gpu):
        return [
            recipes.Recipe(recipes.PLAIN),
            recipes.Recipe("recompute each block", option="recompute"),
            recipes.Recipe("chunked loss", why_not="no language model"),
        ]

    monkeypatch.setattr(recipes, "recipes", two)
    made = []

    def once(request, kind=recipes.Predictor):
        made[:] = made or [kind(request)]
        return made[0]

    # Only the budget differs between the calls of a test, and predictions do not depend on it.
    monkeypatch.setattr(recipes, "Predictor", once)


def _train(budget, *more):
    return run_cli(
        "plan", "train", MODEL, "--budget", budget, "--sequence", "12",
        "--hardware", "cpu-2core", *more,
    )  # fmt: skip


def test_train_sorts_what_fits_first_and_names_the_smallest_budget(few, capsys):
    assert _train("1", "--json") == 3
    found = json.loads(capsys.readouterr().out)
    plain, recomputed = sorted(found["rows"], key=lambda row: -row["predicted"]["peak_bytes"])
    assert not found["fits"] and not plain["fits"]
    smallest = found["smallest_budget"]
    peak = recomputed["predicted"]["peak_bytes"]
    assert smallest == peak + found["reserve_bytes"] and peak < plain["predicted"]["peak_bytes"]
    for row in found["rows"]:
        assert sum(row["predicted"]["by_category"].values()) == row["predicted"]["peak_bytes"]
    assert recomputed["flops_ratio"] > 1.1 and plain["flops_ratio"] == 1
    assert found["left_out"] == [{"recipe": "chunked loss", "reason": "no language model"}]

    assert _train(str(smallest), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["fits"] for row in found["rows"]] == [True, False]
    assert found["rows"][0]["recipe"] == "recompute each block"

    assert _train(str(smallest - 1)) == 3
    shown = capsys.readouterr()
    assert f"--budget {smallest}" in shown.err
    header = next(line for line in shown.out.splitlines() if "parameters" in line)
    assert "activations" in header and "plain fp32 AdamW" in shown.out
    assert shown.out.splitlines()[-1] == "left out: chunked loss: no language model"


def test_show_prints_methods_blocks_and_bytes(tmp_path, capsys):
    path = tmp_path / "plan.yaml"
    ledger = [
        {"rank": 0, "place": "device", "category": c, "phase": "backward", "bytes": n}
        for c, n in (("parameters", 2048), ("activations", 1024))
    ]
    spec = PlanFile(
        model="gpt2",
        batch=4,
        micro_batch=4,
        sequence=128,
        budget={"device": 2**30},
        methods={
            "gradients": "backward",
            "optimizer": {"sgd": {"momentum": 0.9}},
            "blocks": {"transformer.h": "recompute*8 keep*4"},
        },
        predicted={"peak_bytes": 3072, "step_seconds": 0.5, "ledger": ledger},
    )
    write(spec, path)
    assert run_cli("plan", "show", str(path)) == 0
    out = capsys.readouterr().out
    for line in (
        "transformer.h  recompute*8 keep*4",
        "sgd (momentum 0.9)",
        "consumed in backward",
        "0.5 s per step",
        "3.00 KiB",
    ):
        assert line in out
    assert run_cli("plan", "show", str(path), "--json") == 0
    assert json.loads(capsys.readouterr().out) == spec.model_dump(mode="json")


def test_show_says_that_nothing_is_predicted_or_what_is_wrong(tmp_path, capsys):
    path = tmp_path / "plan.yaml"
    write(PlanFile(model="gpt2", sequence=8, budget={"device": 1}), path)
    assert run_cli("plan", "show", str(path)) == 0
    assert "no prediction" in capsys.readouterr().out
    assert run_cli("plan", "show", str(tmp_path / "absent.yaml")) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_rules_name_what_excludes_what_and_why(capsys):
    assert run_cli("plan", "rules", "--json") == 0
    every = json.loads(capsys.readouterr().out)
    by_pair = {frozenset(entry["methods"]): entry["reason"] for entry in every}
    assert by_pair[frozenset({"fewbit", "rmm"})].endswith("both write the form of activations")
    assert frozenset({"sst", "backward"}) in by_pair
    assert frozenset({"lora", "randlora"}) not in by_pair  # a plan has one adapter anyway
    assert run_cli("plan", "rules", "int4") == 0
    lines = capsys.readouterr().out.splitlines()
    assert all("int4" in line for line in lines[:-1]) and "exclude each other" in lines[-1]
    assert run_cli("plan", "rules", "int5") == 2
    assert "int4" in capsys.readouterr().err


@pytest.mark.parametrize("ranks", [1, 2])
def test_show_draws_a_step(tmp_path, capsys, ranks):
    from holdfast.plan.file import Parallel

    pytest.importorskip("matplotlib")
    cells = [
        {"rank": rank, "place": "device", "category": category, "phase": phase, "bytes": 1000}
        for rank in range(ranks)
        for category in ("parameters", "activations", "gradients")
        for phase in ("forward", "backward")
    ]
    costs = [(10**6, 10**6, 10**6, 500, 10**5, 10**5, 500)] * 4
    pipeline = Parallel(pipeline=2, chunks=2, order="uniform", offload=1, costs=costs)
    spec = PlanFile(
        model="mine",
        batch=4,
        sequence=8,
        budget={"device": 2**20},
        parallel=pipeline if ranks == 2 else None,
        predicted={"ledger": cells, "step_seconds": 0.25},
    )
    write(spec, tmp_path / "plan.yaml")
    drawn, chrome = tmp_path / "step.svg", tmp_path / "step.json"
    arguments = ["--timeline", str(drawn), "--chrome", str(chrome)]
    assert run_cli("plan", "show", str(tmp_path / "plan.yaml"), *arguments) == 0
    out = capsys.readouterr().out
    assert ("pipeline of 2" in out) == (ranks == 2)
    assert "one step, predicted" in drawn.read_text()
    events = json.loads(chrome.read_text())["traceEvents"]
    names = {e["name"] for e in events if e["ph"] == "X"}
    assert any(name.startswith("0 F" if ranks == 2 else "F") for name in names), names
    write(spec.model_copy(update={"predicted": {}}), tmp_path / "bare.yaml")
    assert run_cli("plan", "show", str(tmp_path / "bare.yaml"), *arguments) == 2
    assert "no prediction to draw" in capsys.readouterr().err
