"""vTrain (152): profile each operation once, replay any plan of parallel training, price it.

Keeps    a profile: seconds of each distinct (operation, shapes, dtype); the operations and byte
         changes of one traced micro-batch, by segment.
Form     JSON; every block stands for all that equal it.
Bytes    of each rank over time, by our own trace: to the byte what a step holds on one device.
Source   Bang, Choi, Kim, Kim, Rhu, vTrain: A Simulation Framework for Evaluating Cost-Effective
         and Compute-Optimal Large Language Model Training, MICRO 2024.
Departs  bytes are predicted too, and a plan that does not fit is marked. Where ranks or streams
         share cores, a measured slowdown and stall replace the assumption that they do not.
         Tensor parallelism splits the blocks; embedding and head stay whole on every rank.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch

from holdfast.errors import UsageError, unknown
from holdfast.ledger import Ledger
from holdfast.parallel.schedule import breadth_first, one_f_one_b
from holdfast.plan.hardware import Hardware
from holdfast.plan.models import ModelSource, loss_of, resolve
from holdfast.plan.profile import Op, Profile
from holdfast.plan.roofline import device_link
from holdfast.plan.simulate import Change, Task, Trace, simulate
from holdfast.plan.step_graph import OPTIONS, Held, Part, StepGraph, optimizer
from holdfast.plan.trace import CATEGORY_CODES

SCHEDULES = {"1f1b": one_f_one_b, "gpipe": breadth_first}
# Outputs that tensor parallelism sums in a block, in each direction: attention's and the MLP's.
BLOCK_REDUCES = 2


@dataclass(frozen=True, eq=False)
class TrainConfig:
    """What is trained: `batch` sequences of `sequence` tokens in one optimizer step."""

    model: Any
    batch: int
    sequence: int
    dtype: str = "float32"

    @cached_property
    def source(self) -> ModelSource:
        return resolve(self.model)


@dataclass(frozen=True)
class ParallelPlan:
    """How it is trained: degrees of tensor, data and pipeline parallelism, and a micro-batch."""

    t: int = 1
    d: int = 1
    p: int = 1
    micro: int = 1
    schedule: str = "1f1b"
    recompute: bool = False
    bucket_bytes: int = 25 * 2**20

    @property
    def devices(self) -> int:
        return self.t * self.d * self.p

    def micros(self, config: TrainConfig) -> int:
        """Micro-batches of one rank in one step.

        Raises:
            UsageError: degrees, schedule and batch do not go together.
        """
        if min(self.t, self.d, self.p, self.micro, self.bucket_bytes) < 1:
            raise UsageError(f"{self}: degrees, micro-batch and bucket must be at least 1")
        if self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, SCHEDULES)
        if config.batch % (self.d * self.micro):
            raise UsageError(
                f"a batch of {config.batch} is not a multiple of d={self.d} x micro={self.micro}; "
                "choose a micro-batch that divides it"
            )
        return config.batch // (self.d * self.micro)

    def __str__(self) -> str:
        more = f" {self.schedule}" if self.p > 1 else ""
        more += " recompute" if self.recompute else ""
        return f"t={self.t} d={self.d} p={self.p} micro={self.micro}{more}"


@dataclass(frozen=True)
class Prediction:
    """One optimizer step: seconds in `time` and `breakdown`, bytes of every pipeline rank.

    `breakdown` is a mean over ranks: `compute`, `communication`, and `idle`, in which a rank's
    computing waits for other ranks or for communication that nothing hides. `flops` are those of
    all devices, recomputing not counted.
    """

    time: float
    breakdown: dict[str, float]
    ledger: Ledger
    trace: Trace = field(repr=False)
    flops: int

    @property
    def peak_bytes(self) -> int:
        """Device bytes of the rank that holds most."""
        return max(self.ledger.peak("device", rank=r) for r in {rank for rank, *_ in self.ledger})


class VTrain:
    """Predicts time and bytes of training steps from one device's profile.

    Args:
        profile: of one device; `measure` adds what a plan needs, predictions read it.
        hardware: for links that the profile has no table of, and for the roofline.
        missing: "error" names an operation that was not measured, "roofline" estimates it.
    """

    def __init__(
        self,
        profile: Profile,
        hardware: Hardware,
        *,
        missing: Literal["error", "roofline"] = "error",
    ):
        if missing not in ("error", "roofline"):
            raise unknown("way to treat what is missing", missing, ("error", "roofline"))
        self.profile, self.hardware = profile, hardware
        self.fallback = hardware if missing == "roofline" else None
        self._graphs: dict[tuple[TrainConfig, int, int], StepGraph] = {}

    def graph(self, config: TrainConfig, plan: ParallelPlan) -> StepGraph:
        """The traced micro-batch that a plan replays; traced once.

        Raises:
            UsageError: the plan does not suit the config.
        """
        plan.micros(config)
        key = (config, plan.micro, plan.t)
        if key not in self._graphs:
            dtype = getattr(torch, config.dtype)
            self._graphs[key] = StepGraph(config.source, plan.micro, config.sequence, dtype, plan.t)
        graph = self._graphs[key]
        depths = [stack.depth for stack in graph.family.stacks]
        if plan.p > 1 and (len(depths) != 1 or plan.p > depths[0]):
            raise UsageError(
                f"p={plan.p} cuts one list of at least as many blocks, {config.source.name} has "
                f"lists of {depths}; lower p"
            )
        return graph

    def measure(self, config: TrainConfig, plan: ParallelPlan, *, repeats: int = 5) -> int:
        """Add to the profile what a plan needs and it lacks; returns the number of new keys.

        A real model of the first, one middle and the last block runs some steps on the profile's
        device. A plan of known operations costs nothing.
        """
        graph = self.graph(config, plan)
        gap = "recompute" if plan.recompute else "backward"
        known = gap in self.profile.gaps
        if known and not self.profile.missing(graph.all_ops(plan.recompute)):
            return 0
        model = graph.real_model(self.profile.device, plan.recompute)
        batch = graph.inputs(self.profile.device)
        return self.profile.measure(
            model,
            lambda: loss_of(model(**batch)),
            [optimizer([p]) for p in model.parameters() if p.requires_grad],
            recompute=plan.recompute,
            repeats=repeats,
        )

    def predict(self, config: TrainConfig, plan: ParallelPlan) -> Prediction:
        """Replay one optimizer step: all pipeline ranks of one replica.

        Raises:
            UsageError: the plan does not suit the config, or something was not measured.
        """
        graph = self.graph(config, plan)
        trace = simulate(_Replay(self, graph, config, plan).tasks())
        busy = {stream: trace.busy(stream) for stream in trace.streams}
        compute = sum(busy[r, "compute"] for r in range(plan.p)) / plan.p
        network = sum(busy.get((r, "net"), 0) for r in range(plan.p)) / plan.p
        breakdown = {"compute": compute, "communication": network, "idle": trace.end - compute}
        return Prediction(
            trace.end / 1e9,
            {name: value / 1e9 for name, value in breakdown.items()},
            trace.ledger(),
            trace,
            graph.flops() * plan.t * plan.d * plan.micros(config),
        )

    def slowdown(self, ranks: int) -> float:
        """How much slower a rank computes beside others that share its processor.

        Raises:
            UsageError: ranks share a CPU, and nobody measured how much.
        """
        if ranks == 1 or self.profile.device != "cpu":
            return 1.0
        if ranks not in self.profile.slowdown and self.fallback is None:
            raise UsageError(
                f"the profile does not say how much {ranks} ranks on one CPU slow each other "
                f"down; call holdfast.plan.contention.measure(profile, {ranks}), or pass "
                "missing='roofline' to assume that they do not"
            )
        return self.profile.slowdown.get(ranks, 1.0)

    def all_reduce(self, nbytes: int, ranks: int) -> float:
        """Seconds, from the profile's table; else a ring over the hardware's link."""
        if ranks == 1:
            return 0.0
        measured = self.profile.collective("all_reduce", nbytes, ranks)
        if measured is not None:
            return measured
        bandwidth, latency = device_link(self.hardware)
        return 2 * (ranks - 1) * (nbytes / ranks / bandwidth + latency)

    def stall(self, nbytes: int, ranks: int) -> float:
        """Seconds that computing loses beside an all-reduce; 0 where nobody measured any."""
        return self.profile.collective("stall", nbytes, ranks) or 0.0

    def send(self, nbytes: int) -> float:
        """Seconds of a transfer between neighbours in a pipeline."""
        measured = self.profile.collective("send", nbytes, 2)
        if measured is not None:
            return measured
        bandwidth, latency = device_link(self.hardware)
        return nbytes / bandwidth + latency


class _Replay:
    """The tasks of one step of one replica."""

    def __init__(self, vtrain: VTrain, graph: StepGraph, config: TrainConfig, plan: ParallelPlan):
        self.vtrain, self.graph, self.plan = vtrain, graph, plan
        self.micros = plan.micros(config)
        self.option = OPTIONS[plan.recompute]
        self.slowdown = vtrain.slowdown(plan.devices)
        self._seconds: dict[tuple, float] = {}
        self._bytes: dict[tuple[int, str, bool], Held] = {}
        self._of_stage: dict[tuple[int, bool], list[Part]] = {}
        for part in graph.parts:
            at = graph.stage_of(part.real, plan.p), part.backward
            self._of_stage.setdefault(at, []).append(part)

    def tasks(self) -> list[Task]:
        found = []
        for rank, actions in SCHEDULES[self.plan.schedule](self.plan.p, 1, self.micros).items():
            reduces: list[tuple] = []
            mine: list[Task] = []
            for _, kind, micro in actions:
                mine += self._action(rank, kind, micro, reduces)
            mine.append(self._update(rank, reduces))
            first = mine[0]
            start = Task(("load", rank), first.stream, 0, (), self._base(rank))
            found += [start, *mine]
        return found

    def _action(self, rank: int, kind: str, micro: int, reduces: list[tuple]) -> Iterator[Task]:
        """One forward or backward of one micro-batch, and what it sends."""
        p, compute, net = self.plan.p, (rank, "compute"), (rank, "net")
        source = rank - 1 if kind == "F" else rank + 1
        target = rank + 1 if kind == "F" else rank - 1
        last: tuple = ()
        if 0 <= source < p:
            last = (("send " + kind, source, micro),)
        phase = "forward" if kind == "F" else "backward"
        parts = self._of_stage[rank, kind == "B"]
        held = self._held(rank, kind, later=micro > 0 or self.plan.d > 1)
        opens = _changes(rank, held.peak, "start")
        reducing = kind == "B" and self.plan.d > 1 and micro == self.micros - 1
        filled = self.graph.buckets(parts, self.plan.bucket_bytes) if reducing else []
        run = 0.0
        for k, part in enumerate(parts):
            seconds, done = self._part_seconds(part), 0.0
            for bucket in (bucket for bucket in filled if bucket.part == k):
                name: tuple = (kind, rank, micro, k, bucket.share)
                ready = _ns(run + (bucket.share - done) * seconds)
                yield Task(name, compute, ready, last, opens, phase)
                takes = self.vtrain.all_reduce(bucket.nbytes, self.plan.d)
                # Nothing is left to compute beside the last.
                beside = bucket is not filled[-1]
                stall = self.vtrain.stall(bucket.nbytes, self.plan.d) if beside else 0.0
                yield Task(("stall", *name), compute, _ns(stall), (), (), phase)
                rest = _ns(max(0.0, takes - stall))
                yield Task(("reduce", *name), net, rest, (("stall", *name),), (), phase)
                reduces.append(("reduce", *name))
                last, opens, run, done = (name,), (), 0.0, bucket.share
            run += (1 - done) * seconds
            if self.plan.t > 1 and part.real[0] in ("F", "B"):
                name = (kind, rank, micro, k)
                yield Task(name, compute, _ns(run), last, opens, phase)
                again = 2 if kind == "B" and self.plan.recompute else 1
                seconds = self.vtrain.all_reduce(self.graph.boundary_bytes, self.plan.t)
                sums = _ns(again * BLOCK_REDUCES * seconds)
                yield Task(("sum", *name), net, sums, (name,), (), phase)
                last, opens, run = (("sum", *name),), (), 0.0
        closes = _changes(rank, held.end - held.peak, "end")
        yield Task((kind, rank, micro), compute, _ns(run), last, opens + closes, phase)
        if 0 <= target < p:
            seconds = self.vtrain.send(self.graph.boundary_bytes)
            yield Task(("send " + kind, rank, micro), net, _ns(seconds), ((kind, rank, micro),))

    def _part_seconds(self, part: Part) -> float:
        key = (part.traced, part.backward)
        if key not in self._seconds:
            ops = self.graph.ops[self.option].get(key, [])
            phase = "forward"
            if part.backward:
                phase = "recompute" if self.plan.recompute else "backward"
            self._seconds[key] = self._ops_seconds(ops, phase)
        return self._seconds[key]

    def _ops_seconds(self, ops: Iterable[Op], phase: str) -> float:
        profile = self.vtrain.profile
        times = [profile.seconds(op, self.vtrain.fallback) for op in ops]
        total = sum(times)
        return self.slowdown * max(0.0, total + profile.beside(phase, len(times), total))

    def _held(self, rank: int, kind: str, later: bool) -> Held:
        """Bytes of one action; forward and backward of a stage leave nothing but gradients."""
        if (rank, kind, later) not in self._bytes:
            f, b = self._sum(rank, False, later), self._sum(rank, True, later)
            # Tensors that cross a boundary are born on one stage and freed on another; in truth
            # each has its own, the receiver from its forward and the sender until its backward.
            crossing = np.zeros_like(f.end)
            if self.plan.p > 1:
                crossing[CATEGORY_CODES["activations"]] = self.graph.boundary_bytes
            received, sent = crossing * (rank > 0), crossing * (rank < self.plan.p - 1)
            left = f.end + b.end + received - sent
            left[CATEGORY_CODES["gradients"]] = 0
            received = received + np.maximum(-left, 0)
            sent = sent + np.maximum(left, 0)
            self._bytes[rank, "F", later] = Held(f.peak + received, f.end + received)
            self._bytes[rank, "B", later] = Held(b.peak, b.end - sent)
        return self._bytes[rank, kind, later]

    def _sum(self, rank: int, backward: bool, later: bool) -> Held:
        peak = end = np.zeros(len(CATEGORY_CODES), np.int64)
        for part in self._of_stage[rank, backward]:
            held = self.graph.held(part, self.option, later)
            peak = max(peak, end + held.peak, key=np.sum)
            end = end + held.end
        return Held(max(peak, end, key=np.sum), end)

    def _base(self, rank: int) -> tuple[Change, ...]:
        parameters = self.graph.parameters(rank, self.plan.p)
        trained = [p for p in parameters if p.requires_grad]
        cells = np.zeros(len(CATEGORY_CODES), np.int64)
        family = self.graph.family
        sizes = {
            "parameters": sum(p.nbytes for p in parameters),
            "gradients": sum(p.nbytes for p in trained) if self.plan.d > 1 else 0,
            "optimizer": sum(
                self.graph.optimizer_bytes(tuple(p.shape), p.dtype).state for p in trained
            ),
            "buffers": family.base["buffers"],
            # All micro-batches of a step are drawn before it begins.
            "inputs": self.micros * family.base["inputs"],
        }
        for category, nbytes in sizes.items():
            cells[CATEGORY_CODES[category]] = nbytes
        return _changes(rank, cells, "start")

    def _update(self, rank: int, reduces: list[tuple]) -> Task:
        seconds, scratch = 0.0, 0
        for parameter in self.graph.parameters(rank, self.plan.p):
            if parameter.requires_grad:
                shape = tuple(parameter.shape)
                seconds += self._ops_seconds(self.graph.update_ops(shape), "step")
                cost = self.graph.optimizer_bytes(shape, parameter.dtype)
                scratch = max(scratch, cost.scratch)
        holds = (
            Change(rank, "device", "temporary", scratch),
            Change(rank, "device", "temporary", -scratch, "end"),
        )
        return Task(
            ("update", rank), (rank, "compute"), _ns(seconds), tuple(reduces), holds, "step"
        )


def _changes(rank: int, cells: np.ndarray, at: Literal["start", "end"]) -> tuple[Change, ...]:
    return tuple(
        Change(rank, "device", name, int(cells[code]), at)
        for name, code in CATEGORY_CODES.items()
        if cells[code]
    )


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
