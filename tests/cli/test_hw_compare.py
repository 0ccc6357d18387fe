import json

import pytest

from holdfast import cli
from holdfast.plan.layered import PRESETS

CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 200, "dtype": "bfloat16",
}  # fmt: skip


def run_cli(*args):
    with pytest.raises(SystemExit) as exit_:
        cli.main(list(args))
    return exit_.value.code


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


def test_compare_prints_ratios_and_no_claim_of_an_illustrative_machine(model, capsys):
    asked = ("hw", "compare", "h100-hgx", "illustrative-scd", "--model", model)
    assert run_cli(*asked, "--sequence", "32", "--batch", "2", "--sweep", "batch=4") == 0
    out = capsys.readouterr().out.splitlines()
    assert any(line.startswith("batch 4") for line in out)
    gpu, scd = (next(x for x in out if name in x) for name in ("h100-hgx", "illustrative-scd"))
    assert "1x (" in gpu and gpu.split()[-1] != "-"
    assert "x prefill" in scd and scd.split()[-2:] == ["-", "-"]
    assert "claim nothing" in out[-1]


def test_compare_json_is_one_document_with_files_and_presets(model, tmp_path, capsys):
    mine = tmp_path / "mine.yaml"
    mine.write_text((PRESETS / "h100-hgx.yaml").read_text().replace("h100-hgx", "mine"))
    asked = ("hw", "compare", "a100-80gb", str(mine), "--model", model, "--task", "pretrain")
    assert run_cli(*asked, "--sequence", "16", "--sweep", "levels.hbm.bandwidth=2", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [s["setting"] for s in found["settings"]] == ["as given", "levels.hbm.bandwidth x2"]
    (one, two), (_, faster) = (s["outcomes"] for s in found["settings"])
    assert (one["machine"], two["machine"], one["speedup"]["total"]) == ("a100-80gb", "mine", 1)
    assert one["energy_ratio"] is None and two["total"]["joules"] > 0
    assert faster["total"]["seconds"] <= two["total"]["seconds"]
    assert list(two["phases"]) == ["forward", "backward", "step"]


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("h100-hgx",), 2, "two machines or more"),
        (("h100-hgx", "h100-hg"), 2, "unknown hardware 'h100-hg'; nearest known: h100-hgx"),
        (("h100-hgx", "l4-24gb", "--sweep", "x"), 2, "sweep 'x' is malformed"),
        (("l4-24gb", "a100-80gb", "--batch", "100000000"), 3, "fits no level of"),
    ],
)
def test_compare_refuses_bad_input(model, args, code, message, capsys):
    assert run_cli("hw", "compare", *args, "--model", model, "--sequence", "8") == code
    assert message in capsys.readouterr().err
