"""simulate: when each task of a plan runs and what it holds meanwhile, exactly.

Discrete events in integer nanoseconds and integer bytes. A stream runs its tasks in the order in
which they were given, as a CUDA stream does; a task starts as soon as its stream and everything in
`after` have ended. The result is therefore the longest path, the same in every run.
"""

from collections import defaultdict, deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from holdfast.errors import UsageError, unknown
from holdfast.ledger import Ledger


@dataclass(frozen=True, slots=True)
class Change:
    """`nbytes` of a category are born (positive) or freed (negative) as a task starts or ends."""

    rank: int
    place: str
    category: str
    nbytes: int
    at: Literal["start", "end"] = "start"


@dataclass(frozen=True, slots=True)
class Task:
    """Work of `duration` nanoseconds on `stream`, by convention (rank, "compute" or "d2h" ...).

    `phase` says which of the ledger's phases the task belongs to.
    """

    name: Hashable
    stream: Hashable
    duration: int
    after: tuple[Hashable, ...] = ()
    holds: tuple[Change, ...] = ()
    phase: str = "forward"


@dataclass(frozen=True, slots=True)
class Span:
    name: Hashable
    stream: Hashable
    start: int
    end: int


@dataclass(frozen=True)
class Trace:
    """What `simulate` found; times are nanoseconds after the start."""

    spans: tuple[Span, ...]
    changes: tuple[tuple[int, str, Change], ...] = field(repr=False)  # (time, phase, change)

    @cached_property
    def end(self) -> int:
        return max((span.end for span in self.spans), default=0)

    @cached_property
    def by_name(self) -> dict[Hashable, Span]:
        return {span.name: span for span in self.spans}

    @cached_property
    def streams(self) -> list[Hashable]:
        return list(dict.fromkeys(span.stream for span in self.spans))

    def bytes(self, rank: int, place: str, category: str | None = None) -> list[tuple[int, int]]:
        """Bytes held over time as (time, bytes from then on), every change listed.

        Among changes at one instant what is freed goes first: a buffer may be reused at once.
        """
        held, steps = 0, []
        for time, _, change in self.changes:
            here = (change.rank, change.place) == (rank, place)
            if here and category in (None, change.category):
                held += change.nbytes
                steps.append((time, held))
        return steps

    def peak(self, rank: int, place: str, category: str | None = None) -> int:
        """The most bytes held at once."""
        return max((held for _, held in self.bytes(rank, place, category)), default=0)

    def busy(self, stream: Hashable) -> int:
        """Nanoseconds in which the stream works."""
        return sum(span.end - span.start for span in self._of(stream))

    def bubble(self, stream: Hashable) -> int:
        """Nanoseconds in which the stream waits, from the start of all to the end of all."""
        return self.end - self.busy(stream)

    def ledger(self) -> Ledger:
        """Per rank, place and phase: what each category holds as the place peaks in that phase."""
        held: dict[tuple[int, str], dict[str, int]] = defaultdict(lambda: defaultdict(int))
        best: dict[tuple[int, str, str], tuple[int, dict[str, int]]] = {}
        for _, phase, change in self.changes:
            cells = held[change.rank, change.place]
            cells[change.category] += change.nbytes
            total = sum(cells.values())
            if total > best.get((change.rank, change.place, phase), (-1,))[0]:
                best[change.rank, change.place, phase] = total, dict(cells)
        ledger = Ledger()
        for (rank, place, phase), (_, cells) in best.items():
            ledger.put(place, phase, cells, rank=rank)
        return ledger

    def to_chrome(self) -> dict[str, Any]:
        """The JSON document that chrome://tracing and Perfetto open; times in microseconds.

        Each rank is a process and each of its streams a thread, named by metadata events. Both
        are numbered from 1, because viewers take 0 for the idle process.
        """
        lanes = {stream: lane_of(stream) for stream in self.streams}
        ranks = {change.rank for _, _, change in self.changes}
        ranks |= {rank for rank, _ in lanes.values() if rank is not None}
        pids: dict[int | None, int] = {rank: rank + 1 for rank in sorted(ranks)}
        named = {pid: f"rank {rank}" for rank, pid in pids.items()}
        if any(rank is None for rank, _ in lanes.values()):
            pids[None] = max(pids.values(), default=0) + 1
            named[pids[None]] = "all ranks"
        events = [event for pid, name in named.items() for event in _called(pid, None, name)]
        at = {}
        for tid, (stream, (rank, label)) in enumerate(lanes.items(), start=1):
            at[stream] = {"pid": pids[rank], "tid": tid}
            events += _called(pids[rank], tid, label)
        for span in self.spans:
            duration = (span.end - span.start) / 1e3
            begun = {"ph": "X", "name": _text(span.name), **at[span.stream]}
            events.append(begun | {"ts": span.start / 1e3, "dur": duration})
        held: dict[tuple[int, str], dict[str, int]] = defaultdict(lambda: defaultdict(int))
        for time, _, change in self.changes:
            cells = held[change.rank, change.place]
            cells[change.category] += change.nbytes
            counter = {"ph": "C", "name": f"{change.place} bytes", "pid": pids[change.rank]}
            events.append(counter | {"ts": time / 1e3, "args": dict(cells)})
        return {"traceEvents": events, "displayTimeUnit": "ms"}

    def _of(self, stream: Hashable) -> list[Span]:
        found = [span for span in self.spans if span.stream == stream]
        if not found:
            raise unknown("stream", _text(stream), map(_text, self.streams))
        return found


