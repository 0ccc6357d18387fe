"""Superconducting digital systems (016): training and serving on a machine not built here.

Keeps    nothing; weights, cache and activations lie in the nearest level of memory with room.
Form     a layered description of a machine (`holdfast.plan.layered`), each number with its source.
Bytes    of an operation through a level: what it touches of all that lies there or farther; of a
         product, the least that tiles of the next nearer store allow. Across n chips an all-reduce
         of S bytes sends 2(n-1)/n * S from each.
Source   Kundu and others at imec, "A System Level Performance Evaluation for Superconducting
         Digital Systems", 2024.
Departs  the paper's parameter values are not established here: the example that comes with this
         package is marked illustrative, and of such a machine only ratios are printed. Plans are
         searched over tensor and data parallel degrees; there is no pipeline. A tensor-parallel
         chip takes an equal part of every operation, as with sequence parallelism, and nothing
         overlaps with communication.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from holdfast.errors import DoesNotFit, UsageError
from holdfast.plan.layered import Layered, as_machine, load, scaled
from holdfast.plan.models import ModelSource, resolve
from holdfast.plan.op_trace import Task, source_dtype, trace_ops
from holdfast.plan.ops import Op, OpTable
from holdfast.plan.roofline import Cost, Machine


@dataclass(frozen=True)
class Workload:
    """What is run: `batch` sequences over all chips; `tokens` are made per sequence in serving."""

    model: Any
    task: Task = "serve"
    batch: int = 1
    sequence: int = 1024
    tokens: int = 128
    dtype: str = "auto"


@dataclass(frozen=True)
class Outcome:
    """The best plan of one machine; seconds of a phase are those of one pass, one token."""

    machine: str
    illustrative: bool
    tensor: int
    data: int
    phases: Mapping[str, Cost]
    total: Cost

    def document(self) -> dict[str, Any]:
        """For JSON; an illustrative machine gives shares of its time, never seconds or joules."""

        def one(cost: Cost) -> dict[str, Any]:
            shares = {name: spent / cost.seconds for name, spent in cost.bound.items() if spent}
            quoted = not self.illustrative
            return {
                "bound": cost.bottleneck,
                "shares": shares,
                "seconds": cost.seconds if quoted else None,
                "joules": cost.joules if quoted else None,
            }

        return {
            "machine": self.machine,
            "illustrative": self.illustrative,
            "tensor": self.tensor,
            "data": self.data,
            "phases": {name: one(cost) for name, cost in self.phases.items()},
            "total": one(self.total),
        }


@dataclass(frozen=True)
class Setting:
    """One point of a sweep: its outcomes, the reference first; a machine that is too small is a
    `DoesNotFit`."""

    label: str
    outcomes: tuple[Outcome | DoesNotFit, ...]

    def speedup(self, index: int, phase: str = "total") -> float | None:
        """How many times faster than the reference; None where one of them does not fit."""
        return self._ratio(index, phase, lambda cost: cost.seconds)

    def energy_ratio(self, index: int) -> float | None:
        """Joules of the reference for one joule, both at the wall; None where one is unknown."""
        return self._ratio(index, "total", lambda cost: cost.joules)

    def _ratio(self, index: int, phase: str, of) -> float | None:
        first, other = self.outcomes[0], self.outcomes[index]
        if isinstance(first, DoesNotFit) or isinstance(other, DoesNotFit):
            return None
        pair = [of(o.total if phase == "total" else o.phases[phase]) for o in (first, other)]
        return None if None in pair or not pair[1] else pair[0] / pair[1]


@dataclass(frozen=True)
class Comparison:
    workload: Workload
    dtype: str
    settings: tuple[Setting, ...]

    def document(self) -> dict[str, Any]:
        return {
            "model": resolve(self.workload.model).name,
            "task": self.workload.task,
            "batch": self.workload.batch,
            "sequence": self.workload.sequence,
            "dtype": self.dtype,
            "settings": [self._setting(setting) for setting in self.settings],
        }

    def _setting(self, setting: Setting) -> dict[str, Any]:
        outcomes = []
        for index, outcome in enumerate(setting.outcomes):
            if isinstance(outcome, DoesNotFit):
                outcomes.append({"does_not_fit": str(outcome)})
                continue
            speedups = {
                phase: setting.speedup(index, phase) for phase in (*outcome.phases, "total")
            }
            ratios = {"speedup": speedups, "energy_ratio": setting.energy_ratio(index)}
            outcomes.append(outcome.document() | ratios)
        return {"setting": setting.label, "outcomes": outcomes}


def compare(
    machines: Sequence[Machine | Layered | str],
    workload: Workload,
    sweep: Mapping[str, Sequence[Any]] | None = None,
) -> Comparison:
    """Speed and energy of machines relative to the first, each under its own best plan.

    Args:
        machines: layered or one-level descriptions; the first is the reference.
        sweep: what varies -> values, one at a time. "batch", "sequence" and "model" are the
            workload's and apply to all; the path of a number in a layered file, for example
            "levels.dram.bandwidth", takes factors and applies to all but the reference.

    Raises:
        UsageError: fewer than two machines, a machine without the workload's dtype, or a path that
            no machine has.
        DoesNotFit: a machine is too small for the workload itself.
    """
    if len(machines) < 2:
        raise UsageError("a comparison needs two machines or more; the first is the reference")
    given = [load(m) if isinstance(m, str) else m for m in machines]
    settings = [_Plans(workload).setting("as given", given)]
    for outcome in settings[0].outcomes:
        if isinstance(outcome, DoesNotFit):
            raise outcome
    for path, values in (sweep or {}).items():
        for value in values:
            if path in ("batch", "sequence", "model"):
                changed = replace(workload, **{path: value})
                settings.append(_Plans(changed).setting(f"{path} {value}", given))
            else:
                others = [_changed(machine, path, value) for machine in given[1:]]
                label = f"{path} x{value:g}"
                settings.append(_Plans(workload).setting(label, [given[0], *others]))
    dtype = str(source_dtype(resolve(workload.model), workload.dtype)).removeprefix("torch.")
    return Comparison(workload, dtype, tuple(settings))


def _changed(machine: Any, path: str, factor: float) -> Layered:
    if not isinstance(machine, Layered):
        name = machine.name
        raise UsageError(
            f"{path} of {name} cannot be swept: it has one level; describe it in a layered file, "
            "or sweep batch, sequence or model"
        )
    if not factor > 0:
        raise UsageError(f"factor {factor:g} of {path} is not positive; use for example 2")
    return scaled(machine, path, factor)


# Traces are the slow part, and most of a sweep needs the same ones.
_TRACES: dict[tuple, OpTable] = {}


@dataclass
class _Plans:
    """All plans of one workload."""

    workload: Workload
    source: ModelSource = field(init=False)

    def __post_init__(self):
        self.source = resolve(self.workload.model)
        self.number = source_dtype(self.source, self.workload.dtype)
        self.dtype = str(self.number).removeprefix("torch.")

    def setting(self, label: str, machines: Sequence[Any]) -> Setting:
        built = [as_machine(machine) for machine in machines]
        for machine in built:
            machine.rate(self.dtype)  # a comparison at different precisions means nothing
        return Setting(label, tuple(self._fastest(machine) for machine in built))

    def table(self, data: int) -> OpTable:
        work = self.workload
        key = (self.source.fingerprint(), work.task, work.batch // data, work.sequence, self.dtype)
        if key not in _TRACES:
            _TRACES[key] = trace_ops(
                self.source, work.task, work.batch // data, work.sequence, self.number
            )
            while len(_TRACES) > 16:
                del _TRACES[next(iter(_TRACES))]
        return _TRACES[key]

    def _fastest(self, machine: Machine) -> Outcome | DoesNotFit:
        best: Outcome | None = None
        refused: DoesNotFit | None = None
        for tensor, data in self._degrees(machine.processors):
            try:
                outcome = self.outcome(machine, tensor, data)
            except DoesNotFit as error:
                refused = error
                continue
            if best is None or outcome.total.seconds < best.total.seconds:
                best = outcome
        return best or refused or DoesNotFit(f"{machine.name} has no processors")

    def _degrees(self, processors: int) -> list[tuple[int, int]]:
        """(tensor, data) whose product divides the machine; heads and batch divide by them."""
        heads = getattr(self.source.config, "num_attention_heads", None) or 1
        divisors = [n for n in range(1, processors + 1) if processors % n == 0]
        return [
            (t, d)
            for t, d in itertools.product(divisors, divisors)
            if processors % (t * d) == 0 and heads % t == 0 and self.workload.batch % d == 0
        ]

    def outcome(self, machine: Machine, tensor: int, data: int) -> Outcome:
        """Costs of one plan, joules those of all its chips.

        Raises:
            DoesNotFit: a chip's share does not fit its levels.
        """
        table = self.table(data)
        homes = machine.homes({c: -(-n // tensor) for c, n in table.resident.items()})
        phases = {}
        for phase in table.phases:
            # A kernel whose every byte a neighbour would keep to itself is part of that neighbour.
            lean = [op.lean() for op in table.phase(phase) if op.least or op.flops]
            cost = _total(machine, [_part(op, tensor) for op in lean], homes)
            cost = _chips(cost, tensor * data)
            cost = cost + _chips(self._tensor_exchange(machine, phase, tensor, data), data)
            if phase == "backward" and data > 1:
                share = table.resident["gradients"] / tensor
                cost = cost + _chips(machine.all_reduce(share, data, inside=tensor), tensor)
            phases[phase] = cost
        tokens = self.workload.tokens
        total = _sum(c * (tokens if phase == "decode" else 1) for phase, c in phases.items())
        return Outcome(machine.name, machine.illustrative, tensor, data, phases, total)

    def _tensor_exchange(self, machine: Machine, phase: str, tensor: int, data: int) -> Cost:
        """Two all-reduces of the hidden states for each layer and direction, of one group."""
        if tensor == 1 or phase == "step":
            return Cost()
        text = self.source.config.get_text_config()  # type: ignore[union-attr]
        tokens = 1 if phase == "decode" else self.workload.sequence
        hidden = self.workload.batch // data * tokens * text.hidden_size * self.number.itemsize
        return machine.all_reduce(hidden, tensor) * (2 * text.num_hidden_layers)


def _chips(cost: Cost, count: int) -> Cost:
    """The same time on `count` chips, or groups, at once."""
    return replace(cost, joules=None if cost.joules is None else cost.joules * count)


def _sum(costs: Any) -> Cost:
    total = Cost()
    for cost in costs:
        total = total + cost
    return total


def _total(machine: Machine, ops: Sequence[Op], homes: Mapping[str, int]) -> Cost:
    return _sum(machine.cost(op, homes) * op.count for op in ops)


def _part(op: Op, tensor: int) -> Op:
    """One chip's share: a product is split along the longer of its columns and its inner side."""
    if tensor == 1:
        return op
    gemm = op.gemm
    if gemm is not None:
        n, k = (gemm.n / tensor, gemm.k) if gemm.n >= gemm.k else (gemm.n, gemm.k / tensor)
        gemm = replace(gemm, n=math.ceil(n), k=math.ceil(k))
    return replace(
        op,
        flops=-(-op.flops // tensor),
        traffic=tuple((category, -(-nbytes // tensor)) for category, nbytes in op.traffic),
        gemm=gemm,
    )


def check_sweep(text: str) -> tuple[str, list[Any]]:
    """("levels.dram.bandwidth", [1.0, 2.0]) from "levels.dram.bandwidth=1,2".

    Raises:
        UsageError: no name, no value, or a value that is no number where one is needed.
    """
    path, equals, listed = text.partition("=")
    values = [value for value in listed.split(",") if value]
    if not (path and equals and values):
        raise UsageError(
            f"sweep {text!r} is malformed; write for example levels.dram.bandwidth=0.5,1,2"
        )
    if path == "model":
        return path, values
    try:
        return path, [int(v) if path in ("batch", "sequence") else float(v) for v in values]
    except ValueError as error:
        raise UsageError(f"sweep {text!r}: {error}; list numbers, separated by commas") from error
