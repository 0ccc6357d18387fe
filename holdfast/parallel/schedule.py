"""Pipeline schedules: in which order each rank runs its chunks of the model on its micro-batches.

A model is cut into `ranks * chunks` stages; chunk c on rank r is stage c * ranks + r. A schedule
maps each rank to its actions in order. F is a forward; B a whole backward, or I (gradients of the
inputs) and W (gradients of the weights) its two parts. What a forward saves lives until W or B.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from holdfast.errors import UsageError, unknown
from holdfast.plan.simulate import Task, simulate


class Action(NamedTuple):
    stage: int
    kind: str
    micro: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro}"


Schedule = dict[int, list[Action]]


def one_f_one_b(ranks: int, chunks: int, micros: int) -> Schedule:
    """1F1B: after a warm-up each rank alternates one forward and one backward.

    With several chunks per rank this is the interleaved schedule. Peak on rank r, in chunks:
    min(micros, ranks - r) for one chunk per rank, else
    min(micros * chunks, 2 * (ranks - 1 - r) + (chunks - 1) * ranks + 1).

    Source: Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using
    Megatron-LM", 2021.

    Raises:
        UsageError: with several chunks, `ranks` does not divide `micros`.
    """
    if chunks > 1 and micros % ranks:
        raise UsageError(
            f"interleaved 1F1B runs micro-batches in groups of {ranks}, which does not divide "
            f"{micros}; use {math.ceil(micros / ranks) * ranks} micro-batches"
        )
    total = micros * chunks
    schedule: Schedule = {}
    for rank in range(ranks):
        if chunks == 1:
            warm = min(micros, ranks - 1 - rank)
        else:
            warm = min(total, 2 * (ranks - 1 - rank) + (chunks - 1) * ranks)
        order = []
        for i in range(total + warm):
            if i < total:
                chunk, micro = _grouped(i, ranks, chunks)
                order.append(Action(chunk * ranks + rank, "F", micro))
            if i >= warm:
                chunk, micro = _grouped(i - warm, ranks, chunks)
                order.append(Action((chunks - 1 - chunk) * ranks + rank, "B", micro))
        schedule[rank] = order
    return schedule


def _grouped(i: int, group: int, chunks: int) -> tuple[int, int]:
    """Chunk and micro-batch of the i-th forward: `group` micro-batches pass each chunk in turn."""
    if chunks == 1:
        return 0, i
    return i // group % chunks, i // (group * chunks) * group + i % group


def breadth_first(ranks: int, chunks: int, micros: int) -> Schedule:
    """All micro-batches pass a chunk before any passes the next; all are held at the peak.

    Source: Lamy-Poirier, "Breadth-First Pipeline Parallelism", 2022.
    """
    schedule: Schedule = {}
    for rank in range(ranks):
        forward = [Action(c * ranks + rank, "F", j) for c in range(chunks) for j in range(micros)]
        backward = [
            Action(c * ranks + rank, "B", j) for c in reversed(range(chunks)) for j in range(micros)
        ]
        schedule[rank] = forward + backward
    return schedule


def gis(ranks: int, chunks: int, micros: int, group: int) -> Schedule:
    """Generalised interleaving: groups of `group` micro-batches, backward split in I and W.

    Peak on rank r: ranks + group * (chunks - 1) - r chunks. GIS-H is group = ceil(ranks / 2).

    Source: Wan et al., "PipeOffload: Improving Scalability of Pipeline Parallelism with Memory
    Optimization", 2025.

    Raises:
        UsageError: `group` is outside ceil(ranks / 2) to ranks, or does not divide `micros`.
    """
    if not math.ceil(ranks / 2) <= group <= ranks:
        raise UsageError(
            f"group={group} is outside {math.ceil(ranks / 2)} (half of the ranks, rounded up) to "
            f"{ranks} (all ranks)"
        )
    if micros % group:
        raise UsageError(
            f"{micros} micro-batches are not a multiple of group={group}; use "
            f"{math.ceil(micros / group) * group}"
        )
    return _in_order(_repeated(ranks, chunks, micros, lifetime=group, group=group), ranks)


def uniform(ranks: int, chunks: int, micros: int, lifetime: int | None = None) -> Schedule:
    """Uniform repeat: every micro-batch passes at the same pace, so that copies can be even.

    Args:
        lifetime: micro-batches between two chunks of one micro-batch; by default half of the
            ranks, rounded up. More leaves room where actions last unequally long.

    Source: as `gis`.
    """
    return _in_order(uniform_slots(ranks, chunks, micros, lifetime), ranks)


def uniform_slots(
    ranks: int, chunks: int, micros: int, lifetime: int | None = None
) -> dict[Action, int]:
    """When each action of `uniform` starts, in thirds of a micro-batch's time on a chunk."""
    least = math.ceil(ranks / 2)
    lifetime = least if lifetime is None else lifetime
    if lifetime < least:
        raise UsageError(f"lifetime={lifetime} is less than half of {ranks} ranks; use {least}")
    return _repeated(ranks, chunks, micros, lifetime=lifetime, group=1)