def simulate(tasks: Iterable[Task]) -> Trace:
    """Run `tasks`: per stream in the order given, each after what it names.

    Raises:
        UsageError: a name is given twice or not at all, a duration is negative, or tasks wait for
            each other in a circle; the circle is named.
    """
    tasks = list(tasks)
    index = {task.name: i for i, task in enumerate(tasks)}
    _check(tasks, index)
    blocks: list[list[int]] = [[] for _ in tasks]  # those that wait for it
    missing = [0] * len(tasks)
    last: dict[Hashable, int] = {}
    for i, task in enumerate(tasks):
        before = {index[name] for name in task.after}
        if task.stream in last:
            before.add(last[task.stream])
        last[task.stream] = i
        missing[i] = len(before)
        for j in before:
            blocks[j].append(i)
    start = [0] * len(tasks)
    ready = deque(i for i, count in enumerate(missing) if not count)
    done = 0
    while ready:
        i = ready.popleft()
        done += 1
        end = start[i] + tasks[i].duration
        for j in blocks[i]:
            start[j] = max(start[j], end)
            missing[j] -= 1
            if not missing[j]:
                ready.append(j)
    if done < len(tasks):
        raise UsageError(_circle(tasks, blocks, missing))
    spans = tuple(
        Span(task.name, task.stream, start[i], start[i] + task.duration)
        for i, task in enumerate(tasks)
    )
    return Trace(spans, _changes(tasks, spans))


def _check(tasks: Sequence[Task], index: dict[Hashable, int]) -> None:
    if len(index) < len(tasks):
        seen: set[Hashable] = set()
        twice = next(t.name for t in tasks if t.name in seen or seen.add(t.name))  # type: ignore[func-returns-value]
        raise UsageError(f"two tasks are named {_text(twice)}; names are unique")
    for task in tasks:
        if isinstance(task.duration, bool) or not isinstance(task.duration, int):
            raise UsageError(
                f"task {_text(task.name)} lasts {task.duration!r}; give integer nanoseconds"
            )
        if task.duration < 0:
            raise UsageError(f"task {_text(task.name)} lasts {task.duration} ns, less than nothing")
        for name in task.after:
            if name not in index:
                raise UsageError(
                    f"task {_text(task.name)} waits for {_text(name)}, which is no task"
                )


def _changes(tasks: Sequence[Task], spans: Sequence[Span]) -> tuple[tuple[int, str, Change], ...]:
    found = []
    for i, (task, span) in enumerate(zip(tasks, spans, strict=True)):
        for change in task.holds:
            time = span.start if change.at == "start" else span.end
            found.append((time, change.nbytes > 0, i, task.phase, change))
    found.sort(key=lambda entry: entry[:3])
    return tuple((time, phase, change) for time, _, _, phase, change in found)


def _circle(tasks: Sequence[Task], blocks: list[list[int]], missing: list[int]) -> str:
    waits: dict[int, int] = {}
    for i, waiting in enumerate(blocks):
        if missing[i]:
            for j in waiting:
                if missing[j]:
                    waits[j] = i
    at = next(iter(waits))
    path: list[int] = []
    while at not in path:
        path.append(at)
        at = waits[at]
    names = [_text(tasks[i].name) for i in [*path[path.index(at) :], at]]
    return f"tasks wait for each other: {' after '.join(names)}; break the circle"


def lane_of(stream: Hashable) -> tuple[int | None, str]:
    """The rank of a stream, None where it has none, and the stream's name within it."""
    if isinstance(stream, tuple) and len(stream) == 2 and isinstance(stream[0], int):
        return stream[0], str(stream[1])
    return None, _text(stream)


def _called(pid: int, tid: int | None, name: str) -> list[dict[str, Any]]:
    """Metadata of a process, or of a thread in it: its name, and its place in the order."""
    what, lane = "process", {"ph": "M", "pid": pid}
    if tid is not None:
        what, lane = "thread", lane | {"tid": tid}
    place = {"sort_index": pid if tid is None else tid}
    return [
        lane | {"name": f"{what}_name", "args": {"name": name}},
        lane | {"name": f"{what}_sort_index", "args": place},
    ]


def _text(name: Hashable) -> str:
    return " ".join(map(str, name)) if isinstance(name, tuple) else str(name)
