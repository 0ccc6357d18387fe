"""Choose an option for every block: least time within the budget, or least bytes at all.

A mixed-integer program over (block, option), solved by HiGHS. Rows are instants of the step; the
answer is checked by exact integer composition before it is believed.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from holdfast.budget import Budget
from holdfast.plan.compose import Composer

Block = tuple[str, int]
Assignment = dict[Block, str]
MIB = float(2**20)
TIME_LIMIT = 5.0


@dataclass(frozen=True)
class Solution:
    """What each block does, predicted seconds, and whether the solver proved it best."""

    choice: Assignment
    seconds: float
    proved: bool


class Problem:
    """The linear form of one composer: every instant's device bytes as a sum over choices.

    Args:
        options: names of the family's options that may be chosen; the first is plain.
    """

    def __init__(self, composer: Composer, options: list[str]):
        self.composer, self.options = composer, options
        self._uniform: dict[str, int] = {}
        self.blocks = composer.family.blocks
        index = {block: i for i, block in enumerate(self.blocks)}
        count, width = len(self.blocks), len(options)
        rows, constants = [], []
        plain = options[0]
        for later in composer.micro_steps():
            fixed = int(composer.base(later)[0].sum())
            before = np.zeros((count, width), np.int64)
            for traced, real in composer.family.layout:
                block = index.get((real[1], real[2])) if real[1] else None
                names = options if block is not None else [plain]
                found = [composer.summary(name, traced, later) for name in names]
                tops = [max((t for t, _ in s.peaks[0].values()), default=0) for s in found]
                ends = [int(s.end[0].sum()) for s in found]
                row = before.copy()
                if block is None:
                    constants.append(fixed + tops[0])
                    fixed += ends[0]
                else:
                    row[block] += tops
                    constants.append(fixed)
                    before[block] += ends
                rows.append(row.reshape(-1))
        if not composer.life.in_backward:
            rows.append(np.zeros(count * width, np.int64))
            constants.append(int(composer.base(later=True)[0].sum()) + composer.scratch)
        self.rows = np.array(rows)
        self.constants = np.array(constants)
        costs = [[self._seconds(b, o) for o in options] for b in self.blocks]
        self.costs = np.array(costs).reshape(count, width)
        self.fixed_seconds = composer.seconds(composer.uniform(plain)) - self.costs[:, 0].sum()
        family = composer.family
        self.moved = {
            place: np.array(
                [
                    [sizes[family.representative(b)] if o == place else 0 for o in options]
                    for b in self.blocks
                ],
                np.int64,
            ).reshape(count, width)
            for place, sizes in family.moved.items()
        }

    def _seconds(self, block: Block, option: str) -> float:
        family, life = self.composer.family, self.composer.life
        total = family.extra_seconds.get(option, {}).get(family.representative(block), 0.0)
        for traced, real in family.layout:
            if (real[1], real[2]) == block:
                total += self.composer.summary(option, traced, False).seconds
        return total * life.accumulation

    def peak(self, choice: Mapping[Block, str]) -> int:
        """Device bytes at the highest instant."""
        kinds = set(choice.values())
        if len(kinds) == 1:
            return self._uniform_peak(kinds.pop())
        picked = np.zeros((len(self.blocks), len(self.options)), np.int64)
        for i, block in enumerate(self.blocks):
            picked[i, self.options.index(choice[block])] = 1
        return int((self.rows @ picked.reshape(-1) + self.constants).max())

    def _uniform_peak(self, option: str) -> int:
        # Exact, where the rows bound what blocks under different options share.
        if option not in self._uniform:
            ledger = self.composer.ledger(self.composer.uniform(option))
            self._uniform[option] = ledger.peak("device")
        return self._uniform[option]

    def seconds(self, choice: Mapping[Block, str]) -> float:
        return self.fixed_seconds + sum(
            self.costs[i, self.options.index(choice[block])] for i, block in enumerate(self.blocks)
        )

    def moved_bytes(self, choice: Mapping[Block, str], place: str) -> int:
        """Bytes that the choice puts into the arena of `place`."""
        sizes = self.moved[place]
        return int(sum(sizes[i, self.options.index(choice[b])] for i, b in enumerate(self.blocks)))

    def _room(self, choice: Mapping[Block, str], budget: Budget) -> bool:
        return all(self.moved_bytes(choice, p) <= getattr(budget, p) for p in self.moved)

    def least_seconds(self) -> float:
        """A bound: every block at its fastest."""
        return (
            self.fixed_seconds + self.costs.min(axis=1).sum() if self.blocks else self.fixed_seconds
        )

    def fits(self, choice: Mapping[Block, str], budget: Budget) -> bool:
        return self.peak(choice) <= budget.device and self._room(choice, budget)

    def least_peak(self) -> int:
        """A bound: every instant with each block at its fewest bytes."""
        count, width = len(self.blocks), len(self.options)
        fewest = self.rows.reshape(len(self.rows), count, width).min(axis=2).sum(axis=1)
        return int((self.constants + fewest).max())

    def fastest(self, budget: Budget) -> Solution | None:
        """Least predicted seconds within the budget; None where nothing fits."""
        if self.constants.size and not self.blocks:
            fits = int(self.constants.max()) <= budget.device
            return Solution({}, self.fixed_seconds, True) if fits else None
        best = self._fastest_uniform(budget)
        if self.least_peak() > budget.device:
            return best
        quick = {b: self.options[i] for b, i in zip(self.blocks, self.costs.argmin(1), strict=True)}
        if self.fits(quick, budget):
            return Solution(quick, self.seconds(quick), True)
        limit = budget.device
        for _ in range(4):
            answer = self._solve(self.costs.reshape(-1), limit, budget)
            if answer is None:
                return best
            choice, proved = answer
            excess = self.peak(choice) - budget.device
            if excess <= 0 and self._room(choice, budget):
                mixed = Solution(choice, self.seconds(choice), proved)
                return min((s for s in (best, mixed) if s), key=lambda s: s.seconds)
            # The solver works in floats: step back by what its tolerance let through.
            limit -= max(excess, 1) * 2
        return best

    def _fastest_uniform(self, budget: Budget) -> Solution | None:
        alike = [self.composer.uniform(option) for option in self.options]
        fitting = [c for c in alike if self.fits(c, budget)]
        found = [Solution(c, self.seconds(c), True) for c in fitting]
        return min(found, key=lambda s: s.seconds, default=None)

    def smallest_uniform(self, budget: Budget) -> Solution:
        """Least device bytes with all blocks alike."""
        uniform = [self.composer.uniform(option) for option in self.options]
        best = min((c for c in uniform if self._room(c, budget)), key=self.peak)
        return Solution(best, self.seconds(best), False)

    def smallest(self, budget: Budget) -> Solution:
        """Least device bytes, within the solver's gap of 0.2 %; other places as in `budget`."""
        if not self.blocks:
            return Solution({}, self.fixed_seconds, True)
        best = self.smallest_uniform(budget).choice
        if self.peak(best) <= self.least_peak():
            return Solution(best, self.seconds(best), True)
        answer = self._solve(None, self.peak(best), budget)
        proved = answer is not None and answer[1]
        if answer is not None and self._room(answer[0], budget):
            best = min(best, answer[0], key=self.peak)
        return Solution(best, self.seconds(best), proved)

    def _solve(self, costs: np.ndarray | None, limit: int, budget: Budget):
        """Minimise `costs`, or the peak where costs are None."""
        count, width = len(self.blocks), len(self.options)
        size = count * width
        extra = 1 if costs is None else 0
        objective = np.zeros(size + extra)
        if costs is None:
            objective[-1] = 1.0
        else:
            scale = max(float(np.abs(costs).max()), 1e-12)
            objective[:size] = costs / scale
            for sizes in self.moved.values():
                # Equal times are decided by fewer bytes elsewhere.
                objective[:size] += sizes.reshape(-1) / max(1, int(sizes.max())) * 1e-7
        one = np.zeros((count, size + extra))
        for i in range(count):
            one[i, i * width : (i + 1) * width] = 1
        bytes_rows = np.zeros((len(self.rows), size + extra))
        bytes_rows[:, :size] = self.rows / MIB
        if costs is None:
            bytes_rows[:, -1] = -1
            upper = -self.constants / MIB
        else:
            upper = (limit - self.constants) / MIB
        constraints = [LinearConstraint(one, 1, 1), LinearConstraint(bytes_rows, -np.inf, upper)]
        for place, sizes in self.moved.items():
            row = np.zeros((1, size + extra))
            row[0, :size] = sizes.reshape(-1) / MIB
            constraints.append(LinearConstraint(row, -np.inf, getattr(budget, place) / MIB))
        high = np.ones(size + extra)
        if costs is None:
            high[-1] = limit / MIB
        result = milp(
            objective,
            constraints=constraints,
            integrality=np.r_[np.ones(size), np.zeros(extra)],
            bounds=Bounds(0, high),
            options={"time_limit": TIME_LIMIT, "mip_rel_gap": 2e-3 if costs is None else 1e-6},
        )
        if result.x is None:
            return None
        picked = result.x[:size].reshape(count, width).argmax(1)
        choice = {b: self.options[i] for b, i in zip(self.blocks, picked, strict=True)}
        return choice, result.status == 0


def every(blocks: list[Block], options: list[str]) -> Iterator[Assignment]:
    """All assignments, for small spaces."""
    for combination in itertools.product(options, repeat=len(blocks)):
        yield dict(zip(blocks, combination, strict=True))


def fastest_ref(problem: Problem, budget: Budget) -> Solution | None:
    """`fastest` by trying everything."""
    best = None
    for choice in every(problem.blocks, problem.options):
        if problem.fits(choice, budget):
            seconds = problem.seconds(choice)
            if best is None or seconds < best.seconds:
                best = Solution(choice, seconds, True)
    return best


def smallest_ref(problem: Problem, budget: Budget) -> Solution:
    """`smallest` by trying everything."""
    free = Budget(device=2**62, host=budget.host, disk=budget.disk)
    allowed = (c for c in every(problem.blocks, problem.options) if problem.fits(c, free))
    best = min(allowed, key=problem.peak)
    return Solution(best, problem.seconds(best), True)
