"""`holdfast compare`: what a combination means, and one job run under two of them."""

import json

import pytest
import yaml

from holdfast.cli import main
from holdfast.errors import UsageError
from holdfast.training.compare import from_files, pareto, parse

CONFIG = {
    "model_type": "llama",
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


def test_words_become_a_recipe():
    recipe, rate = parse("lora+int4+memsave+recompute+bf16@3e-3")
    assert (recipe.adapter, recipe.weights, recipe.saved) == ("lora", "int4", ("memsave",))
    assert (recipe.option, recipe.dtype, recipe.optimizer) == ("recompute", "bfloat16", "adamw")
    assert rate == 3e-3
    assert parse("plain")[0].option == "keep" and parse("plain")[1] is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adamw5", "adamw4"),
        ("lora@fast", "'fast' in lora@fast is no learning rate"),
        ("adamw+sgd", "2 methods of the slot optimizer"),
        ("int4", "int4 needs lora"),
    ],
)
def test_what_cannot_be_planned_is_named(text, message):
    with pytest.raises(UsageError, match=message):
        parse(text)


def _row(label, peak, loss, seconds):
    return {
        "label": label,
        "peak_bytes": peak,
        "loss": loss,
        "validation_loss": None,
        "seconds_per_step": seconds,
    }


def test_the_front_keeps_what_is_best_in_something():
    rows = [
        _row("small", 1, 3.0, 2.0),
        _row("good", 3, 1.0, 2.0),
        _row("fast", 3, 2.0, 1.0),
        _row("worse than good", 3, 1.5, 2.0),
        {"label": "died", "error": "ended with code 1"},
    ]
    assert pareto(rows) == ["small", "good", "fast"]


def test_equal_runs_are_both_on_the_front():
    assert pareto([_row("a", 1, 1.0, 1.0), _row("b", 1, 1.0, 1.0)]) == ["a", "b"]


@pytest.fixture
def bench(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "data.txt").write_text("the quick brown fox " * 50)
    return tmp_path


def _compare(bench, *options):
    with pytest.raises(SystemExit) as info:
        main(
            ["compare", "--data", str(bench / "data.txt"), "--steps", "3"]
            + ["--out", str(bench / "out"), "--json", *options]
        )
    return info.value.code or 0


def test_one_job_under_two_methods(bench, capsys):
    model = ["--model", str(bench / "config.json"), "--sequence", "16", "--batch", "2"]
    code = _compare(bench, *model, "--methods", "plain,recompute+backward")
    document = json.loads(capsys.readouterr().out)
    assert code == 0
    by_label = {row["label"]: row for row in document["rows"]}
    plain, other = by_label["plain"], by_label["recompute+backward"]
    assert other["loss"] == plain["loss"]
    assert other["meter_bytes"] < plain["meter_bytes"]
    assert all(r["meter_bytes"] == r["predicted_bytes"] for r in by_label.values())
    assert document["rows"][0] is not plain and "recompute+backward" in document["pareto"]
    assert (bench / "out" / "compare.png").stat().st_size > 10_000
    assert json.loads((bench / "out" / "compare.json").read_text()) == document
    # A plan that it wrote can be compared too. What is finished is not run again, and a run that
    # fails leaves the others.
    (bench / "out" / "plain" / "log.jsonl").unlink()
    spec = yaml.safe_load((bench / "out" / "plain.yaml").read_text())
    spec["methods"]["saved"] = [{"fewbit": {"bits": 9}}]
    (bench / "bad.yaml").write_text(yaml.safe_dump(spec))
    code = _compare(bench, str(bench / "out" / "plain.yaml"), str(bench / "bad.yaml"))
    again, failed = json.loads(capsys.readouterr().out)["rows"]
    assert code == 1
    assert again == plain and not (bench / "out" / "plain" / "log.jsonl").exists()
    assert failed["label"] == "bad" and "code 2" in failed["error"]


def test_plans_of_different_jobs_are_refused(bench):
    plan = {"model": "gpt2", "sequence": 16, "budget": {"device": "1GiB"}}
    for name, sequence in (("a", 16), ("b", 32)):
        (bench / f"{name}.yaml").write_text(json.dumps({**plan, "sequence": sequence}))
    with pytest.raises(UsageError, match="sequence 16, b has 32"):
        from_files([bench / "a.yaml", bench / "b.yaml"])


def test_neither_or_both_ways_of_naming_plans_is_an_error(bench):
    assert _compare(bench) == 2
    assert _compare(bench, "--methods", "plain") == 2
