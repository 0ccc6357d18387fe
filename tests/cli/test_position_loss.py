import json
import math
import re

import pytest

from holdfast import cli


def run_cli(*args):
    with pytest.raises(SystemExit) as exit_:
        cli.main(list(args))
    return exit_.value.code


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from holdfast.checks import tinylm
    from holdfast.training.tokenizers import byte_tokenizer

    folder = tmp_path_factory.mktemp("model")
    tinylm.model(vocab_size=264).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def texts(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"{name} text that goes on. " * 8)
    return tmp_path


def test_prints_octaves_and_json(model, texts, capsys):
    arguments = ("probe", "position-loss", "--model", str(model), "--data", str(texts))
    arguments += ("--length", "64", "--documents", "2", "--window", "16")
    assert run_cli(*arguments) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("2 documents of 64 tokens")
    assert re.search(r"^position +loss +last 16 tokens$", shown, re.M)
    assert re.search(r"^32-63 +[56]\.\d{3} +[56]\.\d{3}$", shown, re.M)
    assert run_cli(*arguments, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["probe"] == "position-loss" and found["documents"] == 2
    assert [(row["from"], row["to"]) for row in found["rows"]][-1] == (32, 64)
    full, window = found["losses"]["full"], found["losses"]["window"]
    assert len(full) == len(window) == 63
    assert full[:16] == pytest.approx(window[:16], abs=1e-4) and full[40:] != window[40:]
    # An untrained model knows nothing anywhere.
    assert sum(full) / len(full) == pytest.approx(math.log(264), abs=0.5)


def test_reads_the_library_by_default(model, capsys):
    arguments = ("probe", "position-loss", "--model", str(model), "--length", "32", "--json")
    assert run_cli(*arguments, "--documents", "3") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["documents"] == 3 and found["window"] is None
    assert set(found["losses"]) == {"full"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--window", "64", "--length", "64"), "--window 64 is not smaller.*1 to 63"),
        (("--length", "1"), "--length 1 must be at least 2"),
        (("--length", "900"), r"none of 3 file\(s\).*has 900 tokens"),
    ],
)
def test_bad_input_exits_2(arguments, message, model, texts, capsys):
    given = ("probe", "position-loss", "--model", str(model), "--data", str(texts), *arguments)
    assert run_cli(*given) == 2
    assert re.search(message, capsys.readouterr().err)
