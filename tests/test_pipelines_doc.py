"""docs/pipelines.md is generated where it has figures, and its examples run as they stand."""

import re

import pytest

from holdfast.checks import docs
from holdfast.parallel.launch import launch

PAGE = docs.PATH.with_name(docs.PIPELINES)
DRAWING, TRAINING = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)


def _run_training() -> list[float]:
    names = {"__name__": "train"}
    exec(compile(TRAINING, "docs/pipelines.md", "exec"), names)
    return names["train"]()  # type: ignore[operator]


def test_table_is_generated():
    found = PAGE.read_text(encoding="utf-8").partition(docs.BEGIN)[2].partition(docs.END)[0]
    assert found == docs.pipelines(), (
        "docs/pipelines.md is stale; run `holdfast check pipeoffload --write`"
    )
    gone = dict(re.findall(r"(\d+)% on (\d+) ranks", found))
    assert len(gone) == 4 and all(int(share) > 50 for share, ranks in gone.items() if ranks != "2")


def test_write_replaces_what_is_between_the_markers(tmp_path, monkeypatch):
    monkeypatch.setattr(docs, "PATH", tmp_path / "systems.md")
    monkeypatch.setattr(docs, "generate", lambda: "systems")
    monkeypatch.setattr(docs, "pipelines", lambda: "new\n")
    page = tmp_path / docs.PIPELINES
    assert docs.write() and not page.exists()
    page.write_text(f"before\n{docs.BEGIN}old\n{docs.END}\nafter\n")
    assert docs.write()
    assert page.read_text() == f"before\n{docs.BEGIN}new\n{docs.END}\nafter\n"


def test_picture_is_what_the_page_draws(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    exec(compile(DRAWING, "docs/pipelines.md", "exec"), {})
    drawn, kept = (
        sorted(re.findall(r"<text[^>]*>([^<]*)</text>", (folder / "pipeline.svg").read_text()))
        for folder in (tmp_path, PAGE.parent)
    )
    assert "rank 3" in kept
    assert drawn == kept, "docs/pipeline.svg is stale; run the example of docs/pipelines.md in docs"


def test_training_example_runs_on_two_processes():
    first, last = launch(_run_training, 2)
    assert first == [] and len(last) == 8
    assert last[-1] < last[0]
