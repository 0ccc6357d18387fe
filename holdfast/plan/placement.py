"""Placements of a program's tensors in a small fast and a large slow memory, and what they cost.

A storage is in fast memory during residencies. One that begins with a write is born there; any
other is copied in from slow memory by a copy engine while earlier instructions run. What was
written in fast memory has no copy in slow memory, so that it stays until its last use; results are
therefore written to slow memory. An instruction takes as long as its arithmetic or as its memory
traffic, whichever is longer.

In each instruction the engine has as much time as the instruction takes at best, so that no
instruction ever waits for a copy, whatever else is placed.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from holdfast.errors import UsageError
from holdfast.plan.pack import gap_offset
from holdfast.plan.placement_program import Program, Use
from holdfast.plan.simulate import Change, Task, Trace, simulate


@dataclass(frozen=True)
class TwoLevel:
    """Fast memory of `capacity` bytes beside slow memory; bandwidths in bytes per second.

    `copy` is the engine's, `latency` the nanoseconds before a copy's first byte.
    """

    capacity: int
    slow: float = 100e9
    fast: float = 1000e9
    copy: float = 50e9
    latency: int = 500

    def __post_init__(self) -> None:
        if self.capacity < 0 or self.latency < 0:
            raise UsageError(
                f"capacity={self.capacity} and latency={self.latency} must be 0 or more"
            )
        if not 0 < self.slow <= self.fast or self.copy <= 0:
            raise UsageError(
                f"bandwidths slow={self.slow:g}, fast={self.fast:g}, copy={self.copy:g} must be "
                "positive, and fast not below slow"
            )


@dataclass(frozen=True)
class Residency:
    """`uses` of one storage, served at `offset` from instruction `start` to `end`, both included.

    `chunks` are (instruction, nanoseconds) of the copy that precedes the first use; a residency
    without is born in fast memory.
    """

    storage: int
    uses: tuple[int, ...]
    start: int
    end: int
    offset: int
    chunks: tuple[tuple[int, int], ...] = ()


class Costs:
    """What each use, copy and instruction of a program costs on a hardware, in nanoseconds."""

    def __init__(self, program: Program, hardware: TwoLevel):
        self.program, self.hardware = program, hardware
        uses, storages = program.uses, program.storages
        self.slow = [_nanoseconds(u.nbytes, hardware.slow) for u in uses]
        self.fast = [_nanoseconds(u.nbytes, hardware.fast) for u in uses]
        self.copies = [hardware.latency + _nanoseconds(s.nbytes, hardware.copy) for s in storages]
        self.compute = [i.compute for i in program.instructions]
        self.all_slow = [0] * len(self.compute)
        best = [0] * len(self.compute)
        for u in uses:
            self.all_slow[u.instruction] += self.slow[u.index]
            best[u.instruction] += (self.fast if self.may_be_fast(u) else self.slow)[u.index]
        self.idle = [max(pair) for pair in zip(self.compute, best, strict=True)]

    def may_be_fast(self, use: Use) -> bool:
        storage = self.program.storages[use.storage]
        return storage.nbytes <= self.hardware.capacity and not (storage.result and use.writes)

    @cached_property
    def slowest(self) -> int:
        """The program's time with everything in slow memory."""
        return sum(max(pair) for pair in zip(self.compute, self.all_slow, strict=True))

    def total(self, fast_uses: Iterable[int]) -> int:
        """The program's time when these uses are served from fast memory."""
        memory = list(self.all_slow)
        for u in fast_uses:
            memory[self.program.uses[u].instruction] -= self.slow[u] - self.fast[u]
        return sum(max(pair) for pair in zip(self.compute, memory, strict=True))


