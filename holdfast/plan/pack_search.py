"""Exact search for a packing of given height, over canonical packings alone.

In a canonical packing every buffer rests on the floor or on another buffer; where any packing
exists, one of these does, because buffers can sink.
"""

import contextlib
import itertools
import math
import random
import sys
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Buffer:
    """`size` bytes that are held from time `lower` until before `upper`."""

    lower: int
    upper: int
    size: int
    id: Hashable


def sections_of(buffers: Sequence[Buffer]) -> list[list[int]]:
    """Largest sets of buffers that live at one time, in order of time; others are within these."""
    sections: list[list[int]] = []
    live: set[int] = set()
    born = False
    # At equal times deaths come first, because lifetimes are half-open.
    events = [(b.upper, 0, i) for i, b in enumerate(buffers)]
    events += [(b.lower, 1, i) for i, b in enumerate(buffers)]
    for _, birth, i in sorted(events):
        if birth:
            live.add(i)
        else:
            if born:
                sections.append(sorted(live))
            live.discard(i)
        born = bool(birth)
    return sections


# States, of about 1 KiB each for 60 buffers.
_REMEMBERED = 100_000


class Search:
    """Depth-first search for a packing within a given height.

    Sections are the largest sets of buffers that live at one time. A section that must be filled
    without a gap, or one at the lowest level, either gets one of the buffers that can rest on its
    floor now, or stays empty at this level. Where the buffers of a section, stacked in the order of
    the lowest offsets that they can still have, end above the height, the branch is given up.
    Buffers that share no time are searched apart, and what failed once is remembered.
    """

    def __init__(self, buffers: Sequence[Buffer]):
        # Every offset of a canonical packing is a sum of sizes, so a multiple of their divisor.
        self.unit = math.gcd(*(b.size for b in buffers)) or 1
        self.buffers = [b for b in buffers if b.size]
        self.empty = [b.id for b in buffers if not b.size]
        self.size = [b.size // self.unit for b in self.buffers]
        sections = sections_of(self.buffers)
        self.span = [range(0)] * len(self.buffers)
        for s, members in enumerate(sections):
            for i in members:
                self.span[i] = range(self.span[i].start if self.span[i] else s, s + 1)
        self.held = [sum(self.size[i] for i in members) for members in sections]
        self.complete = False
        self.failed: set[tuple] = set()
        self.height = self.nodes = 0
        self.deadline = 0.0
        self.rank: list[float] = []
        self.level: list[int] = []

    def run(self, height: int, deadline: float) -> dict[Hashable, int] | None:
        """Offsets within `height`; None if there are none (`complete`) or the time was too short.

        It starts again and again with more nodes and other orders of the same tree, so that a bad
        early choice costs a turn and not the whole time.
        """
        self.height, self.deadline = height // self.unit, deadline
        self.complete = False
        self.failed.clear()
        everything = sorted(range(len(self.size)), key=lambda i: self.span[i].start)
        width = [len(span) for span in self.span]
        orders: list[Callable[[int], float]] = [
            lambda i: width[i] * self.size[i],
            lambda i: width[i],
            lambda i: self.size[i],
        ]
        draw = random.Random(0)
        frames = sys.getrecursionlimit()
        # A frame for each buffer and each split; Python's own frames do not use the C stack.
        sys.setrecursionlimit(frames + 3 * len(everything))
        try:
            for turn in itertools.count():
                noise = 2.0 if turn >= len(orders) else 0.0
                value = orders[turn % len(orders)]
                self.rank = [-value(i) * (1 + noise * draw.random()) for i in range(len(width))]
                self.level = [0] * len(self.size)
                self.nodes = int(400 * 1.15**turn)
                with contextlib.suppress(_OutOfNodes):
                    fits = self._fill(everything, [0] * len(self.held), list(self.held))
                    self.complete = True
                    break
                if time.monotonic() > deadline:
                    return None
        finally:
            sys.setrecursionlimit(frames)
        if not fits:
            return None
        placed = zip(self.buffers, self.level, strict=True)
        return dict.fromkeys(self.empty, 0) | {b.id: y * self.unit for b, y in placed}

    def _fill(
        self, left: list[int], floor: list[int], held: list[int], shut: frozenset[int] = frozenset()
    ) -> bool:
        """Place `left`, sorted by start; `shut` sections stay empty at the lowest level.

        The sections' `floor` and what they still have to hold are this call's to change.
        """
        parts = self._split(left)
        if len(parts) != 1:
            fits = True
            for part in parts:
                fits = fits and self._fill(part, floor, held, shut)
            return fits
        span, size = self.span, self.size
        sections = sorted({s for i in left for s in span[i]})
        state = (tuple(left), tuple(floor[s] for s in sections), shut.intersection(sections))
        if state in self.failed:
            return False
        while True:
            self.nodes -= 1
            if self.nodes < 0 or (self.nodes % 64 == 0 and time.monotonic() > self.deadline):
                raise _OutOfNodes
            lowest = self._settle(left, sections, floor, held, shut)
            if lowest is None:
                break
            base = min(floor[s] for s in sections)
            choice = self._choose(left, lowest, floor, held, shut, base)
            if choice is None:
                # Nothing more rests at this level: what stayed empty rises to the next one.
                levels = [floor[s] for s in sections if floor[s] > base]
                if not levels:
                    break
                for s in sections:
                    floor[s] = max(floor[s], min(levels))
                shut = frozenset()
                continue
            at, candidates = choice
            bottom = floor[at]
            tried = set()
            for i in sorted(candidates, key=self.rank.__getitem__):
                if (span[i], size[i]) in tried:
                    continue
                tried.add((span[i], size[i]))
                higher, lighter = floor.copy(), held.copy()
                for s in span[i]:
                    higher[s] = bottom + size[i]
                    lighter[s] -= size[i]
                if self._fill([j for j in left if j != i], higher, lighter, shut):
                    self.level[i] = bottom
                    return True
            if bottom + held[at] == self.height:
                break
            shut |= {at}
        if len(self.failed) < _REMEMBERED:
            self.failed.add(state)
        return False

    def _choose(
        self,
        left: list[int],
        lowest: list[int],
        floor: list[int],
        held: list[int],
        shut: frozenset[int],
        base: int,
    ) -> tuple[int, list[int]] | None:
        """The section with the fewest choices, and which buffers can rest on its floor.

        Sections without slack must be filled where they are, at any level; others wait until
        their level is the lowest, because only then is it known what they can rise to.
        """
        choices: dict[int, list[int]] = {}
        uneven: set[int] = set()
        for i, low in zip(left, lowest, strict=True):
            under = floor[self.span[i].start : self.span[i].stop]
            if low == min(under) and shut.isdisjoint(self.span[i]):
                for s in self.span[i]:
                    choices.setdefault(s, []).append(i)
            elif low > base:
                uneven.update(s for s in self.span[i] if floor[s] == low)
        best, fewest = None, (math.inf, 0)
        for s, candidates in choices.items():
            slack = floor[s] + held[s] < self.height
            if floor[s] == base or not (slack or s in uneven):
                few = (len(candidates) + slack, -held[s])
                if few < fewest:
                    best, fewest = s, few
        return None if best is None else (best, choices[best])

    def _settle(
        self,
        left: list[int],
        sections: list[int],
        floor: list[int],
        held: list[int],
        shut: frozenset[int],
    ) -> list[int] | None:
        """Raise floors as far as they must; the lowest offset of each buffer, or None if too high.

        A section's buffers, stacked in the order of their lowest offsets, end as low as they can.
        """
        span, size = self.span, self.size
        moved = True
        while moved:
            lowest = [max(floor[span[i].start : span[i].stop]) for i in left]
            bounds = lowest
            if shut:
                base = min(floor[s] for s in sections)
                flat = [shut.isdisjoint(span[i]) for i in left]
                tops = [
                    base + size[i]
                    for i, low, free in zip(left, lowest, flat, strict=True)
                    if free and low == base
                ]
                after = min([floor[s] for s in sections if floor[s] > base] + tops, default=None)
                if after is None:
                    return None
                bounds = [
                    low if free else max(low, after) for low, free in zip(lowest, flat, strict=True)
                ]
            end = floor.copy()
            first: dict[int, int] = {}
            for low, i in sorted(zip(bounds, left, strict=True)):
                for s in span[i]:
                    if s not in first:
                        first[s] = low
                    end[s] = (low if low > end[s] else end[s]) + size[i]
            moved = False
            for s in sections:
                if end[s] > self.height:
                    return None
                # A shut section keeps its level until all do: others may still rest beside it.
                if first[s] > floor[s] and s not in shut:
                    floor[s], moved = first[s], True
        return lowest

    def _split(self, left: list[int]) -> list[list[int]]:
        parts: list[list[int]] = []
        end = -1
        for i in left:
            if self.span[i].start >= end:
                parts.append([])
            parts[-1].append(i)
            end = max(end, self.span[i].stop)
        return parts


class _OutOfNodes(Exception):
    """This turn's share of nodes, or all the time, is spent."""
