"""Memory wall (002): is a workload bound by computing, by memory, or by the interconnect?

Keeps    nothing; per operation FLOPs, bytes between memory and caches, and their ratio.
Form     a roofline for each operation; a phase is the sum of its operations' times, since one
         ratio for a whole model hides that its products and its element-wise parts differ.
Bytes    of an operation: what it reads and writes, each once; of a product (m,k)(k,n):
         e(mk + kn + mn). Of a decoded token: e*P of weights and the cache, so FLOPs per byte are
         2*batch/e for weights and 2/e * query heads per KV head for attention.
Source   Gholami, Yao, Kim, Hooper, Mahoney, Keutzer, "AI and Memory Wall", IEEE Micro 2024.
Departs  the trend is fitted to a short table of published data sheets, not to the authors' list;
         its rates are what those parts show, not the paper's 3.0, 1.6 and 1.4 per two years.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from holdfast.catalogue import systems
from holdfast.errors import UsageError
from holdfast.plan.figures import plots, save_figure
from holdfast.plan.hardware import Hardware, default_hardware
from holdfast.plan.layered import as_machine
from holdfast.plan.models import resolve
from holdfast.plan.op_trace import Task, decode_ops, source_dtype, trace_ops
from holdfast.plan.ops import Op, OpTable
from holdfast.plan.registry import methods
from holdfast.plan.roofline import Machine, attainable
from holdfast.units import format_bytes


@dataclass(frozen=True)
class Row:
    """Equal operations of a phase; `seconds` of all `count` of them."""

    phase: str
    name: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    count: int
    flops: int
    nbytes: int
    seconds: float
    bound: str

    @property
    def intensity(self) -> float:
        return self.flops / self.nbytes


@dataclass(frozen=True)
class Move:
    """What would relieve a phase: how much faster it is at best, and which methods there are."""

    what: str
    speedup: float
    room: str = ""
    methods: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """One phase: what bounds it, and how much faster it would be if that cost nothing.

    `headroom` is None where nothing else takes time.

    `by_resource` shares out the seconds; `least_bytes` leaves out what fusing element-wise
    neighbours and growing the cache in place would not move.
    """

    phase: str
    flops: int
    nbytes: int
    least_bytes: int
    seconds: float
    by_resource: Mapping[str, float]
    by_category: Mapping[str, int]
    bound: str
    headroom: float | None
    moves: tuple[Move, ...]

    @property
    def intensity(self) -> float:
        return self.flops / self.nbytes


@dataclass(frozen=True)
class WallReport:
    model: str
    hardware: str
    task: str
    batch: int
    sequence: int
    devices: int
    dtype: str
    peak: float
    bandwidth: float
    verdicts: tuple[Verdict, ...]
    rows: tuple[Row, ...]

    @property
    def ridge(self) -> float:
        """FLOPs per byte at which computing takes as long as moving."""
        return self.peak / self.bandwidth

    def verdict(self, phase: str) -> Verdict:
        return next(v for v in self.verdicts if v.phase == phase)

    def document(self) -> dict[str, Any]:
        """For JSON: every field, and what is derived from them."""
        found = asdict(self) | {"ridge": self.ridge}
        for entry in (*found["verdicts"], *found["rows"]):
            entry["intensity"] = entry["flops"] / entry["nbytes"]
        return found

    def table(self, top: int = 12) -> str:
        """The verdicts, what would move them, and the operations that take longest."""
        heads = ["phase", "bound by", "seconds", "TFLOPs", "bytes", "avoidable", "FLOPs/B"]
        lines = [heads + ["if free"]]
        for v in self.verdicts:
            lines.append(
                [v.phase, v.bound, f"{v.seconds:.3g}", f"{v.flops / 1e12:.3g}"]
                + [format_bytes(v.nbytes), f"{1 - v.least_bytes / v.nbytes:.0%}"]
                + [f"{v.intensity:.3g}", f"{v.headroom:.3g}x" if v.headroom else "-"]
            )
        parts = [
            f"{self.model} on {self.hardware}: {self.task}, batch {self.batch}, sequence "
            f"{self.sequence}, {self.dtype}; both sides of the roofline meet at "
            f"{self.ridge:.3g} FLOPs/B",
            _aligned(lines),
        ]
        for v in self.verdicts:
            for move in v.moves:
                named = f": {', '.join(move.methods)}" if move.methods else ""
                room = f" ({move.room}{named})" if move.room else ""
                parts.append(f"{v.phase}: {move.what}, up to {move.speedup:.3g}x{room}")
        slow = sorted(self.rows, key=lambda row: -row.seconds)[:top]
        lines = [
            ["longest operations", "phase", "times", "shapes", "seconds", "FLOPs/B", "bound by"]
        ]
        for row in slow:
            shapes = " ".join("x".join(map(str, s)) or "-" for s in row.shapes[:3])
            lines.append(
                [row.name, row.phase, str(row.count), shapes]
                + [f"{row.seconds:.3g}", f"{row.intensity:.3g}", row.bound]
            )
        return "\n".join([*parts, _aligned(lines)])

    def plot(self, path: Path) -> None:
        """Draw operations under the roofline; the suffix (.png, .svg, .pdf) says the format.

        Raises:
            UsageError: matplotlib is missing, or the suffix is none that it writes.
        """
        figure = plots().Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.add_subplot(xlabel="FLOPs per byte", ylabel="FLOP/s")
        points = [row for row in self.rows if row.flops]
        lowest = min([row.intensity for row in points] + [self.ridge]) / 4
        span = [lowest, self.ridge, 4 * max([row.intensity for row in points] + [self.ridge])]
        axes.loglog(span, [attainable(self.peak, self.bandwidth, x) for x in span], "k-", lw=1)
        for v in self.verdicts:
            mine = [row for row in points if row.phase == v.phase]
            if mine:
                axes.scatter(
                    [row.intensity for row in mine],
                    [row.flops * row.count / row.seconds for row in mine],
                    [8 + 200 * row.seconds / v.seconds for row in mine],
                    alpha=0.6,
                    label=f"{v.phase}: {v.bound}, {v.intensity:.3g} FLOPs/B in all",
                )
        if points:
            axes.legend(loc="lower right", fontsize="small")
        axes.set_title(
            f"{self.model} on {self.hardware}, batch {self.batch}, {self.sequence} tokens"
        )
        save_figure(figure, path)


def wall(
    model: Any,
    hardware: Machine | Hardware | str | None = None,
    task: Task = "finetune",
    batch: int = 1,
    sequence: int = 1024,
    *,
    devices: int = 1,
    dtype: str = "auto",
    attention: str | None = None,
) -> WallReport:
    """Which resource bounds each phase of a workload, and what would move it.

    Phases are forward, backward and step of training; prefill and decode of serving.

    Args:
        model: what `resolve` takes: a name, path, config or module.
        hardware: a file or preset, of one level or layered; by default that of this machine's GPU.
        devices: data-parallel devices that sum their gradients; `batch` is one device's.
        dtype: "auto" is what the config stores, else float32.

    Raises:
        UsageError: bad input, or hardware without a rate for what the model computes in.
    """
    if devices < 1:
        raise UsageError(f"devices {devices} is not positive; use 1 or more")
    source = resolve(model)
    machine = as_machine(default_hardware() if hardware is None else hardware, devices)
    number = source_dtype(source, dtype)
    name = str(number).removeprefix("torch.")
    machine.rate(name)  # refused before anything is traced
    table = trace_ops(source, task, batch, sequence, number, attention)
    exchange = 0.0
    if devices > 1 and "backward" in table.phases:
        exchange = machine.all_reduce(table.resident["gradients"], devices).seconds
    memory = machine.levels[-1]
    return WallReport(
        source.name,
        machine.name,
        task,
        batch,
        sequence,
        devices,
        name,
        machine.rate(name),
        memory.efficiency * memory.bandwidth,
        tuple(
            _verdict(phase, table.phase(phase), machine, exchange * (phase == "backward"), batch)
            for phase in table.phases
        ),
        tuple(_row(op, machine) for op in table.ops),
    )


def _row(op: Op, machine: Machine) -> Row:
    cost = machine.cost(op)
    return Row(
        op.phase, op.name, op.shapes, op.dtype, op.count, op.flops, op.nbytes,
        cost.seconds * op.count, cost.bottleneck,
    )  # fmt: skip


def _verdict(phase: str, ops: list[Op], machine: Machine, exchange: float, batch: int) -> Verdict:
    resources = ["compute", *(level.name for level in machine.levels), "launch"]
    by_resource = dict.fromkeys([*resources, "interconnect"], 0.0)
    by_resource["interconnect"] = exchange
    # Seconds of the phase if a resource cost nothing.
    free = dict.fromkeys(resources, exchange) | {"interconnect": 0.0}
    by_category: dict[str, int] = {}
    for op in ops:
        cost = machine.cost(op)
        for name, spent in cost.bound.items():
            by_resource[name] += op.count * spent
        for name in free:
            others = [s for n, s in cost.parts.items() if n not in (name, "launch")]
            launch = cost.parts.get("launch", 0.0) if name != "launch" else 0.0
            free[name] += op.count * (max(others) + launch)
        for category, nbytes in op.traffic:
            by_category[category] = by_category.get(category, 0) + op.count * nbytes
    seconds = sum(by_resource.values())
    bound = max(by_resource, key=lambda name: by_resource[name])
    return Verdict(
        phase,
        sum(op.flops * op.count for op in ops),
        sum(op.nbytes * op.count for op in ops),
        sum(op.least * op.count for op in ops),
        seconds,
        by_resource,
        by_category,
        bound,
        seconds / free[bound] if free[bound] else None,
        tuple(_moves(phase, ops, machine, by_resource, free, batch)),
    )


# Which room has the methods that make a category smaller.
_ROOMS = {
    "parameters": "weights",
    "optimizer": "training",
    "gradients": "training",
    "activations": "training",
    "cache": "context",
}


def _moves(
    phase: str,
    ops: list[Op],
    machine: Machine,
    by_resource: Mapping[str, float],
    free: Mapping[str, float],
    batch: int,
) -> list[Move]:
    """What would relieve the phase by 2 % or more, most first."""
    seconds, exchange = sum(by_resource.values()), by_resource["interconnect"]
    serving = phase in ("prefill", "decode")

    def gain(change: Callable[[Op], Op]) -> float:
        return seconds / (exchange + sum(op.count * machine.cost(change(op)).seconds for op in ops))

    def drop(category: str) -> Callable[[Op], Op]:
        return lambda op: replace(op, traffic=tuple(t for t in op.traffic if t[0] != category))

    found = [
        Move(f"fewer bytes of {category}", gain(drop(category)), room, _known(category, serving))
        for category, room in _ROOMS.items()
    ]
    found += [
        Move("fuse element-wise operations", gain(lambda op: replace(op, append=0).lean())),
        Move("grow the cache in place", gain(lambda op: replace(op, fusion=0).lean()), "context"),
    ]
    for resource, what, room in (
        ("compute", "compute less, or in fewer bits", "weights" if serving else "training"),
        ("launch", "launch fewer kernels: fuse, or capture the phase as one graph", ""),
        ("interconnect", "exchange fewer gradients, or while computing", "parallel"),
    ):
        if free[resource]:
            found.append(Move(what, seconds / free[resource], room))
    if phase == "decode":
        # Weights are read once for a whole batch: computing grows with it, these bytes do not.
        costs = [(op, machine.cost(op).parts) for op in ops if op.flops]
        compute = sum(op.count * parts["compute"] for op, parts in costs)
        weights = sum(op.count * dict(op.traffic).get("parameters", 0) for op, _ in costs)
        ratio = machine.levels[-1].seconds(weights) / compute
        if ratio > 1:
            what = (
                f"a batch of {math.floor(batch * ratio)} balances reading and computing, per token"
            )
            found.append(Move(what, ratio))
    return sorted((m for m in found if m.speedup >= 1.02), key=lambda move: -move.speedup)


def _known(category: str, serving: bool) -> tuple[str, ...]:
    """Methods that make a category smaller; the catalogue's before baselines."""
    catalogued = {s.key for s in systems()}
    smaller = [
        m.key
        for m in methods().values()
        if any((category, field) in m.writes for field in ("form", "extent"))
        and (not serving or m.slot == "weights")
    ]
    return tuple(sorted(smaller, key=lambda key: key not in catalogued))


# Encoder and decoder


def encoder_decoder(
    encoder: Any, decoder: Any, tokens: int, *, dtype: str = "float16"
) -> dict[str, float]:
    """FLOPs per byte of reading `tokens` at once, and of making them one by one.

    Bytes of a decoded token are affine in what the cache holds, so that two traces give them all.

    Returns:
        intensities under `encoder` and `decoder`, both without avoidable bytes.
    """
    read, made = resolve(encoder), resolve(decoder)
    number = source_dtype(read, dtype)
    once = _totals(trace_ops(read, "serve", 1, tokens, number))
    first, last = (_totals(decode_ops(made, 1, n, number)) for n in (1, tokens - 1))
    # The mean of an affine function over contexts 1 to tokens - 1 is that of its ends.
    flops, nbytes = first[0] + last[0], first[1] + last[1]
    return {"encoder": once[0] / once[1], "decoder": flops / nbytes}


def _totals(table: OpTable) -> tuple[int, int]:
    ops = table.phase(table.phases[0])
    return sum(o.flops * o.count for o in ops), sum(o.least * o.count for o in ops)


def _aligned(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
