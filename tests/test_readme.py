"""Every command and example in the README is run as it stands."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from holdfast import cli, demo

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```", README.read_text(), re.M | re.S)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A directory with the files that the README names."""
    path = tmp_path_factory.mktemp("readme")
    small = dict(demo.CONFIG, hidden_size=64, intermediate_size=176, num_hidden_layers=2)
    small |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    (path / "config.json").write_text(json.dumps(small))
    text = (Path(os.__file__).parent / "argparse.py").read_text()
    (path / "corpus.txt").write_text(text)
    return path


def test_readme_has_examples():
    assert len(BLOCKS) >= 6


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_readme_block_runs(index, workplace, monkeypatch, capsys):
    kind, text = BLOCKS[index]
    monkeypatch.chdir(workplace)
    if kind == "python":
        exec(compile(text, f"README block {index}", "exec"), {})
        return
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        assert words[0] == "holdfast", line
        result = CliRunner().invoke(cli.app, words[1:], catch_exceptions=False)
        assert result.exit_code == 0, f"{line}\n{result.output}"


def test_readme_shows_the_recorded_demo():
    recorded = json.loads((README.parent / "docs" / "demo.json").read_text())
    section = README.read_text().partition("<!-- demo:begin -->\n")[2]
    assert section.partition("\n<!-- demo:end -->")[0] == demo.markdown(recorded)
    assert recorded["plan"]["peak_bytes"] <= demo.FRACTION * recorded["plain"]["peak_bytes"]
