"""PipeOffload (001): pipeline schedules whose saved activations wait in host memory.

Keeps    what a forward of one chunk on one micro-batch saves for backward: A bytes.
Form     unchanged, as compact copies.
Bytes    device: the schedule's peak of chunks (schedule.py) times A; of offloaded chunks only
         those in transit, 2 to 4 however many ranks there are. Host: A for each that is away.
Place    device -> host (pinned on a GPU) -> device, between forward and backward.
Source   Wan, Qi, Huang, Lin, Li et al., "PipeOffload: Improving Scalability of Pipeline
         Parallelism with Memory Optimization", 2025.
Departs  what leaves and returns is bound to positions of a rank's order, not to a clock, so that
         measured bytes equal simulated ones; the first stage has no I, torch leaves it to W.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from holdfast.errors import DoesNotFit, UsageError
from holdfast.parallel import schedule as schedules
from holdfast.parallel._torch_pp import Runtime, Stage
from holdfast.parallel.keeper import Keeper, Measured, pair_group
from holdfast.parallel.offload_plan import OffloadPlan, StageCost, plan_offload, ratio, timeline
from holdfast.parallel.schedule import Action, Schedule
from holdfast.places import Arena, HostArena
from holdfast.plan.simulate import Trace
from holdfast.units import format_bytes

# Rounds of profiling after one that warms up.
ROUNDS = 3


def choose_offload(
    order: str,
    ranks: int,
    chunks: int,
    micros: int,
    costs: Sequence[StageCost],
    *,
    group: int | None = None,
    split_backward: bool = True,
    offload: int | str = "auto",
    asynchronous: bool = True,
    pair: bool = False,
    budget: int | None = None,
) -> OffloadPlan:
    """Schedule and copies for these costs, fastest first among what fits.

    Args:
        order: one of `schedule.ORDERS`.
        group: of gis and uniform, see there; None takes the smallest that the costs allow.
        offload: chunks per rank whose activations leave; "full", or "auto": all if copying takes
            no longer than computing (k <= 1), else as many as copying can keep up with; with a
            budget no more than needed.
        budget: bytes that activations may take on each rank.

    Raises:
        DoesNotFit: no number of chunks fits the budget; says how many bytes the best one takes.
        UsageError: sizes that the schedule cannot have, or copies that cannot keep up.
    """
    if offload not in ("auto", "full") and not isinstance(offload, int):
        raise UsageError(f"offload={offload!r}; use a number of chunks, 'full' or 'auto'")
    if group is None and order == "uniform":
        group = _lifetime(ranks, costs)
    base = schedules.make(order, ranks, chunks, micros, group)
    if split_backward:
        base = schedules.split_backward(base)
    slots = schedules.uniform_slots(ranks, chunks, micros, group) if order == "uniform" else None
    if isinstance(offload, int):
        numbers = [offload]
    elif offload == "full":
        numbers = [chunks]
    else:
        k = ratio(costs) if asynchronous else 0.0
        most = chunks if k <= 1 else min(chunks, math.floor(chunks / k))
        numbers = [most] if budget is None else list(range(most + 1))
    smallest: tuple[int, OffloadPlan] | None = None
    for number in numbers:
        try:
            plan = plan_offload(
                base, costs, number, asynchronous=asynchronous, pair=pair, slots=slots
            )
        except UsageError:
            if offload != "auto" or number == 0:
                raise
            continue
        if budget is None:
            return plan
        trace = timeline(plan, costs)
        peak = max(trace.peak(rank, "device") for rank in range(ranks))
        if peak <= budget:
            return plan
        if smallest is None or peak < smallest[0]:
            smallest = peak, plan
    if smallest is None:
        # Copies that could keep up on average collide; fewer of them do not.
        return choose_offload(
            order, ranks, chunks, micros, costs, group=group, split_backward=split_backward,
            offload=max(numbers[-1] - 1, 0), asynchronous=asynchronous, pair=pair,
        )  # fmt: skip
    assert budget is not None
    error = DoesNotFit(
        f"activations need {format_bytes(smallest[0])} on a rank, budget is "
        f"{format_bytes(budget)}: the {order} schedule with {smallest[1].offloaded} of {chunks} "
        "chunks offloaded is the smallest; use smaller micro-batches, more chunks per rank, or "
        f"budget={smallest[0]}"
    )
    error.details = {"smallest": smallest[0]}
    raise error


def _lifetime(ranks: int, costs: Sequence[StageCost]) -> int:
    """The least lifetime with which unequal stages do not wait: enough work lies in between."""
    slowest = max(cost.compute for cost in costs)
    chunks = [costs[c : c + ranks] for c in range(0, len(costs), ranks)]
    way = max(max(sum(c.forward for c in part), sum(c.input for c in part)) for part in chunks)
    return max(math.ceil(ranks / 2), math.ceil(way / slowest))


class PipeOffload:
    """This rank's part of a pipeline: `step(x, target)` trains on one batch, without the update.

    Made by `pipeoffload`. After the first step `plan`, `costs` and `predicted` (a Trace) say what
    was decided, `measured` what the last step held.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        microbatches: int,
        loss_fn: Callable[[Any, Any], Tensor],
        *,
        group: dist.ProcessGroup | None,
        arena: Arena | None,
        choose: Callable[[Sequence[StageCost]], OffloadPlan],
        costs: Sequence[StageCost] | None,
        like: Tensor | None,
    ):
        self.like = like
        self.chunks, self.micros, self.loss_fn = list(chunks), microbatches, loss_fn
        self.group, self.arena, self._choose = group, arena, choose
        self.ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.costs = None if costs is None else tuple(costs)
        self.plan: OffloadPlan | None = None
        self.predicted: Trace | None = None
        self.measured: Measured | None = None

    def step(self, x: Tensor, target: Tensor) -> list[Tensor]:
        """Forward and backward of a batch, split evenly in micro-batches along dimension 0.

        Gradients of the batch's mean loss are added to `.grad`. The first step profiles the
        stages on one micro-batch, and decides, unless costs were given.

        Returns:
            The losses of the micro-batches, on the rank with the last stage; elsewhere [].

        Raises:
            UsageError: the batch cannot be split evenly.
        """
        if x.shape[0] % self.micros:
            raise UsageError(
                f"a batch of {x.shape[0]} cannot be split in {self.micros} equal micro-batches; "
                f"use a multiple of {self.micros}"
            )
        if self.plan is None:
            self._prepare(x, target)
        self._keeper.begin()
        started = time.perf_counter()
        losses = self._run(self._runtime, x, target)
        _synchronize(x.device)
        self.measured = self._keeper.end(time.perf_counter() - started)
        return losses

    def _run(self, runtime: Runtime, x: Tensor, target: Tensor) -> list[Tensor]:
        return runtime.run(*([x] if self.rank == 0 else []), target=target)

    def _prepare(self, x: Tensor, target: Tensor) -> None:
        if self.costs is None:
            self.costs = self._profile(x, target)
        self.plan = self._choose(self.costs)
        schedules.validate(self.plan.schedule)
        self.predicted = timeline(self.plan, self.costs)
        if self.arena is None:
            # The simulated peak is exact; a GPU's pool rounds each copy up to a power of two.
            pinned = torch.cuda.is_available()
            self.arena = HostArena(self.predicted.peak(self.rank, "host") * (2 if pinned else 1))
        self._keeper = Keeper(self.plan, self.rank, self.arena, pair_group(self.plan, self.group))
        size = x.shape[0] // self.micros
        self._runtime = self._make(self.plan.schedule, self.micros, self._keeper, x[:size])

    def _make(self, schedule: Schedule, micros: int, keeper: "Keeper", micro: Tensor) -> Runtime:
        count = len(self.chunks) * self.ranks
        like = None if self.like is None else (micro, self.like)
        stages = [
            Stage(chunk, c * self.ranks + self.rank, count, _device(chunk), self.group, like)
            for c, chunk in enumerate(self.chunks)
        ]
        runtime = Runtime(stages, schedule, micros, keeper, self.loss_fn, keeper.pair is None)
        keeper.runtime = runtime
        return runtime

    def _profile(self, x: Tensor, target: Tensor) -> tuple[StageCost, ...]:
        """Time every stage on one micro-batch, and copies of what it saves."""
        size = x.shape[0] // self.micros
        order = schedules.split_backward(schedules.breadth_first(self.ranks, len(self.chunks), 1))
        keeper = Keeper(OffloadPlan(order), self.rank, None, None)
        parameters = [p for chunk in self.chunks for p in chunk.parameters()]
        before = [p.grad for p in parameters]
        generators = _generators(x.device)
        runtime = self._make(order, 1, keeper, x[:size])
        times: list[dict[Action, int]] = []
        for _ in range(ROUNDS + 1):
            for parameter in parameters:
                parameter.grad = None
            keeper.begin()
            self._run(runtime, x[:size], target[:size])
            _synchronize(x.device)
            keeper.end(0.0)
            times.append(dict(keeper.times))
        for parameter, grad in zip(parameters, before, strict=True):
            parameter.grad = grad
        _restore(generators)
        mine = {}
        for stage, saved in keeper.sizes.items():
            forward, inputs, weight = (
                min(t[Action(stage, kind, 0)] for t in times[1:]) for kind in "FIW"
            )
            save, load = _copy_times(saved, x.device)
            left = keeper.left[stage]
            mine[stage] = StageCost(forward, inputs, weight, saved, save, load, left=left)
        gathered: list[dict[int, StageCost]] = [{} for _ in range(self.ranks)]
        dist.all_gather_object(gathered, mine, group=self.group)
        everywhere = {stage: cost for part in gathered for stage, cost in part.items()}
        return tuple(everywhere[stage] for stage in sorted(everywhere))

    @property
    def sizes(self) -> dict[int, tuple[int, int]]:
        """Of this rank's parts in the last step: bytes saved by a forward, and left after I."""
        keeper = self._keeper
        return {stage: (saved, keeper.left.get(stage, 0)) for stage, saved in keeper.sizes.items()}

    @property
    def action_times(self) -> dict[Action, int]:
        """Nanoseconds of each of this rank's actions in the last step."""
        return dict(self._keeper.times)

    def report(self) -> str:
        """Predicted and measured peaks of this rank's last step, as text.

        Raises:
            UsageError: no step has run.
        """
        if self.predicted is None or self.measured is None or self.plan is None:
            raise UsageError("nothing to report; run step() first")
        seconds = self.predicted.end / 1e9
        rows = [
            ("", "predicted", "measured"),
            *(
                (
                    f"activations, {place}",
                    format_bytes(self.predicted.peak(self.rank, place)),
                    format_bytes(getattr(self.measured, f"{place}_bytes")),
                )
                for place in ("device", "host")
            ),
            ("seconds", f"{seconds:.4f}", f"{self.measured.seconds:.4f}"),
        ]
        head = f"rank {self.rank}: {self.plan.offloaded} of {len(self.chunks)} chunks offloaded"
        return "\n".join([head, *(f"{a:<22}{b:>14}{c:>14}" for a, b, c in rows)])


