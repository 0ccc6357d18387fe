import json
import re

import pytest
import yaml

from holdfast.cli import main

CONFIG = {
    "model_type": "llama",
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
# One optimizer and full tuning: what is tested here is the command, not the search.
QUICK = (
    "--reserve",
    "0",
    "--task",
    "pretrain",
    "--optimizer",
    "adamw",
    "--dtype",
    "float32",
    "--sequence",
    "64",
)


@pytest.fixture
def fit(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))

    def run(*options, model=tmp_path / "config.json"):
        """Exit code, standard output, standard error."""
        with pytest.raises(SystemExit) as info:
            main(["fit", str(model), "--out", str(tmp_path / "plan.yaml"), *options])
        return (info.value.code or 0, *capsys.readouterr())

    run.plan = tmp_path / "plan.yaml"
    return run


def test_fits(fit):
    code, out, _ = fit("--budget", "1GiB", *QUICK, "--json")
    document = json.loads(out)
    assert code == 0 and document["fits"]
    assert {"plan", "predicted", "step_seconds", "alternatives", "binding"} <= set(document)
    predicted = document["predicted"]
    assert sum(predicted["by_category"].values()) == predicted["peak_bytes"] <= 2**30
    written = yaml.safe_load(fit.plan.read_text())
    assert written["budget"] == {"device": 2**30}
    assert written["predicted"]["peak_bytes"] == predicted["peak_bytes"]


def test_below_one_block_exits_3_with_a_budget_that_fits(fit):
    code, out, _ = fit("--budget", "100KiB", *QUICK, "--json")
    document = json.loads(out)
    assert code == 3 and document["fits"] is False and not fit.plan.exists()
    smallest = document["smallest_budget"]
    assert fit("--budget", f"{smallest}B", *QUICK, "--json")[0] == 0
    assert fit("--budget", f"{smallest * 99 // 100}B", *QUICK, "--json")[0] == 3


def test_each_relaxation_fits_when_run_again(fit):
    """Options printed for a budget that is too small are options under which a plan exists."""
    given = ("--reserve", "0", "--task", "pretrain", "--optimizer", "adamw", "--batch", "2")
    request = (*given, "--sequence", "64", "--budget", "1MiB")
    code, out, _ = fit(*request, "--json")
    found = json.loads(out)["relaxations"]
    assert code == 3 and len(found) == 3
    for relaxation in found:
        # A later option of the same name wins.
        assert fit(*request, *relaxation["options"].split(), "--json")[0] == 0, relaxation


def test_below_one_block_says_what_binds(fit):
    code, out, err = fit("--budget", "100KiB", *QUICK)
    assert code == 3 and out == ""
    assert "budget is 100.00 KiB" in err and "Smallest budget that fits: --budget " in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--budget", "24 potatoes"), "24 potatoes"),
        (("--budget", "-1GiB"), "-1GiB"),
        (("--budget", "0"), "0"),
        (("--budget", "attic=1GiB"), "attic"),
        (("--budget", "1GiB", "--reserve", "much"), "much"),
        (("--budget", "1GiB", "--batch", "0"), "batch 0 is not a positive integer"),
        (("--budget", "1GiB", "--batch", "-2"), "batch -2 is not a positive integer"),
        (("--budget", "1GiB", "--sequence", "0"), "sequence 0 is not a positive integer"),
        (("--budget", "1GiB", "--task", "sleep"), "task 'sleep' is unknown; use one of finetune"),
        (("--budget", "1GiB", "--tune", "half"), "tune 'half' is unknown"),
        (("--budget", "1GiB", "--allow", "all"), "allow 'all' is unknown"),
        (("--budget", "1GiB", "--dtype", "int7"), "dtype 'int7' is unknown"),
        (("--budget", "1GiB", "--optimizer", "adamm"), "unknown optimizer method 'adamm'"),
        (("--budget", "1GiB", "--adapter", "lara"), "unknown adapter method 'lara'"),
        (("--budget", "1GiB", "--hardware", "abacus"), "abacus"),
        (("--budget", "1GiB", "--clip", "-1"), r"clip = -1\.0: .*greater than 0"),
        (("--budget", "1GiB", "--learning-rate", "0"), "learning_rate = 0.0: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_option_exits_2(fit, options, message):
    code, out, err = fit(*options)
    assert code == 2 and out == "", err
    assert re.search(message, err), err
    assert "Traceback" not in err


def test_unknown_model_exits_2(fit):
    code, _, err = fit("--budget", "1GiB", model="lama-3.1-8b")
    assert code == 2 and "unknown model 'lama-3.1-8b'; nearest known:" in err


def test_sequence_beyond_the_positions_exits_2(fit):
    code, _, err = fit("--budget", "1GiB", "--sequence", "4096", model="gpt2")
    assert code == 2 and "exceeds the 1024 positions" in err and "--sequence 1024" in err


def test_broken_config_exits_2(fit, tmp_path):
    (tmp_path / "broken.json").write_text("{")
    code, _, err = fit("--budget", "1GiB", model=tmp_path / "broken.json")
    assert code == 2 and "broken.json is not readable JSON" in err
