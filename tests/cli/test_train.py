import json
import re

import pytest
import torch
import yaml

from holdfast.cli import main

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


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Tiny matrices: on a busy machine a second thread is mostly waited for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Bench:
    """A plan and data in a directory, and the command line run on them."""

    def __init__(self, directory, capsys):
        self.directory, self.capsys = directory, capsys
        (directory / "config.json").write_text(json.dumps(CONFIG))
        (directory / "data.txt").write_text("the quick brown fox " * 50)
        self.content = {
            "model": str(directory / "config.json"),
            "task": "pretrain",
            "sequence": 16,
            "budget": {"device": "1GiB"},
        }

    def train(self, *options, data="data.txt", **changes):
        """Exit code, standard output, standard error."""
        plan = self.directory / "plan.yaml"
        plan.write_text(yaml.safe_dump(self.content | changes))
        base = ["train", str(plan), "--data", str(self.directory / data)]
        if "--steps" not in options:
            base += ["--steps", "2"]
        with pytest.raises(SystemExit) as info:
            main([*base, "--out", str(self.directory / "out"), *options])
        return (info.value.code or 0, *self.capsys.readouterr())


@pytest.fixture
def bench(tmp_path, capsys):
    return Bench(tmp_path, capsys)


def test_json_is_one_document_and_progress_goes_to_stderr(bench):
    code, out, err = bench.train("--json")
    document = json.loads(out)
    assert code == 0
    assert {"predicted", "measured", "budget_bytes", "loss", "steps", "seconds"} <= set(document)
    assert document["budget_bytes"] == 2**30 and document["steps"] == 2
    assert {"first", "last"} <= set(document["loss"])
    assert {"peak_bytes", "by_category"} <= set(document["predicted"]) & set(document["measured"])
    assert "step 2/2" in err


def test_the_report_is_for_people_without_json(bench):
    code, out, _ = bench.train()
    assert code == 0
    assert "budget 1.00 GiB: kept" in out and "optimizer" in out


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_over_budget_exits_4_and_says_what_would_do(bench, options):
    code, out, err = bench.train(*options, budget={"device": "64KiB"})
    assert code == 4
    assert "the plan's budget is 64.00 KiB; plan again with a budget of at least" in err
    assert not options or json.loads(out)["within_budget"] is False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "lama-3"}, "unknown model 'lama-3'; nearest known: .*llama"),
        ({"colour": "red"}, "colour = 'red': unknown field"),
        ({"batch": 0}, "batch = 0: "),
        ({"budget": {"device": "24 potatoes"}}, "budget.device = '24 potatoes': "),
        ({"methods": {"optimizer": {"adamm": {}}}}, "unknown optimizer method 'adamm'.*adamw"),
        ({"methods": {"optimizer": {"adamw": {"rank": 4}}}}, "adamw has no knob 'rank'; knobs: f"),
        ({"methods": {"adapter": {"lora": {"rang": 4}}}}, "lora has no knob 'rang'; knobs: .*rank"),
        ({"methods": {"blocks": {"h": "keep"}}}, "blocks: 'h' is no list of blocks.*model.layers"),
        ({"methods": {"blocks": {"model.layers": "keep"}}}, "has 2 blocks, the plan lists 1"),
        ({"methods": {"blocks": {"model.layers": "disk*2"}}}, "no disk bytes"),
        ({"model": "bert-base"}, "causal language models"),
        ({"task": "finetune"}, "no weights to fine-tune"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_plan_exits_2(bench, changes, message):
    code, out, err = bench.train(**changes)
    assert code == 2 and out == ""
    assert "holdfast: " in err and "Traceback" not in err
    assert re.search(message, err), err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "hold no text"),
        ("short", "too little data: 6 tokens"),
    ],
)
def test_bad_data_exits_2(bench, text, message):
    (bench.directory / "data.txt").write_text(text)
    code, _, err = bench.train()
    assert code == 2 and message in err, err


def test_missing_data_exits_2(bench):
    code, _, err = bench.train(data="nowhere.txt")
    assert code == 2 and "nowhere.txt" in err


@pytest.mark.parametrize(
    "options",
    [("--steps", "0"), ("--steps", "-1"), ("--checkpoint-every", "-1"), ("--validation", "2")],
    ids=" ".join,
)
def test_bad_option_exits_2(bench, options):
    code, out, err = bench.train(*options)
    assert code == 2 and out == "" and options[1] in err, err


def test_diverged_run_exits_1(bench):
    code, out, err = bench.train(
        "--json",
        "--steps",
        "6",
        methods={"optimizer": {"sgd": {}}},
        training={"learning_rate": 1e30},
    )
    assert code == 1 and out == ""
    assert "loss is" in err and "Lower learning_rate (1e+30)" in err


def test_another_plan_exits_2_and_overwrite_starts_over(bench):
    assert bench.train()[0] == 0
    code, _, err = bench.train(batch=2, micro_batch=2)
    assert code == 2 and "another plan" in err
    assert bench.train("--overwrite", batch=2, micro_batch=2)[0] == 0


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_a_directory_of_something_else_is_left_alone(bench, options):
    precious = bench.directory / "out" / "model.safetensors"
    precious.parent.mkdir()
    precious.write_bytes(b"weights of years")
    code, _, err = bench.train(*options)
    assert code == 2 and "exists and holds no run (model.safetensors)" in err
    assert precious.read_bytes() == b"weights of years"


def test_trains_where_the_allocator_cannot_be_counted(bench, monkeypatch):
    from holdfast.native.allocator import AllocatorPeak

    monkeypatch.setattr(AllocatorPeak, "supported", staticmethod(lambda: (False, "not built")))
    code, out, _ = bench.train("--json")
    measured = json.loads(out)["measured"]
    assert code == 0 and measured["allocator_peak_bytes"] is None and measured["peak_bytes"] > 0
