import json

import pytest

from holdfast import cli

CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 200,
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


def test_wall_prints_phases_and_draws_them(model, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "roof.svg"
    asked = ("plan", "wall", model, "--hardware", "h100-80gb", "--sequence", "32")
    assert run_cli(*asked, "--task", "serve", "--plot", str(picture), "--trend") == 0
    out = capsys.readouterr().out
    for line in ("prefill", "decode", "launch", "every two years", f"drawn in {picture}"):
        assert line in out
    assert "<svg" in picture.read_text()


def test_wall_json_is_one_document(model, capsys):
    asked = ("plan", "wall", model, "--task", "pretrain", "--sequence", "16", "--devices", "2")
    assert run_cli(*asked, "--hardware", "l4-24gb", "--trend", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [v["phase"] for v in found["verdicts"]] == ["forward", "backward", "step"]
    assert found["verdicts"][1]["by_resource"]["interconnect"] > 0
    assert found["hardware"] == "l4-24gb" and found["ridge"] > 0
    assert sum(row["flops"] * row["count"] for row in found["rows"]) == sum(
        v["flops"] for v in found["verdicts"]
    )
    assert found["trend"]["per_two_years"]["flops"] > found["trend"]["per_two_years"]["bandwidth"]


def test_wall_takes_layered_hardware(model, capsys):
    asked = ("plan", "wall", model, "--task", "serve", "--sequence", "16", "--dtype", "bfloat16")
    assert run_cli(*asked, "--hardware", "illustrative-scd", "--json") == 0
    resources = json.loads(capsys.readouterr().out)["verdicts"][0]["by_resource"]
    assert list(resources) == ["compute", "sram", "dram", "launch", "interconnect"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--task", "play"), "unknown task 'play'"),
        (("--hardware", "h10"), "unknown hardware 'h10'"),
        (("--devices", "0"), "devices 0 is not positive"),
        (("--plot", "roof.xyz", "--sequence", "8"), "cannot draw roof.xyz"),
    ],
)
def test_wall_refuses_bad_input(model, more, message, capsys):
    pytest.importorskip("matplotlib")
    assert run_cli("plan", "wall", model, *more) == 2
    assert message in capsys.readouterr().err


def test_drawing_without_matplotlib_says_what_to_install(model, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert run_cli("plan", "wall", model, "--plot", "roof.png") == 2
    assert "pip install 'holdfast[plots]'" in capsys.readouterr().err