def _nanoseconds(nbytes: int, bandwidth: float) -> int:
    return -int(-nbytes * 1e9 // bandwidth)


class Layout:
    """Residencies that fit together: bytes, the copy engine, and the program's time with them."""

    def __init__(self, costs: Costs):
        self.costs = costs
        self.program = costs.program
        self.residencies: set[Residency] = set()
        self.idle = list(costs.idle)
        self.memory = list(costs.all_slow)
        self.total = costs.slowest

    def gain(self, use: int) -> int:
        """Nanoseconds that serving this use from fast memory would save now."""
        i = self.program.uses[use].instruction
        compute, memory = self.costs.compute[i], self.memory[i]
        saved = self.costs.slow[use] - self.costs.fast[use]
        return max(compute, memory) - max(compute, memory - saved)

    def offset(
        self,
        start: int,
        end: int,
        nbytes: int,
        *,
        reserved: Iterable[Residency] = (),
        high: bool = False,
    ) -> int | None:
        """The tightest gap that is free from `start` to `end`; None if there is none.

        Args:
            reserved: residencies to come, whose bytes count as taken.
            high: at the gap's upper end, so that what lives long does not cut up the rest.
        """
        coming = [r for r in reserved if r.start <= end and start <= r.end]
        busy = [(r.offset, r.offset + self._size(r)) for r in [*self.meeting(start, end), *coming]]
        capacity = self.costs.hardware.capacity
        found = gap_offset(busy, nbytes)
        if found + nbytes > capacity:
            return None
        if high:
            return min((low for low, _ in busy if low >= found + nbytes), default=capacity) - nbytes
        return found

    def chunks(self, use: int) -> tuple[tuple[int, int], ...] | None:
        """The latest time of the engine for a copy before this use; None if there is too little.

        Late copies hold bytes for the shortest time. They begin after the storage's use before.
        """
        at = self.program.uses[use]
        first = 0 if at.before is None else self.program.uses[at.before].instruction + 1
        left = self.costs.copies[at.storage]
        found = []
        for i in range(at.instruction - 1, first - 1, -1):
            part = min(left, self.idle[i])
            if part:
                found.append((i, part))
                left -= part
            if not left:
                return tuple(reversed(found))
        return None

    def find(
        self, uses: Sequence[int], reserved: Iterable[Residency] = (), until: int | None = None
    ) -> Residency | None:
        """Where these consecutive uses of one storage fit together, as the layout is now.

        Args:
            reserved: residencies to come, whose bytes count as taken.
            until: the instruction to whose end the bytes have to be free beyond the last use.
        """
        first, last = self.program.uses[uses[0]], self.program.uses[uses[-1]]
        storage = self.program.storages[first.storage]
        copied = first.before is not None or storage.given
        chunks = self.chunks(first.index) if copied else ()
        if chunks is None:
            return None
        start = chunks[0][0] if copied else first.instruction
        end = max(last.instruction, until or 0)
        offset = self.offset(
            start, end, storage.nbytes, reserved=reserved, high=end > last.instruction
        )
        if offset is None:
            return None
        return Residency(first.storage, tuple(uses), start, last.instruction, offset, chunks)

    def add(self, residency: Residency) -> None:
        self.residencies.add(residency)
        self._count(residency, 1)

    def remove(self, residency: Residency) -> None:
        self.residencies.remove(residency)
        self._count(residency, -1)

    def meeting(self, start: int, end: int) -> list[Residency]:
        """Residencies that are there at some time from `start` to `end`."""
        return [r for r in self.residencies if r.start <= end and start <= r.end]

    def _count(self, residency: Residency, sign: int) -> None:
        for i, part in residency.chunks:
            self.idle[i] -= sign * part
        for u in residency.uses:
            i = self.program.uses[u].instruction
            compute = self.costs.compute[i]
            self.total -= max(compute, self.memory[i])
            self.memory[i] -= sign * (self.costs.slow[u] - self.costs.fast[u])
            self.total += max(compute, self.memory[i])

    def _size(self, residency: Residency) -> int:
        return self.program.storages[residency.storage].nbytes


@dataclass(frozen=True)
class Placement:
    """A complete answer: residencies, the program's nanoseconds, and who found it.

    `bound` is a time below which no placement exists, 0 where none was computed; `optimal` says
    that it is proven that none is faster.
    """

    program: Program = field(repr=False)
    hardware: TwoLevel
    residencies: tuple[Residency, ...]
    total: int
    method: str
    bound: int = 0
    optimal: bool = False

    @classmethod
    def of(cls, layout: Layout, method: str) -> "Placement":
        residencies = tuple(sorted(layout.residencies, key=lambda r: (r.start, r.offset)))
        hardware = layout.costs.hardware
        return cls(layout.program, hardware, residencies, layout.total, method)

    @property
    def slowest(self) -> int:
        """Nanoseconds with everything in slow memory."""
        return Costs(self.program, self.hardware).slowest

    @property
    def height(self) -> int:
        """Bytes of fast memory up to the highest that is ever held."""
        sizes = self.program.storages
        return max((r.offset + sizes[r.storage].nbytes for r in self.residencies), default=0)

    def offsets(self, instruction: int) -> dict[str, int]:
        """Tensors that are in fast memory during an instruction, and where; aliases are equal."""
        here = {
            self.program.storages[r.storage].name: r.offset
            for r in self.residencies
            if r.start <= instruction <= r.end
        }
        tensors = self.program.tensors
        return {t.name: here[t.alias or t.name] for t in tensors if (t.alias or t.name) in here}


def validate(placement: Placement) -> Trace:
    """Replay a placement by events, apart from what made it.

    Raises:
        UsageError: residencies that overlap or end above the capacity, a copy of what slow memory
            does not hold, an engine asked for more than it has, or another time than predicted.
    """
    program, hardware = placement.program, placement.hardware
    seen: list[tuple[Residency, int, int]] = []
    served: set[int] = set()
    for r in placement.residencies:
        storage = program.storages[r.storage]
        low, high = r.offset, r.offset + storage.nbytes
        if low < 0 or high > hardware.capacity:
            raise UsageError(f"{storage.name} ends at byte {high} of {hardware.capacity}")
        for other, bottom, top in seen:
            together = r.start <= other.end and other.start <= r.end
            if together and low < top and bottom < high:
                raise UsageError(
                    f"{storage.name} and {program.storages[other.storage].name} overlap at byte "
                    f"{max(low, bottom)} in instruction {max(r.start, other.start)}"
                )
        seen.append((r, low, high))
        served.update(_checked_uses(program, r))
    _check_contents(program, placement.residencies, served)
    trace = simulate(_tasks(placement, served))
    if trace.end != placement.total:
        raise UsageError(f"the replay takes {trace.end} ns, the placement says {placement.total}")
    return trace


def _checked_uses(program: Program, r: Residency) -> tuple[int, ...]:
    uses = [program.uses[u] for u in r.uses]
    name = program.storages[r.storage].name
    follow = all(a.after == b.index for a, b in itertools.pairwise(uses))
    if not follow or any(u.storage != r.storage for u in uses):
        raise UsageError(f"a residency of {name} must serve uses that follow each other")
    if r.end != uses[-1].instruction or r.start > uses[0].instruction:
        raise UsageError(f"a residency of {name} must last from its start to its last use")
    return r.uses


def _check_contents(program: Program, residencies: Sequence[Residency], served: set[int]) -> None:
    """Slow memory must hold what is read or copied from it, and every result at the end."""
    copied = {r.uses[0]: r for r in residencies if r.chunks}
    born = {r.uses[0] for r in residencies if not r.chunks}
    for storage in program.storages:
        in_slow = storage.given
        for u in storage.uses:
            use = program.uses[u]
            if u in born and (use.before is not None or storage.given):
                raise UsageError(f"{storage.name} is not born at {use.instruction}; copy it")
            if u in copied:
                before = -1 if use.before is None else program.uses[use.before].instruction
                if not in_slow or copied[u].start <= before:
                    raise UsageError(f"slow memory does not hold {storage.name} to copy it")
            if u not in served:
                if use.reads and not in_slow:
                    raise UsageError(f"slow memory does not hold {storage.name} to read it")
                in_slow = True
            elif use.writes:
                in_slow = False
        if storage.result and not in_slow:
            raise UsageError(f"the result {storage.name} does not reach slow memory")


def _tasks(placement: Placement, served: set[int]) -> list[Task]:
    program, hardware = placement.program, placement.hardware
    traffic = [0] * len(program.instructions)
    for use in program.uses:
        bandwidth = hardware.fast if use.index in served else hardware.slow
        traffic[use.instruction] += _nanoseconds(use.nbytes, bandwidth)
    waits: dict[int, list] = {}
    copies: list[tuple[int, Task]] = []
    holds: dict[int, list[Change]] = {}
    for k, r in enumerate(placement.residencies):
        nbytes = program.storages[r.storage].nbytes
        needed = hardware.latency + _nanoseconds(nbytes, hardware.copy) if r.chunks else 0
        if sum(part for _, part in r.chunks) != needed:
            raise UsageError(f"the copy of residency {k} takes {needed} ns, not what it was given")
        holds.setdefault(r.start, []).append(Change(0, "fast", "buffers", nbytes))
        holds.setdefault(r.end, []).append(Change(0, "fast", "buffers", -nbytes, at="end"))
        for i, part in r.chunks:
            after = (("run", i - 1),) if i else ()
            copies.append((i, Task(("copy", k, i), (0, "copy"), part, after)))
        if r.chunks:
            first = program.uses[r.uses[0]].instruction
            waits.setdefault(first, []).append(("copy", k, r.chunks[-1][0]))
    runs = [
        Task(
            ("run", i),
            (0, "compute"),
            max(instruction.compute, traffic[i]),
            tuple(waits.get(i, ())),
            tuple(holds.get(i, ())),
        )
        for i, instruction in enumerate(program.instructions)
    ]
    # The engine works through each instruction's chunks before it turns to the next one's.
    return runs + [task for _, task in sorted(copies, key=lambda pair: pair[0])]
