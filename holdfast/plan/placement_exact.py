"""The best placement, by mixed integer programming and exact packing.

HiGHS chooses which uses are fast, when copies begin and what the engine does, under the sum of the
bytes that are there at each instruction. Whether these bytes also have offsets is `pack`'s to
decide, exactly; where they have none, this choice of residencies and all that contain it are cut
off and HiGHS runs again. Without a cut the answer is optimal; the bound holds in any case.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from holdfast.errors import DoesNotFit
from holdfast.plan.pack import Buffer, pack
from holdfast.plan.placement import Costs, Layout, Placement, Residency, TwoLevel
from holdfast.plan.placement_program import Program


class _Model:
    """Rows and columns of the mixed integer program.

    For use u: `fast`, `stay` (its bytes are where the use before left them, or born here), `dirty`
    (slow memory lacks it afterwards); for each instruction i since the use before: `there` (its
    bytes are held) and `part` (nanoseconds of its copy). A copy is `fast` without `stay`.
    """

    def __init__(self, costs: Costs):
        self.costs, self.program = costs, costs.program
        self.low: list[float] = []
        self.high: list[float] = []
        self.whole: list[int] = []
        self.rows: list[tuple[dict[int, float], float, float]] = []
        uses = self.program.uses
        self.fast = [self.column(0, int(costs.may_be_fast(u)), whole=True) for u in uses]
        self.stay = [self.column(0, int(costs.may_be_fast(u)), whole=True) for u in uses]
        self.dirty = [self.column(0, 1) for _ in uses]
        self.time = [self.column(c, np.inf) for c in costs.compute]
        self.there: list[dict[int, int]] = []
        self.part: list[dict[int, int]] = []
        for u in uses:
            self._use(u)
        self._instructions()

    def column(self, low: float, high: float, *, whole: bool = False) -> int:
        self.low.append(low)
        self.high.append(high)
        self.whole.append(whole)
        return len(self.low) - 1

    def row(self, terms: dict[int, float], low: float = -np.inf, high: float = np.inf) -> None:
        self.rows.append((terms, low, high))

    def _use(self, u) -> None:
        fast, stay, dirty = self.fast[u.index], self.stay[u.index], self.dirty[u.index]
        storage = self.program.storages[u.storage]
        needed = self.costs.copies[u.storage]
        first = 0
        self.row({fast: 1, stay: -1}, low=0)
        if u.writes:
            self.row({dirty: 1, fast: -1}, low=0)
        if u.before is not None:
            first = self.program.uses[u.before].instruction + 1
            self.row({stay: 1, self.fast[u.before]: -1}, high=0)
            self.row({stay: 1, self.dirty[u.before]: -1}, low=0)
            self.row({dirty: 1, self.dirty[u.before]: -1}, low=0)
        elif storage.given:
            self.high[stay] = 0
        else:
            self.row({fast: 1, stay: -1}, high=0)  # born, never copied
        there = {u.instruction: fast}
        part: dict[int, int] = {}
        for i in range(u.instruction - 1, first - 1, -1):
            there[i] = self.column(0, self.high[fast], whole=True)
            self.row({there[i]: 1, there[i + 1]: -1}, high=0)
            if u.before is not None:
                self.row({there[i]: 1, stay: -1}, low=0)
            most = min(needed, self.costs.idle[i])
            part[i] = self.column(0, most)
            self.row({part[i]: 1, there[i]: -most}, high=0)
        self.row({**dict.fromkeys(part.values(), 1.0), fast: -needed, stay: needed}, 0, 0)
        self.there.append(there)
        self.part.append(part)

    def _instructions(self) -> None:
        sizes = [s.nbytes for s in self.program.storages]
        for i, most in enumerate(self.costs.idle):
            capacity = self.costs.hardware.capacity
            there = zip(self.program.uses, self.there, strict=True)
            held = {columns[i]: sizes[u.storage] for u, columns in there if i in columns}
            if held and capacity:
                self.row({c: n / capacity for c, n in held.items()}, high=1)
            engine = {part[i]: 1.0 for part in self.part if i in part}
            if len(engine) > 1:
                self.row(engine, high=most)
            saved: dict[int, float] = {self.time[i]: 1}
            for u in (u for u in self.program.uses if u.instruction == i):
                saved[self.fast[u.index]] = self.costs.slow[u.index] - self.costs.fast[u.index]
            self.row(saved, low=self.costs.all_slow[i])

    def solve(self, seconds: float):
        cost = np.zeros(len(self.low))
        cost[self.time] = 1
        entries = [(r, c, v) for r, (terms, _, _) in enumerate(self.rows) for c, v in terms.items()]
        rows, columns, values = map(np.array, zip(*entries, strict=True))
        matrix = csr_array((values, (rows, columns)), shape=(len(self.rows), len(cost)))
        limits = np.array([(low, high) for _, low, high in self.rows])
        return milp(
            cost,
            integrality=np.array(self.whole, int),
            bounds=Bounds(np.array(self.low), np.array(self.high)),
            constraints=LinearConstraint(matrix, limits[:, 0], limits[:, 1]),
            options={"time_limit": max(seconds, 0.01), "mip_rel_gap": 0},
        )

    def residencies(self, x: np.ndarray) -> list[Residency] | None:
        """What a solution holds from when to when, with whole nanoseconds of copying.

        None where the solver's tolerance let a copy have less time than it takes.
        """
        idle = list(self.costs.idle)
        found: list[Residency] = []
        for number, storage in enumerate(self.program.storages):
            runs: list[list[int]] = []
            for u in storage.uses:
                if x[self.fast[u]] > 0.5:
                    if x[self.stay[u]] > 0.5 and runs and runs[-1][-1] == self._before(u):
                        runs[-1].append(u)
                    else:
                        runs.append([u])
            for run in runs:
                start = min(i for i, c in self.there[run[0]].items() if x[c] > 0.5)
                end = self.program.uses[run[-1]].instruction
                found.append(Residency(number, tuple(run), start, end, 0))
        # Earliest deadline first is exact where each copy may use any time from its start on.
        chunks: dict[Residency, list[tuple[int, int]]] = {}
        left = {
            r: self.costs.copies[r.storage]
            for r in found
            if self.program.uses[r.uses[0]].before is not None
            or self.program.storages[r.storage].given
        }
        for i in range(len(idle)):
            waiting = [r for r in left if left[r] and r.start <= i]
            for r in sorted(waiting, key=lambda r: self.program.uses[r.uses[0]].instruction):
                part = min(left[r], idle[i])
                if part and i < self.program.uses[r.uses[0]].instruction:
                    chunks.setdefault(r, []).append((i, part))
                    left[r] -= part
                    idle[i] -= part
        if any(left.values()):
            return None
        # A copy that begins later than its bytes are there frees them until then.
        return [
            replace(r, start=chunks[r][0][0], chunks=tuple(chunks[r])) if r in chunks else r
            for r in found
        ]

    def _before(self, use: int) -> int | None:
        return self.program.uses[use].before

    def cut(self, x: np.ndarray) -> None:
        """Exclude the bytes that `x` holds, wherever what holds them stays at least as long."""
        ones = [c for t in self.there for c in t.values() if x[c] > 0.5]
        ones += [c for c in self.stay if x[c] > 0.5]
        terms = dict.fromkeys(ones, 1.0)
        self.row(terms, high=len(terms) - 1)


def exact(
    program: Program,
    hardware: TwoLevel,
    seconds: float = 10.0,
    start: Placement | None = None,
    packer: Callable = pack,
) -> Placement:
    """The fastest placement found in `seconds`, with the bound, and whether it is proven optimal.

    `start` is returned, with the bound, where nothing better was found in time.
    """
    deadline = time.monotonic() + seconds
    costs = Costs(program, hardware)
    best = start or Placement.of(Layout(costs), "exact")
    model = _Model(costs)
    bound = sum(costs.compute)
    for _ in itertools.count():
        left = deadline - time.monotonic()
        found = model.solve(left)
        if found.mip_dual_bound is not None and np.isfinite(found.mip_dual_bound):
            bound = max(bound, int(np.ceil(found.mip_dual_bound - 1e-4)))
        if found.x is None:
            break
        residencies = model.residencies(found.x)
        if residencies is None:
            break
        sizes = program.storages
        buffers = [
            Buffer(r.start, r.end + 1, sizes[r.storage].nbytes, k)
            for k, r in enumerate(residencies)
        ]
        total = costs.total(u for r in residencies for u in r.uses)
        try:
            packing = packer(buffers, hardware.capacity, max(0.1, deadline - time.monotonic()))
        except DoesNotFit as error:
            if not error.details["proven"] or time.monotonic() > deadline:
                break
            model.cut(found.x)
            continue
        if total < best.total:
            placed = tuple(replace(r, offset=packing.offsets[k]) for k, r in enumerate(residencies))
            best = Placement(program, hardware, placed, total, "exact")
        break
    return replace(best, method="exact", bound=min(bound, best.total), optimal=bound >= best.total)