def _repeated(
    ranks: int, chunks: int, micros: int, *, lifetime: int, group: int
) -> dict[Action, int]:
    """Slots of one building block for each group of micro-batches, put side by side.

    A slot is one third of what a micro-batch costs on a chunk: F, I or W. Forward and backward of
    a chunk follow those of the chunk before by `apart` slots, moved by whole groups where that
    would meet another chunk's slots when the block repeats.
    """
    steps = math.ceil(lifetime / group)
    apart, period = 3 * steps * group, 3 * group * chunks
    wrap = chunks // math.gcd(chunks, steps)
    offset = [apart * c + 3 * group * (c // wrap) for c in range(chunks)]
    slots: dict[Action, int] = {}
    for rank in range(ranks):
        # The backward comes to this rank after I and W of all ranks behind it.
        turn = offset[-1] + rank + 1 + 3 * (ranks - 1 - rank)
        for micro in range(micros):
            shift = micro // group * period + 3 * (micro % group)
            for position in range(chunks):
                at = offset[position] + shift
                ahead, back = position * ranks + rank, (chunks - 1 - position) * ranks + rank
                slots[Action(ahead, "F", micro)] = at + rank
                slots[Action(back, "I", micro)] = at + turn
                slots[Action(back, "W", micro)] = at + turn + 1
    return slots


def _in_order(slots: dict[Action, int], ranks: int) -> Schedule:
    schedule: Schedule = {rank: [] for rank in range(ranks)}
    for action in sorted(slots, key=slots.__getitem__):
        schedule[action.stage % ranks].append(action)
    return schedule


def split_backward(schedule: Schedule) -> Schedule:
    """Each B as I and then W."""
    return {
        rank: [
            part
            for a in order
            for part in ([a._replace(kind=k) for k in "IW"] if a.kind == "B" else [a])
        ]
        for rank, order in schedule.items()
    }


def zero_bubble(ranks: int, micros: int) -> Schedule:
    """ZB-H1: 1F1B whose weight gradients wait on the later ranks, so that they fill the bubble.

    No rank holds more than 1F1B's first: min(micros, ranks) chunks.

    Source: Qi et al., "Zero Bubble Pipeline Parallelism", 2024.
    """
    schedule: Schedule = {}
    for rank, order in one_f_one_b(ranks, 1, micros).items():
        split: list[Action] = []
        waiting: list[Action] = []
        for action in order:
            if action.kind == "F":
                split.append(action)
                continue
            split.append(action._replace(kind="I"))
            waiting.append(action._replace(kind="W"))
            if len(waiting) > rank:
                split.append(waiting.pop(0))
        schedule[rank] = split + waiting
    return schedule


ORDERS = ("1f1b", "bfs", "gis", "uniform", "zero-bubble")


def make(order: str, ranks: int, chunks: int, micros: int, group: int | None = None) -> Schedule:
    """The schedule of a name in `ORDERS`; `group` is that of gis and the lifetime of uniform.

    Raises:
        UsageError: unknown name, or sizes that the schedule cannot have.
    """
    for name, size in (("ranks", ranks), ("chunks", chunks), ("micros", micros)):
        if size < 1:
            raise UsageError(f"{name}={size}: a schedule needs at least 1")
    match order:
        case "1f1b":
            return one_f_one_b(ranks, chunks, micros)
        case "bfs":
            return breadth_first(ranks, chunks, micros)
        case "gis":
            return gis(ranks, chunks, micros, math.ceil(ranks / 2) if group is None else group)
        case "uniform":
            return uniform(ranks, chunks, micros, group)
        case "zero-bubble":
            if chunks > 1:
                raise UsageError(f"zero-bubble has one chunk for each rank, not {chunks}")
            return zero_bubble(ranks, micros)
    raise unknown("schedule", order, ORDERS)


def validate(schedule: Schedule) -> None:
    """Check that a schedule is complete and can run.

    Raises:
        UsageError: an action is on the wrong rank, missing, twice or out of order, or the ranks
            would wait for each other in a circle.
    """
    seen: dict[tuple[int, int], str] = {}
    for rank, order in schedule.items():
        for action in order:
            key = action.stage, action.micro
            before = seen.get(key, "")
            if action.stage % len(schedule) != rank or (before, action.kind) not in (
                ("", "F"),
                ("F", "B"),
                ("F", "I"),
                ("FI", "W"),
            ):
                raise UsageError(
                    f"{action} on rank {rank} comes after {before or 'nothing'}; each stage and "
                    "micro-batch needs F, then B or I and W, on rank stage % ranks"
                )
            seen[key] = before + action.kind
    stages = 1 + max((stage for stage, _ in seen), default=0)
    micros = 1 + max((micro for _, micro in seen), default=0)
    for stage in range(stages):
        for micro in range(micros):
            if seen.get((stage, micro), "") not in ("FB", "FIW"):
                done = seen.get((stage, micro), "") or "nothing"
                raise UsageError(f"stage {stage}, micro-batch {micro} has only {done}")
    simulate(Task(a, rank, 1, tuple(needs(a, stages, seen))) for rank, a in _all(schedule))


def needs(
    action: Action, stages: int, parts: dict[tuple[int, int], str] | None = None
) -> Iterator[Action]:
    """The actions of other ranks, and of its own micro-batch, that must end before it starts.

    Args:
        parts: what each (stage, micro) consists of, "FB" or "FIW"; by default "FIW".
    """
    stage, kind, micro = action
    if kind == "F":
        if stage:
            yield Action(stage - 1, "F", micro)
    elif kind == "W":
        yield Action(stage, "I", micro)
    else:
        yield Action(stage, "F", micro)
        if stage + 1 < stages:
            part = "I" if parts is None or "I" in parts[stage + 1, micro] else "B"
            yield Action(stage + 1, part, micro)


def _all(schedule: Schedule) -> Iterator[tuple[int, Action]]:
    return ((rank, action) for rank, order in schedule.items() for action in order)


def peak_chunks(schedule: Schedule, offloaded: int = 0) -> list[int]:
    """Most chunk activations held at once, per rank.

    Args:
        offloaded: chunks from the first that leave the device after F and come back before I or
            B, at once.
    """
    peaks = []
    for _, order in sorted(schedule.items()):
        held = peak = 0
        for stage, kind, _ in order:
            away = stage // len(schedule) < offloaded
            if kind == "F" or (away and kind in "IB"):
                held += 1
            peak = max(peak, held)
            if kind in "WB" or (away and kind == "F"):
                held -= 1
        peaks.append(peak)
    return peaks
