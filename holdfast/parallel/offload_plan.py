"""When each saved activation of a pipeline leaves the device and when it comes back.

Everything is decided before the first step, from the schedule and the costs of its actions: copies
get slots on one copy stream per rank, and what starts at which position of a rank's order. The
runtime follows the positions, whatever its clock says, so its bytes are those of the simulation.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import NamedTuple

from holdfast.errors import UsageError
from holdfast.parallel.schedule import Action, Schedule, needs
from holdfast.plan.simulate import Change, Task, Trace, simulate


@dataclass(frozen=True)
class StageCost:
    """One micro-batch on one stage: integer nanoseconds, and bytes.

    `saved` is what a forward saves and could be moved, `left` what of it W still needs after I (by
    default all), `save` and `load` what it takes to copy `saved` off the device and back, `hop`
    what it takes to send an output to the next stage. A backward that is not split costs
    `input + weight`.
    """

    forward: int
    input: int
    weight: int
    saved: int
    save: int = 0
    load: int = 0
    hop: int = 0
    left: int | None = None

    def of(self, kind: str) -> int:
        parts = {"F": self.forward, "I": self.input, "W": self.weight}
        return parts[kind] if kind in parts else self.input + self.weight

    def freed(self, kind: str) -> int:
        """Bytes that go at the end of I, W or B."""
        left = self.saved if self.left is None else self.left
        return {"I": self.saved - left, "W": left, "B": self.saved}[kind]

    @property
    def compute(self) -> int:
        return self.forward + self.input + self.weight


class Move(NamedTuple):
    """Before an action: drop a forward's bytes from the device, or begin to load them."""

    kind: str  # "release" or "load"
    stage: int
    micro: int


@dataclass(frozen=True)
class OffloadPlan:
    """Which forwards leave the device and what happens before each position of a rank's order.

    A rank's copies are asked for in the order of `slots`; with `pair`, two ranks that share a bus
    start their slots together and copy in opposite directions.
    """

    schedule: Schedule
    offloaded: int = 0
    asynchronous: bool = True
    moved: frozenset[tuple[int, int]] = frozenset()
    moves: dict[int, dict[int, list[Move]]] = field(default_factory=dict)
    pair: bool = False
    slots: dict[tuple[str, int, int], int] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        return len(self.schedule)

    @property
    def stages(self) -> int:
        return 1 + max(a.stage for order in self.schedule.values() for a in order)

    @property
    def micros(self) -> int:
        return 1 + max(a.micro for order in self.schedule.values() for a in order)


def ratio(costs: Sequence[StageCost]) -> float:
    """Copying against computing, the k of the paper: the worst stage's (save + load) / compute."""
    return max((c.save + c.load) / c.compute for c in costs)


def plan_offload(
    schedule: Schedule,
    costs: Sequence[StageCost],
    offloaded: int,
    *,
    asynchronous: bool = True,
    pair: bool = False,
    slots: dict[Action, int] | None = None,
) -> OffloadPlan:
    """Move the first `offloaded` chunks of each rank off the device between forward and backward.

    Args:
        costs: one for each stage.
        asynchronous: copy beside the computation; else each forward waits until its bytes are
            copied away, and each backward until they are back.
        pair: ranks 2p and 2p + 1 share a bus; their copies alternate in direction.
        slots: of `uniform_slots`, to keep that pace to the end. Without it actions start as soon
            as they can, which is faster where copies have time to spare.

    Raises:
        UsageError: there are fewer chunks, an odd number of ranks is to be paired, or copies are
            so slow that something would have to come back before it is gone; names the knob.
    """
    plan = OffloadPlan(schedule, offloaded, asynchronous, pair=pair)
    ranks, chunks = plan.ranks, plan.stages // plan.ranks
    if not 0 <= offloaded <= chunks:
        raise UsageError(f"offload={offloaded} of {chunks} chunks per rank; use 0 to {chunks}")
    if pair and ranks % 2:
        raise UsageError(f"pair=True needs an even number of ranks, not {ranks}; use pair=False")
    if not offloaded:
        return plan
    moved: set[tuple[int, int]] = set()
    moves: dict[int, dict[int, list[Move]]] = {rank: defaultdict(list) for rank in schedule}
    taken: dict[tuple[str, int, int], int] = {}
    times = _times(schedule, costs, slots) if asynchronous else {}
    widest = {
        rank: max(max(costs[a.stage].save, costs[a.stage].load) for a in order)
        for rank, order in schedule.items()
    }
    for rank, order in schedule.items():
        if not asynchronous:
            for position, action in enumerate(order):
                if action.stage < offloaded * ranks and action.kind in "IB":
                    moves[rank][position].append(Move("load", action.stage, action.micro))
                    moved.add((action.stage, action.micro))
            continue
        slot = max(widest[rank], widest[rank ^ 1]) if pair else widest[rank]
        found = _copies(rank, order, costs, offloaded * ranks, times, max(slot, 1), pair)
        starts = [times[action] for action in order]
        for (stage, micro), (save, load) in sorted(found.items(), key=lambda item: item[1]):
            gone, back = (save + 1) * slot, load * slot
            release = next(p for p, start in enumerate(starts) if start >= gone)
            begin = max(p for p, start in enumerate(starts) if start <= back)
            if begin < release:
                continue
            moved.add((stage, micro))
            taken["save", stage, micro], taken["load", stage, micro] = save, load
            moves[rank][release].append(Move("release", stage, micro))
            moves[rank][begin].append(Move("load", stage, micro))
        for waiting in moves[rank].values():
            # What leaves makes room for what comes; loads in the order of their slots.
            waiting.sort(key=lambda m: (m.kind == "load", taken.get((m.kind, *m[1:]), 0)))
        # Copies run in the order in which they are asked for; the slots at which a pair meets
        # follow that order.
        reached = 0
        for copy in _asked(order, moves[rank], moved):
            taken[copy] = reached = max(taken[copy], reached)
    return OffloadPlan(
        schedule,
        offloaded,
        asynchronous,
        frozenset(moved),
        {rank: dict(at) for rank, at in moves.items()},
        pair,
        taken,
    )