def pipeoffload(
    chunks: Sequence[nn.Module],
    *,
    microbatches: int,
    loss_fn: Callable[[Any, Any], Tensor],
    order: str = "uniform",
    group: str | int | None = None,
    split_backward: bool = True,
    offload: int | str = "auto",
    asynchronous: bool = True,
    pair: bool = False,
    budget: int | None = None,
    costs: Sequence[StageCost] | None = None,
    arena: Arena | None = None,
    like: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> PipeOffload:
    """Train a model that is spread over the ranks of a process group, chunk by chunk.

    Args:
        chunks: this rank's modules; chunk c is part c * ranks + rank of the model. Each takes and
            returns one tensor or a tuple of tensors of fixed shapes.
        microbatches: in each batch.
        loss_fn: (output of the last part, target) -> mean loss.
        order: uniform (even pace, for offloading), gis, 1f1b (interleaved with several chunks),
            bfs, zero-bubble.
        group: of gis: "half" or "full" of the ranks, or a number; of uniform: the lifetime.
        offload, asynchronous, budget: see `choose_offload`.
        pair: ranks 2p and 2p + 1 share a bus: their copies alternate in direction.
        costs: of all stages; None profiles them in the first step.
        arena: where activations go; by default host memory of exactly the simulated peak.
        like: a tensor, perhaps without data, as parts pass them on; saves telling each other.

    Raises:
        UsageError: fewer than 2 ranks, no chunk, or sizes that the schedule cannot have.

    Source: see the module.
    """
    ranks = dist.get_world_size(process_group)
    if ranks < 2 or not chunks:
        raise UsageError(
            f"a pipeline of {ranks} ranks with {len(chunks)} chunks on this one; it needs 2 ranks "
            "and at least one chunk on each"
        )
    if isinstance(group, str):
        if group not in ("half", "full"):
            raise UsageError(f"group={group!r}; use 'half', 'full' or a number of micro-batches")
        group = ranks if group == "full" else math.ceil(ranks / 2)

    def choose(found: Sequence[StageCost]) -> OffloadPlan:
        return choose_offload(
            order, ranks, len(chunks), microbatches, found, group=group,
            split_backward=split_backward, offload=offload, asynchronous=asynchronous, pair=pair,
            budget=budget,
        )  # fmt: skip

    # What cannot work is refused here, before anything runs.
    size = group if isinstance(group, int) else None
    schedules.make(order, ranks, len(chunks), microbatches, size)
    if isinstance(offload, int) and not 0 <= offload <= len(chunks):
        raise UsageError(f"offload={offload} of {len(chunks)} chunks per rank")
    if pair and ranks % 2:
        raise UsageError(f"pair=True needs an even number of ranks, not {ranks}; use pair=False")
    return PipeOffload(
        chunks,
        microbatches,
        loss_fn,
        group=process_group,
        arena=arena,
        choose=choose,
        costs=costs,
        like=like,
    )


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _copy_times(nbytes: int, device: torch.device) -> tuple[int, int]:
    """Nanoseconds to copy `nbytes` into a host arena and back; the best of three."""
    if not nbytes:
        return 0, 0
    data = torch.empty(nbytes, dtype=torch.uint8, device=device).zero_()
    save, load = [], []
    with HostArena(2 * nbytes) as arena:
        for key in range(3):
            started = time.perf_counter_ns()
            arena.put(key, data)
            _synchronize(device)
            middle = time.perf_counter_ns()
            arena.get(key, out=data)
            _synchronize(device)
            save.append(middle - started)
            load.append(time.perf_counter_ns() - middle)
            arena.evict(key)
    return min(save), min(load)


def _generators(device: torch.device) -> tuple:
    on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_gpu, device


def _restore(state: tuple) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], state[2])
