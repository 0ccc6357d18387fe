import json
import re
import sys

import pytest

from holdfast.errors import UsageError
from holdfast.parallel.offload_plan import StageCost, timeline
from holdfast.parallel.pipeoffload import choose_offload
from holdfast.plan import draw
from holdfast.plan.simulate import Change, Task, Trace, simulate
from holdfast.units import format_bytes

RANKS = 4


@pytest.fixture(scope="module")
def trace() -> Trace:
    costs = [StageCost(1000, 1000, 1000, 2**20, 600, 600, hop=50)] * (2 * RANKS)
    plan = choose_offload("uniform", RANKS, 2, 8, costs, offload="full")
    return timeline(plan, costs)


def _texts(path) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())


def _draw(trace: Trace, path, **options) -> list[str]:
    pytest.importorskip("matplotlib")
    draw.timeline(trace, path, **options)
    return _texts(path)


def test_every_rank_has_lanes_bubble_and_peaks(trace, tmp_path):
    texts = _draw(trace, tmp_path / "all.svg", title="a pipeline")
    assert "a pipeline" in texts and "chunks 0 to 1" in texts
    for lane in ("compute", "copy", "net", "device", "host"):
        assert texts.count(lane) == RANKS
    peaks = [text for text in texts if text.startswith("peak")]
    for rank in range(RANKS):
        assert f"rank {rank}" in texts
        for place in ("device", "host"):
            assert f"peak {format_bytes(trace.peak(rank, place))}" in peaks
    assert len(peaks) == 2 * RANKS
    share = trace.bubble((0, "compute")) / trace.end
    assert texts.count(f"{share:.1%} bubble") == RANKS
    # Every rank runs micro-batch 7 six times and copies it at least twice.
    assert texts.count("7") >= 8 * RANKS


def test_places_are_chosen_and_empty_ones_left_out(trace, tmp_path):
    texts = _draw(trace, tmp_path / "host.svg", places=("host", "disk"))
    assert "device" not in texts and "disk" not in texts and texts.count("host") == RANKS


def test_the_same_trace_gives_the_same_file(trace, tmp_path):
    _draw(trace, tmp_path / "one.svg")
    _draw(trace, tmp_path / "two.svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_png(trace, tmp_path):
    pytest.importorskip("matplotlib")
    draw.timeline(trace, str(tmp_path / "all.png"))
    assert (tmp_path / "all.png").read_bytes()[:4] == b"\x89PNG"


def test_other_names_streams_and_places(tmp_path):
    held = (Change(1, "fast", "buffers", 2048),)
    tasks = [
        Task(("run", 3), (1, "compute"), 5_000_000_000, holds=held),
        Task("shuffle", "bus", 7_000_000_000),
    ]
    texts = _draw(simulate(tasks), tmp_path / "other.svg", places=("fast",))
    assert {"rank 1", "28.6% bubble", "all ranks", "bus", "shuffle", "run"} <= set(texts)
    assert "peak 2.00 KiB" in texts and "s; the end is at 7 s" in texts


@pytest.mark.parametrize("name", ["trace.doc", "trace"])
def test_unknown_suffix_is_refused(trace, tmp_path, name):
    pytest.importorskip("matplotlib")
    with pytest.raises(UsageError, match=r"cannot draw .*use .png or .svg"):
        draw.timeline(trace, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_nothing_to_draw_and_no_folder(trace, tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(UsageError, match="nothing to draw"):
        draw.timeline(simulate([]), tmp_path / "none.svg")
    with pytest.raises(UsageError, match=r"cannot write .*No such file"):
        draw.timeline(trace, tmp_path / "missing" / "all.svg")


def test_missing_matplotlib_is_named(trace, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pip install 'holdfast\[plots\]'"):
        draw.timeline(trace, tmp_path / "all.svg")


def test_chrome_file_has_all_spans_and_integer_ids(trace, tmp_path):
    draw.write_chrome(trace, tmp_path / "all.json")
    events = json.loads((tmp_path / "all.json").read_text())["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) == len(trace.spans)
    assert all(isinstance(e["pid"], int) and e["pid"] > 0 for e in events)
    assert all(isinstance(e["tid"], int) and e["tid"] > 0 for e in events if e["ph"] == "X")
    assert [path.name for path in tmp_path.iterdir()] == ["all.json"]


def test_chrome_file_that_cannot_be_written(trace, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write"):
        draw.write_chrome(trace, tmp_path / "file" / "all.json")