def _asked(
    order: list[Action], moves: dict[int, list[Move]], moved: set[tuple[int, int]]
) -> Iterator[tuple[str, int, int]]:
    for position, (stage, kind, micro) in enumerate(order):
        yield from ((m.kind, m.stage, m.micro) for m in moves.get(position, []) if m.kind == "load")
        if kind == "F" and (stage, micro) in moved:
            yield "save", stage, micro


def _copies(
    rank: int,
    order: list[Action],
    costs: Sequence[StageCost],
    below: int,
    times: dict[Action, int],
    slot: int,
    pair: bool,
) -> dict[tuple[int, int], tuple[int, int]]:
    """Slots of one rank's copies: (stage, micro) -> (save slot, load slot).

    Slots alternate in direction; before the first load all may save. Saves take the first slot
    after their forward, loads the last one that ends a backward's time before their backward.
    """
    odd = rank % 2 if pair else 0
    forwards = {
        (a.stage, a.micro): times[a] + costs[a.stage].forward
        for a in order
        if a.kind == "F" and a.stage < below
    }
    backwards = {(a.stage, a.micro): times[a] for a in order if a.kind in "IB"}
    loads: dict[tuple[int, int], int] = {}
    free = None
    for key in sorted(forwards, key=backwards.__getitem__, reverse=True):
        cost = costs[key[0]]
        if backwards[key] - forwards[key] <= 3 * (cost.save + cost.load):
            continue  # soon needed again
        last = (backwards[key] - cost.input) // slot - 1
        if free is not None:
            last = min(last, free - 2)
        if last % 2 != (1 - odd):
            last -= 1
        loads[key] = free = last
    first = min(loads.values(), default=0)
    found: dict[tuple[int, int], tuple[int, int]] = {}
    taken = -1
    for key in sorted(loads, key=forwards.__getitem__):
        at = max(taken + 1, -(-forwards[key] // slot))
        if at >= first and at % 2 != odd:
            at += 1
        if at >= loads[key]:
            stage, micro = key
            raise UsageError(
                f"rank {rank} cannot copy stage {stage}, micro-batch {micro} away (slot {at} of "
                f"{slot} ns) before it has to come back (slot {loads[key]}): copying is too slow "
                "for so many chunks; reduce offload"
            )
        found[key] = at, loads[key]
        taken = at
    return found


def _times(
    schedule: Schedule, costs: Sequence[StageCost], slots: dict[Action, int] | None
) -> dict[Action, int]:
    """Start of each action, forwards of the warm-up as late as nobody has to wait for them.

    Started at once they would come faster than copies can leave, and their burst would be the
    peak.
    """
    tasks = list(_tasks(OffloadPlan(schedule), costs))
    if slots is not None:
        third = max(cost.compute for cost in costs) / 3
        # A pace: each action also waits for a clock of its own.
        clocks = [Task(("clock", a), ("clock", a), int(n * third)) for a, n in slots.items()]
        tasks = [
            replace(t, after=(*t.after, ("clock", t.name))) if isinstance(t.name, Action) else t
            for t in tasks
        ] + clocks
    trace = simulate(tasks)
    starts = {span.name: span.start for span in trace.spans if isinstance(span.name, Action)}
    stages = 1 + max(a.stage for a in starts)
    following: dict[Action, list[tuple[Action, int]]] = defaultdict(list)
    warm: set[Action] = set()
    for order in schedule.values():
        first = next(i for i, a in enumerate(order) if a.kind != "F")
        warm.update(order[:first])
        for i, (action, after) in enumerate(pairwise(order)):
            # One backward's time stays before the first backward.
            spare = costs[after.stage].input if i + 1 == first else 0
            following[action].append((after, spare))
    for action in starts:
        if action.kind == "F" and action.stage + 1 < stages:
            following[action].append(
                (Action(action.stage + 1, "F", action.micro), costs[action.stage].hop)
            )
    late = dict(starts)
    for action in sorted(warm, key=lambda a: (starts[a], a.stage), reverse=True):
        limits = [late[after] - spare for after, spare in following[action]]
        latest = min(limits) - costs[action.stage].forward
        late[action] = max(starts[action], latest)
    return late


def pipeline_tasks(plan: OffloadPlan, costs: Sequence[StageCost]) -> list[Task]:
    """The tasks of `timeline`, to be simulated among others."""
    return list(_tasks(plan, costs))


def timeline(plan: OffloadPlan, costs: Sequence[StageCost]) -> Trace:
    """Simulate a step: streams (rank, "compute"), (rank, "copy") and (rank, "net").

    Saved activations are on the device from the start of their forward to the end of their W or B,
    but for the time between release and load; on the host from the end of the forward.
    """
    return simulate(_tasks(plan, costs))


def _tasks(plan: OffloadPlan, costs: Sequence[StageCost]) -> Iterable[Task]:
    stages, asynchronous = plan.stages, plan.asynchronous
    parts: dict[tuple[int, int], str] = defaultdict(str)
    for order in plan.schedule.values():
        for action in order:
            parts[action.stage, action.micro] += action.kind
    if plan.pair:
        yield from _meetings(plan)
    for rank, order in sorted(plan.schedule.items()):
        for position, action in enumerate(order):
            stage, kind, micro = action
            cost = costs[stage]
            away = (stage, micro) in plan.moved
            phase = "forward" if kind == "F" else "backward"
            after: list[Hashable] = [
                ("hop", n) if n.stage != stage and costs[n.stage].hop else n
                for n in needs(action, stages, parts)
            ]
            holds = []
            loads = []
            for move in plan.moves.get(rank, {}).get(position, []):
                nbytes = costs[move.stage].saved
                if move.kind == "release":
                    after.append(("save", move.stage, move.micro))
                    holds.append(Change(rank, "device", "activations", -nbytes))
                else:
                    holds.append(Change(rank, "device", "activations", nbytes))
                    loads.append(move)
            if holds and asynchronous:
                begin = ("begin", rank, position)
                yield Task(begin, (rank, "compute"), 0, tuple(after), tuple(holds), phase)
                for _, s, j in loads:
                    wait = (begin, *_meeting(plan, "load", s, j))
                    yield Task(("load", s, j), (rank, "copy"), costs[s].load, wait, (), phase)
                after, holds = [], []
            duration = cost.of(kind)
            if away and asynchronous and kind in "IB":
                after.append(("load", stage, micro))
            elif away and not asynchronous:
                duration += {"F": cost.save, "W": 0}.get(kind, cost.load)
            if kind == "F":
                holds.append(Change(rank, "device", "activations", cost.saved))
                if away:
                    holds.append(Change(rank, "host", "activations", cost.saved, "end"))
                if away and not asynchronous:
                    holds.append(Change(rank, "device", "activations", -cost.saved, "end"))
            elif freed := cost.freed(kind):
                holds.append(Change(rank, "device", "activations", -freed, "end"))
                if away:
                    holds.append(Change(rank, "host", "activations", -freed, "end"))
            yield Task(action, (rank, "compute"), duration, tuple(after), tuple(holds), phase)
            if away and kind == "F" and asynchronous:
                wait = (action, *_meeting(plan, "save", stage, micro))
                yield Task(("save", stage, micro), (rank, "copy"), cost.save, wait, (), phase)
            sends = (kind == "F" and stage + 1 < stages) or (kind in "IB" and stage)
            if sends and cost.hop:
                yield Task(("hop", action), (rank, "net"), cost.hop, (action,), (), phase)


def _meeting(plan: OffloadPlan, kind: str, stage: int, micro: int) -> tuple:
    if not plan.pair:
        return ()
    return (("slot", stage % plan.ranks // 2, plan.slots[kind, stage, micro]),)


def _meetings(plan: OffloadPlan) -> Iterable[Task]:
    """Where two ranks of a pair wait for each other: before each slot that either uses."""
    used: dict[int, dict[int, list]] = defaultdict(lambda: defaultdict(list))
    for (kind, stage, micro), slot in plan.slots.items():
        used[stage % plan.ranks // 2][slot].append((kind, stage, micro))
    for pair, slots in sorted(used.items()):
        before: list = []
        for slot, copies in sorted(slots.items()):
            yield Task(("slot", pair, slot), ("pair", pair), 0, tuple(before))
            before = copies
