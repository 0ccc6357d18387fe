"""Planned addresses: a step that repeats runs from one arena, every tensor where a plan put it.

Keeps    one arena; of a step, the order in which its operations ask for memory.
Form     births and deaths of storages in one recorded step, as half-open lifetimes.
Bytes    the arena's height: at least the largest sum of what lives at one time, each storage
         rounded up to 64 bytes. The recorded step itself runs without the arena.
Source   "Efficiently Training 7B LLM with 1 Million Sequence Length on 8 GPUs" (MEMO), bi-level
         planning: first one layer's transients, then the whole model with a layer as one block.
Departs  addresses are given below autograd, by operation, not inside torch's allocator; a layer's
         saved tensors have no fixed buffers but are bundled or placed one by one in level 2, which
         comes closer to the bound.
"""

import gc
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from holdfast.errors import UsageError
from holdfast.parallel.births import Life, Recording, Replay
from holdfast.plan.pack import Buffer, Packing, first_fit, pack

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Layout:
    """Where each birth goes (None: outside), and the arena's height.

    `lower_bound` is the largest sum of what lives at one time; `segments` are the packings of level
    1, one for each segment, `whole` is the one that gives the offsets: level 2, or of all births.
    """

    offsets: list[int | None]
    height: int
    lower_bound: int
    segments: list[Packing]
    whole: Packing


def bilevel(lives: Sequence[Life], cuts: Sequence[int], seconds: float = 5.0) -> Layout:
    """Plan addresses in two levels.

    Level 1 packs what is born and dies within one segment; segments with the same lifetimes are
    packed once. Level 2 packs one block for each segment and what lives longer: bundled by the
    segments of birth and death, and apart. The lower one is taken, or first-fit over all births,
    which an allocator without a plan would get, where that happens to be lower still.

    Args:
        lives: in the order of birth; times are positions in one sequence of births and deaths.
        cuts: times at which segments begin, ascending.
        seconds: for each packing.
    """
    spans: dict[tuple[int, int], list[int]] = {}
    for i, life in enumerate(lives):
        if life.upper is not None:
            span = bisect_right(cuts, life.lower), bisect_right(cuts, life.upper)
            spans.setdefault(span, []).append(i)
    solved: dict[tuple, Packing] = {}
    segments: list[Packing] = []
    blocks: list[_Block] = []
    for (first, last), births in spans.items():
        if first != last:
            continue
        start = lives[births[0]].lower
        shape = tuple(
            (lives[i].lower - start, _upper(lives[i]) - start, lives[i].size) for i in births
        )
        if shape not in solved:
            solved[shape] = pack([Buffer(*s, k) for k, s in enumerate(shape)], seconds=seconds)
        segments.append(solved[shape])
        inner = [solved[shape].offsets[k] for k in range(len(births))]
        blocks.append(_Block(births, inner, solved[shape].height))
    longer = [births for (first, last), births in spans.items() if first != last]
    together = [*blocks, *(_stacked(lives, births) for births in longer)]
    apart = [*blocks, *(_stacked(lives, [i]) for births in longer for i in births)]
    every = [_stacked(lives, [i]) for births in spans.values() for i in births]
    tries = [
        (pack(_buffers(lives, together), seconds=seconds), together),
        (pack(_buffers(lives, apart), seconds=seconds), apart),
        (first_fit(_buffers(lives, every)), every),
    ]
    whole, chosen = min(tries, key=lambda found: found[0].height)
    offsets: list[int | None] = [None] * len(lives)
    for k, block in enumerate(chosen):
        for i, at in zip(block.births, block.inner, strict=True):
            offsets[i] = whole.offsets[k] + at
    return Layout(offsets, whole.height, most_alive(lives), segments, whole)


class _Block(NamedTuple):
    """Births that lie together: where each lies within, and how high all are."""

    births: list[int]
    inner: list[int]
    height: int


def _stacked(lives: Sequence[Life], births: list[int]) -> _Block:
    *inner, height = accumulate((lives[i].size for i in births), initial=0)
    return _Block(births, inner, height)


def _buffers(lives: Sequence[Life], blocks: list[_Block]) -> list[Buffer]:
    return [
        Buffer(lives[b.births[0]].lower, max(_upper(lives[i]) for i in b.births), b.height, k)
        for k, b in enumerate(blocks)
    ]


def _upper(life: Life) -> int:
    assert life.upper is not None
    return life.upper


def most_alive(lives: Sequence[Life]) -> int:
    """The largest sum of the sizes that live at one time, of those that die within the step."""
    changes = [(t, s) for v in lives if v.upper is not None
               for t, s in ((v.lower, v.size), (v.upper, -v.size))]  # fmt: skip
    now = peak = 0
    for _, change in sorted(changes):
        now += change
        peak = max(peak, now)
    return peak


_recording: Recording | None = None


def cut() -> None:
    """Begin a segment of the step that is being recorded, if one is: a layer's forward, say."""
    if _recording is not None:
        _recording.cut()


class Planned(Generic[P, R]):
    """Run a step that repeats from one arena: `planned = Planned(step)`, then `planned(batch)`.

    The first call is plain, so that lazy initialisation is over; the second records and plans; all
    further ones run at planned addresses and must repeat the recorded one, operation by operation.
    What the recorded step leaves alive (results, new gradients) is allocated plainly in every step.
    So is, and counted in `outside`, what finds its address taken because somebody still holds a
    tensor that the recorded step had dropped.

    Args:
        step: forward and backward, with whatever belongs to each step.
        device: type of the device whose storages are planned; others are left alone.
        seconds: of search for each packing.

    Attributes:
        layout: None until the step was recorded.
        memory: the arena, uint8; None until then.
        outside, outside_bytes: storages of the last planned step that were allocated plainly.

    Raises:
        StepChanged: a planned step differs from the recorded one.
    """

    def __init__(
        self, step: Callable[P, R], *, device: torch.device | str = "cpu", seconds: float = 5.0
    ):
        self.step, self.device, self.seconds = step, torch.device(device), seconds
        self.layout: Layout | None = None
        self.memory: Tensor | None = None
        self.outside = self.outside_bytes = 0
        self._warm = False
        self._replay: Replay | None = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if self._replay is not None:
            return self._run(self._replay, args, kwargs)
        if not self._warm:
            self._warm = True
            return self.step(*args, **kwargs)
        return self._record(args, kwargs)

    def _record(self, args: tuple, kwargs: dict[str, Any]) -> R:
        global _recording
        if _recording is not None:
            raise UsageError("a step is being recorded already; planned steps do not nest")
        _recording = recording = Recording(self.device)
        # A collection would date deaths by accident.
        collecting = gc.isenabled()
        gc.collect()
        gc.disable()
        try:
            with recording:
                result = self.step(*args, **kwargs)
        finally:
            _recording = None
            recording.finish()
            if collecting:
                gc.enable()
        self.layout = bilevel(recording.lives, recording.cuts, self.seconds)
        self._replay = Replay(recording, self.layout.offsets, self.layout.height)
        self.memory = self._replay.memory
        return result

    def _run(self, replay: Replay, args: tuple, kwargs: dict[str, Any]) -> R:
        replay.begin()
        try:
            with replay:
                return self.step(*args, **kwargs)
        finally:
            self.outside, self.outside_bytes = replay.outside, replay.outside_bytes
