"""Every command and example in the README and the guides is run as it stands."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest

from holdfast import cli, demo

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = {
    "README": README,
    "fine-tune": ROOT / "docs" / "fine-tune.md",
    "memory": ROOT / "docs" / "memory.md",
}
# ```sh exit=3 marks a command that is meant to fail in this way.
FENCE = re.compile(r"^```(sh|python)(?: exit=(\d))?\n(.*?)^```", re.M | re.S)
BLOCKS = {name: FENCE.findall(page.read_text()) for name, page in PAGES.items()}


@pytest.fixture(scope="module")
def workplaces(tmp_path_factory):
    """Page -> a directory with the files that it names, shared by its blocks."""
    small = dict(demo.CONFIG, hidden_size=64, intermediate_size=176, num_hidden_layers=2)
    small |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    text = (Path(os.__file__).parent / "argparse.py").read_text()
    found = {}
    for name in PAGES:
        found[name] = path = tmp_path_factory.mktemp(name)
        (path / "config.json").write_text(json.dumps(small))
        (path / "corpus.txt").write_text(text)
    return found


def test_pages_have_examples():
    assert all(len(blocks) >= 6 for blocks in BLOCKS.values())


@pytest.mark.parametrize(
    ("page", "index"), [(name, i) for name, blocks in BLOCKS.items() for i in range(len(blocks))]
)
def test_block_runs(page, index, workplaces, monkeypatch):
    kind, code, text = BLOCKS[page][index]
    monkeypatch.chdir(workplaces[page])
    if kind == "python":
        exec(compile(text, f"{page} block {index}", "exec"), {})
        return
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        assert words[0] == "holdfast", line
        with pytest.raises(SystemExit) as done:
            cli.main(words[1:])
        assert (done.value.code or 0) == int(code or 0), line


def test_readme_shows_the_recorded_demo():
    recorded = json.loads((README.parent / "docs" / "demo.json").read_text())
    section = README.read_text().partition("<!-- demo:begin -->\n")[2]
    assert section.partition("\n<!-- demo:end -->")[0] == demo.markdown(recorded)
    assert recorded["plan"]["peak_bytes"] <= demo.FRACTION * recorded["plain"]["peak_bytes"]
