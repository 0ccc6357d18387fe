"""Compose a step of the full model from traced segments, under any choice per block.

Bytes are sums over segments in running order. The choice of where gradients and optimizer states
live is an edit of the events at which gradients appear, so one trace serves them all.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

from holdfast.errors import UsageError
from holdfast.ledger import CATEGORIES, Ledger
from holdfast.meter import BACKWARD, FORWARD, PHASE_NAMES, STEP
from holdfast.plan.blocks import Stack
from holdfast.plan.trace import (
    CATEGORY_CODES,
    PLACE_CODES,
    GradientMark,
    Key,
    Segment,
    Trace,
    expand,
)

CELLS = (len(PLACE_CODES), len(CATEGORIES))
PLACE_NAMES = tuple(PLACE_CODES)


@dataclass(frozen=True)
class UpdateCost:
    """Updating one parameter: bytes of state kept, bytes of scratch at its peak, seconds."""

    state: int
    scratch: int
    seconds: float


# Makes a parameter whose update costs what that of another does; equal where the costs are. A
# parameter that stands for more than itself carries one as `like`.
Like = Callable[[], torch.nn.Parameter]


@dataclass(frozen=True)
class Trainable:
    """`count` parameters of one shape."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    count: int
    like: Like | None = None


@dataclass
class Family:
    """One model under fixed global methods: traces by block option, persistent bytes.

    `options[name]` is a trace in which every block runs under that option, fit for mixing: what
    blocks share lives as long as under any option. `uniform[name]` is the same for no mixture.
    `likes` holds by name what parameters carry as `like`, `between_steps` the most bytes of
    scratch that a module takes after the optimizer's step, `resting_bytes` the gradients that are
    missing even from the step that holds most, where layers rest by turns. `moved[place]` holds
    the bytes that a traced block puts into an arena of that place, `extra_seconds` the exposed time
    of these copies.
    """

    stacks: list[Stack]
    options: dict[str, Trace]
    base: dict[str, int]
    trainable: list[Trainable]
    uniform: dict[str, Trace] = field(default_factory=dict)
    likes: dict[str, Like] = field(default_factory=dict)
    between_steps: int = 0
    resting_bytes: int = 0
    extra_seconds: dict[str, dict[tuple[str, int], float]] = field(default_factory=dict)
    moved: dict[str, dict[tuple[str, int], int]] = field(default_factory=dict)

    @cached_property
    def layout(self) -> list[tuple[Key, Key]]:
        return expand(next(iter(self.options.values())), self.stacks)

    @property
    def blocks(self) -> list[tuple[str, int]]:
        """Every real block as (stack path, index), in stack order."""
        return [(s.path, i) for s in self.stacks for i in range(s.depth)]

    def representative(self, block: tuple[str, int]) -> tuple[str, int]:
        path, index = block
        stack = next(s for s in self.stacks if s.path == path)
        return path, stack.representative[index]


@dataclass(frozen=True)
class Life:
    """How long gradients live: until the step, over several micro-batches, or consumed at once."""

    in_backward: bool
    accumulation: int


@dataclass
class Summary:
    """A segment reduced to what composition needs, relative to the bytes at its start.

    `peaks[place][phase]` holds (total, cells) at that place's highest instant in the phase.
    """

    end: np.ndarray
    peaks: dict[int, dict[int, tuple[int, np.ndarray]]]
    seconds: float


def summarise(segment: Segment, life: Life, later: bool, update: Callable) -> Summary:
    """Apply the life of gradients to a segment's events and find its peaks.

    Args:
        later: a micro-batch that finds gradients from an earlier one.
        update: GradientMark -> UpdateCost, used where gradients are consumed at once.
    """
    category, place = segment.category, segment.place
    phase, change = segment.phase, segment.change
    seconds = segment.seconds
    if segment.gradients and (life.in_backward or later):
        at, extra = [], []
        for mark in segment.gradients:
            if life.in_backward:
                cost = update(mark)
                seconds += cost.seconds
                added = [("temporary", cost.scratch), ("temporary", -cost.scratch)]
            else:
                added = []
            for name, size in [*added, ("gradients", -mark.nbytes)]:
                if size:
                    at.append(mark.position)
                    extra.append((CATEGORY_CODES[name], 0, BACKWARD, size))
        rows = np.array(extra, np.int64).reshape(-1, 4)
        category = np.insert(category, at, rows[:, 0])
        place = np.insert(place, at, rows[:, 1])
        phase = np.insert(phase, at, rows[:, 2])
        change = np.insert(change, at, rows[:, 3])
    end = np.zeros(CELLS, np.int64)
    np.add.at(end, (place, category), change)
    peaks: dict[int, dict[int, tuple[int, np.ndarray]]] = {0: {}, 1: {}}
    for code in (0, 1):
        running = np.cumsum(np.where(place == code, change, 0))
        for stage in (FORWARD, BACKWARD):
            inside = np.flatnonzero(phase == stage)
            if not len(inside):
                continue
            top = inside[np.argmax(running[inside])]
            cells = np.zeros(CELLS, np.int64)
            np.add.at(cells, (place[: top + 1], category[: top + 1]), change[: top + 1])
            peaks[code][stage] = (int(running[top]), cells)
    return Summary(end, peaks, seconds)


