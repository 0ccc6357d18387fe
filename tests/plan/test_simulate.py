import itertools
import random

import pytest

from holdfast.errors import UsageError
from holdfast.plan.simulate import Change, Task, simulate


def _pair(at: str = "end") -> list[Task]:
    hold = Change(0, "device", "activations", 10)
    return [
        Task("load", (0, "h2d"), 5, holds=(hold,)),
        Task("work", (0, "compute"), 7, after=("load",)),
        Task("drop", (0, "d2h"), 3, ("work",), (Change(0, "device", "activations", -10, at),)),
    ]


def test_streams_overlap_and_dependencies_wait():
    trace = simulate([*_pair(), Task("other", (1, "compute"), 4)])
    assert [(s.start, s.end) for s in trace.spans] == [(0, 5), (5, 12), (12, 15), (0, 4)]
    assert trace.end == 15
    assert trace.busy((0, "compute")) == 7
    assert trace.bubble((0, "compute")) == 8
    assert trace.bytes(0, "device") == [(0, 10), (15, 0)]
    assert trace.peak(0, "device", "activations") == 10
    assert trace.peak(1, "device") == 0


def test_what_is_freed_at_an_instant_makes_room_for_what_is_born():
    tasks = [
        Task(
            "a",
            "s",
            5,
            holds=(Change(0, "device", "cache", 10), Change(0, "device", "cache", -10, "end")),
        ),
        Task("b", "t", 5, after=("a",), holds=(Change(0, "device", "cache", 8),)),
    ]
    assert simulate(reversed(tasks)).peak(0, "device") == 10


def test_a_ledger_column_is_one_instant():
    tasks = [
        Task("f", "s", 5, (), (Change(0, "device", "activations", 6),), "forward"),
        Task("g", "s", 5, (), (Change(0, "device", "gradients", 3),), "backward"),
        Task("h", "s", 5, (), (Change(0, "device", "activations", -6),), "backward"),
        Task("i", "s", 5, (), (Change(0, "device", "gradients", 1),), "backward"),
    ]
    ledger = simulate(tasks).ledger()
    assert ledger[0, "device", "activations", "forward"] == 6
    column = ledger.column("device", "backward")
    assert (column["activations"], column["gradients"]) == (6, 3)


def test_end_is_the_longest_path_on_random_graphs():
    draw = random.Random(0)
    for _ in range(30):
        tasks: list[Task] = []
        for i in range(40):
            after = tuple({draw.randrange(i) for _ in range(draw.randrange(3))}) if i else ()
            tasks.append(Task(i, draw.randrange(4), draw.randrange(20), after))
        ends: list[int] = []
        for i, task in enumerate(tasks):
            earlier = [j for j in range(i) if tasks[j].stream == task.stream]
            ends.append(max([ends[j] for j in [*earlier, *task.after]], default=0) + task.duration)
        shuffled = simulate(tasks)
        assert [span.end for span in shuffled.spans] == ends
        assert shuffled.end == max(ends)


def test_chrome_trace_has_a_thread_per_stream_and_bytes_per_rank():
    events = simulate([*_pair(), Task("meet", ("pair", 0), 1)]).to_chrome()["traceEvents"]
    work = next(e for e in events if e["name"] == "work")
    assert (work["ph"], work["ts"], work["dur"]) == ("X", 0.005, 0.007)
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert processes == {1: "rank 0", 2: "all ranks"}
    threads = {
        e["tid"]: (e["pid"], e["args"]["name"]) for e in events if e["name"] == "thread_name"
    }
    assert threads == {1: (1, "h2d"), 2: (1, "compute"), 3: (1, "d2h"), 4: (2, "pair 0")}
    assert threads[work["tid"]] == (work["pid"], "compute")
    counters = [(e["pid"], e["name"], e["args"]) for e in events if e["ph"] == "C"]
    assert counters == [
        (1, "device bytes", {"activations": 10}),
        (1, "device bytes", {"activations": 0}),
    ]


@pytest.mark.parametrize(
    ("tasks", "says"),
    [
        ([Task("a", 0, 1, ("b",)), Task("b", 1, 1, ("a",))], "a after b after a|b after a after b"),
        ([Task("a", 0, 1, ("b",)), Task("b", 0, 1)], "wait for each other"),
        ([Task("a", 0, 1, ("c",))], "waits for c"),
        ([Task("a", 0, 1), Task("a", 1, 1)], "named a"),
        ([Task("a", 0, -1)], "less than nothing"),
        ([Task("a", 0, 1.5)], "integer nanoseconds"),
    ],
)
def test_impossible_tasks_are_refused(tasks, says):
    with pytest.raises(UsageError, match=says):
        simulate(tasks)


def test_unknown_stream_is_named():
    with pytest.raises(UsageError, match="unknown stream"):
        simulate(_pair()).busy((3, "compute"))


def test_order_of_streams_does_not_matter():
    lanes = [
        [Task((s, i), s, 3 + s, ((s - 1, i),) if s else ()) for i in range(4)] for s in range(3)
    ]
    ends = set()
    for order in itertools.permutations(lanes):
        ends.add(simulate(itertools.chain(*order)).end)
    assert len(ends) == 1
