import json

import pytest
import typer
from typer.testing import CliRunner

from holdfast.cli.shortest_time import shortest_time
from holdfast.errors import DoesNotFit, UsageError

app = typer.Typer()
app.command()(shortest_time)


def run(*args):
    result = CliRunner().invoke(app, list(args))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("shape") / "config.json"
    fields = {"model_type": "llama", "vocab_size": 64, "num_hidden_layers": 6, "hidden_size": 32,
              "intermediate_size": 48, "num_attention_heads": 4}  # fmt: skip
    path.write_text(json.dumps(fields))
    return str(path)


def test_json_holds_both_ways_and_what_they_are_for(small):
    found = json.loads(run(small, "--tokens", "1e9", "--devices", "64", "--json"))
    assert found["training"]["layers"] == 6 and found["training"]["width"] == 32
    for name in ("layered", "usual"):
        way = found[name]
        assert way["devices"] == way["replicas"] * way["stages"] <= 64
        assert 6 % way["stages"] == 0
        assert way["replicas"] * way["micros"] * 2048 <= found["training"]["batch"]
        assert way["state_bytes"] <= found["training"]["memory"]
    assert found["layered"]["micros"] >= found["layered"]["stages"]


def test_a_table_for_people(small):
    shown = run(small, "--devices", "64").splitlines()
    assert [line.split()[0] for line in shown[2:4]] == ["layered", "usual"]
    assert shown[-1].startswith("the usual way takes")


def test_bad_input(small):
    with pytest.raises(UsageError, match="--devices 0 is not positive"):
        run(small, "--devices", "0")
    with pytest.raises(UsageError, match="loss=-1"):
        run(small, "--loss", "-1")
    with pytest.raises(UsageError, match="holds no sequence"):
        run(small, "--loss", "20")
    with pytest.raises(UsageError, match="no stack of layers"):
        run("holdfast.training.models.evoformer:small")
    with pytest.raises(DoesNotFit, match="use more devices than 1"):
        run("llama-3.1-70b", "--devices", "1")