class Composer:
    """All plans of one family, one optimizer and one life of gradients.

    Args:
        update: (shape, dtype, like) -> UpdateCost of the optimizer.
    """

    def __init__(self, family: Family, life: Life, update: Callable[..., UpdateCost]):
        self.family, self.life, self.update = family, life, update
        self._summaries: dict[tuple[str, Key, bool, bool], Summary] = {}
        self.gradient_bytes = sum(
            t.count * int(np.prod(t.shape)) * t.dtype.itemsize for t in family.trainable
        )
        self.gradient_bytes -= family.resting_bytes
        costs = [(t.count, update(t.shape, t.dtype, t.like)) for t in family.trainable]
        self.state_bytes = sum(count * cost.state for count, cost in costs)
        self.scratch = max((cost.scratch for _, cost in costs), default=0)
        self.update_seconds = sum(count * cost.seconds for count, cost in costs)

    def summary(self, option: str, key: Key, later: bool, uniform: bool = False) -> Summary:
        """A segment under an option, in a mixture or where all blocks are alike."""
        found = self._summaries.get((option, key, later, uniform))
        if found is None:
            traces = self.family.uniform if uniform else self.family.options
            found = summarise(traces[option].segments[key], self.life, later, self._update_at)
            self._summaries[option, key, later, uniform] = found
        return found

    def _update_at(self, mark: GradientMark) -> UpdateCost:
        return self.update(mark.shape, mark.dtype, self.family.likes.get(mark.name))

    def option_of(self, key: Key, choice: Mapping[tuple[str, int], str]) -> str:
        name, path, index = key
        if name == "prologue" or not path:
            return next(iter(self.family.options))
        return choice[path, index]

    def base(self, later: bool) -> np.ndarray:
        cells = np.zeros(CELLS, np.int64)
        for category, nbytes in self.family.base.items():
            # All micro-batches of a step are drawn before it begins.
            times = self.life.accumulation if category == "inputs" else 1
            cells[0, CATEGORY_CODES[category]] += times * nbytes
        cells[0, CATEGORY_CODES["optimizer"]] += self.state_bytes
        if later:
            cells[0, CATEGORY_CODES["gradients"]] += self.gradient_bytes
        return cells

    def micro_steps(self) -> tuple[bool, ...]:
        """Which kinds of micro-batch occur: without and with gradients of an earlier one."""
        return (False, True) if self.life.accumulation > 1 else (False,)

    def ledger(self, choice: Mapping[tuple[str, int], str]) -> Ledger:
        """Bytes of the whole step where block b runs under `choice[b]`.

        Raises:
            UsageError: a block that moves what it saves, where layers rest by turns.
        """
        if self.family.resting_bytes and {"host", "disk"}.intersection(choice.values()):
            raise UsageError(
                "moving blocks to host or disk does not apply where layers rest by turns: which "
                "step then holds most is not known; use keep and recompute"
            )
        best: dict[tuple[int, int], tuple[int, np.ndarray]] = {}
        kinds = set(choice.values())
        alike = next(iter(kinds)) if len(kinds) == 1 else None

        def offer(place: int, phase: int, cells: np.ndarray) -> None:
            total = int(cells[place].sum())
            if (place, phase) not in best or total > best[place, phase][0]:
                best[place, phase] = (total, cells)

        for later in self.micro_steps():
            cells = self.base(later)
            for traced, real in self.family.layout:
                option = alike or self.option_of(real, choice)
                summary = self.summary(option, traced, later, alike is not None)
                for place, phases in summary.peaks.items():
                    for phase, (_, relative) in phases.items():
                        offer(place, phase, cells + relative)
                cells = cells + summary.end
        if not self.life.in_backward:
            cells = self.base(later=True)
            cells[0, CATEGORY_CODES["temporary"]] += max(self.scratch, self.family.between_steps)
            offer(0, STEP, cells)
        ledger = Ledger()
        for (place, phase), (total, cells) in best.items():
            if total:
                column = {c: int(cells[place, i]) for c, i in CATEGORY_CODES.items()}
                ledger.put(PLACE_NAMES[place], PHASE_NAMES[phase], column)
        for elsewhere, sizes in self.family.moved.items():
            moved = sum(
                sizes[self.family.representative(block)]
                for block, option in choice.items()
                if option == elsewhere
            )
            if moved:
                for name in ("forward", "backward"):
                    ledger[0, elsewhere, "activations", name] = moved
        return ledger

    def seconds(self, choice: Mapping[tuple[str, int], str]) -> float:
        """Predicted seconds of one optimizer step, all micro-batches included."""
        micro = 0.0
        for traced, real in self.family.layout:
            micro += self.summary(self.option_of(real, choice), traced, False).seconds
        for block, option in choice.items():
            extra = self.family.extra_seconds.get(option)
            if extra:
                micro += extra[self.family.representative(block)]
        update = 0.0 if self.life.in_backward else self.update_seconds
        return micro * self.life.accumulation + update

    def uniform(self, option: str) -> dict[tuple[str, int], str]:
        return dict.fromkeys(self.family.blocks, option)


def trainables(found: Sequence[Trainable]) -> list[Trainable]:
    """Merge what is equal but for its count."""
    counts: dict[Trainable, int] = {}
    for each in found:
        kind = replace(each, count=0)
        counts[kind] = counts.get(kind, 0) + each.count
    return [replace(kind, count=count) for kind, count in counts.items()]
