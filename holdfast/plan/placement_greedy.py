"""Placements by rules: the greedy one of compilers, and a local search from there."""

import itertools
import random
import time
from collections.abc import Iterable, Sequence

from holdfast.plan.placement import Costs, Layout, Placement, Residency, TwoLevel
from holdfast.plan.placement_program import Program

Group = tuple[int, ...]


class _Groups:
    """Consecutive uses of one storage that can be served together, and what they are worth."""

    def __init__(self, costs: Costs):
        self.costs, self.program = costs, costs.program
        empty = Layout(costs)
        self.gain = [empty.gain(u.index) for u in self.program.uses]

    def longest(self) -> list[Group]:
        """For each storage the longest runs of uses that may be fast."""
        found: list[Group] = []
        for storage in self.program.storages:
            run: list[int] = []
            for u in storage.uses:
                if self.costs.may_be_fast(self.program.uses[u]):
                    run.append(u)
                elif run:
                    found.append(tuple(run))
                    run = []
            if run:
                found.append(tuple(run))
        return found

    def shorter(self, group: Group) -> list[Group]:
        """What to try where a group does not fit: without its first use, or its halves.

        What is written in fast memory stays until its last use, so such a group keeps its end.
        """
        if len(group) == 1:
            return []
        if any(self.program.uses[u].writes for u in group):
            first = next(i for i, u in enumerate(group) if self.program.uses[u].writes)
            # Later uses can be copied once the write went to slow memory.
            return [g for g in (group[:first], group[first + 1 :]) if g]
        half = len(group) // 2
        return [group[1:], group[:half], group[half:]]

    def priority(self, group: Group) -> float:
        """Nanoseconds saved per byte and instruction."""
        first, last = self.program.uses[group[0]], self.program.uses[group[-1]]
        nbytes = self.program.storages[first.storage].nbytes
        lifetime = last.instruction - first.instruction + 1
        return sum(self.gain[u] for u in group) / (nbytes * lifetime)


def greedy(program: Program, hardware: TwoLevel) -> Placement:
    """By benefit per byte and lifetime, as compilers do: best fit, then a retry after eviction."""
    layout = Layout(Costs(program, hardware))
    groups = _Groups(layout.costs)
    _insert(layout, groups, sorted(groups.longest(), key=groups.priority, reverse=True))
    return Placement.of(layout, "greedy")


def local_search(
    program: Program,
    hardware: TwoLevel,
    seconds: float = 1.0,
    seed: int = 0,
    rounds: int | None = None,
) -> Placement:
    """From greedy on: clear a stretch of time, fill it in another order, keep what is no worse.

    It ends after `seconds`, or after `rounds` such attempts.
    """
    draw = random.Random(seed)
    layout = Layout(Costs(program, hardware))
    groups = _Groups(layout.costs)
    everything = groups.longest()
    _insert(layout, groups, sorted(everything, key=groups.priority, reverse=True))
    deadline = time.monotonic() + seconds
    length = len(program.instructions)
    for tried in itertools.count():
        if time.monotonic() >= deadline or tried == rounds:
            break
        before, held = layout.total, set(layout.residencies)
        start = draw.randrange(length)
        end = start + draw.choice((0, 1, 2, 4, length))
        for r in layout.meeting(start, end):
            if draw.random() < 0.7:
                layout.remove(r)
        weight = {g: groups.priority(g) * draw.lognormvariate(0, 1) for g in everything}
        _insert(layout, groups, sorted(everything, key=weight.__getitem__, reverse=True))
        if layout.total > before:
            for r in layout.residencies - held:
                layout.remove(r)
            for r in held - layout.residencies:
                layout.add(r)
    return Placement.of(layout, "local search")


def _insert(layout: Layout, groups: _Groups, order: Iterable[Group]) -> None:
    """Try groups in order; where one fits neither so nor after evictions, try shorter ones."""
    served = {u for r in layout.residencies for u in r.uses}
    queue = list(order)
    evicted: set[Group] = set()
    while queue:
        group = queue.pop(0)
        if served.intersection(group):
            continue
        lost = _place(layout, group)
        if lost is None:
            queue[:0] = groups.shorter(group)
            continue
        served.update(group)
        for r in lost:
            served.difference_update(r.uses)
            if r.uses not in evicted:
                evicted.add(r.uses)
                queue.append(r.uses)


def _place(layout: Layout, group: Group) -> Sequence[Residency] | None:
    """Add a group if that saves time; returns what had to go for it, None if it was not added."""
    before = layout.total
    uses = layout.program.uses
    found = layout.find(group)
    removed: list[Residency] = []
    if found is None:
        at = uses[group[0]]
        earliest = 0 if at.before is None else uses[at.before].instruction + 1
        worth = {r: sum(map(layout.costs.slow.__getitem__, r.uses)) for r in layout.residencies}
        for r in sorted(layout.meeting(earliest, uses[group[-1]].instruction), key=worth.get):  # type: ignore[arg-type]
            layout.remove(r)
            removed.append(r)
            found = layout.find(group)
            if found is not None or layout.total - before >= sum(
                layout.costs.slow[u] for u in group
            ):
                break
    if found is not None:
        layout.add(found)
        if layout.total < before:
            return removed
        layout.remove(found)
    for r in removed:
        layout.add(r)
    return None
