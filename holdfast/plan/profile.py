"""Profile: seconds of each distinct operation on one device, measured in the step it belongs to.

An operation is known by its name, the shapes and dtypes of its tensors and the integers among its
arguments. It is timed once, while a real but shallow step runs, so that caches, allocations and
neighbours are what they are in training; deeper models repeat the same operations. What passes
between operations (Python, autograd's engine, kernel launches) is measured as a gap per operation
and phase; it grows with the operations, whose tensors are freed there. Collectives are measured
as a table of bytes and ranks.
"""

import json
import os
import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from holdfast.errors import UsageError
from holdfast.files import write_text
from holdfast.host import cpu_model
from holdfast.plan.hardware import Hardware

VERSION = 2
# Steps whose operations differ by less in length do not tell how a gap grows with them.
APART = 1.5


class Op(NamedTuple):
    """One operation, and what a roofline needs where it was not measured."""

    key: str
    flops: int
    moved: int
    dtype: torch.dtype


def op_key(func: Any, args: Any, kwargs: Any) -> str:
    """Name, shapes, dtypes and integers of a call; a quote marks a tensor that is not contiguous.

    Floats are left out: a learning rate changes at every step, but never the time.
    """
    parts = [str(func)]
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor):
            dtype = str(leaf.dtype).removeprefix("torch.")
            order = "" if leaf.is_contiguous() else "'"
            parts.append(f"{dtype}{list(leaf.shape)}{order}".replace(" ", ""))
        elif isinstance(leaf, int):
            parts.append(str(leaf))
    return " ".join(parts)


def is_timed(func: Any, args: Any, kwargs: Any, result: Any) -> bool:
    """Whether a call is an operation of its own: views only relabel and count as gaps."""
    if func.is_view or func.namespace == "prim":
        return False
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs, result)))


@dataclass
class Profile:
    """What was measured on one device; `seconds` answers for one operation.

    Attributes:
        ops: key -> seconds.
        gaps: phase -> (seconds of a mean operation, seconds that pass beside each), one entry
            for each step measured; slightly negative where timing an operation costs more than
            the gap.
        collectives: name -> ranks -> [(bytes, seconds)], ascending; "stall" is what computing
            loses beside an all-reduce: nothing where they overlap for free, and more than the
            all-reduce alone takes where its threads and those that compute drive each other off
            the same cores.
        slowdown: ranks on this machine -> how much slower each computes than alone.
    """

    device: str = "cpu"
    threads: int = 1
    machine: str = ""
    ops: dict[str, float] = field(default_factory=dict)
    gaps: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    collectives: dict[str, dict[int, list[tuple[int, float]]]] = field(default_factory=dict)
    slowdown: dict[int, float] = field(default_factory=dict)

    def missing(self, ops: Iterable[Op]) -> set[str]:
        return {op.key for op in ops} - self.ops.keys()

    def seconds(self, op: Op, fallback: Hardware | None = None) -> float:
        """Seconds of one operation; by the roofline of `fallback` where it was not measured.

        Raises:
            UsageError: it was not measured, and no fallback is given.
        """
        found = self.ops.get(op.key)
        if found is not None:
            return found
        if fallback is not None:
            return fallback.seconds(op.flops, op.moved, op.dtype)
        raise UsageError(
            f"the profile of {self.device} has no time for {op.key!r}; measure the plan first, or "
            "ask for the roofline explicitly with missing='roofline'"
        )

    def beside(self, phase: str, count: int, seconds: float) -> float:
        """Seconds that pass beside `count` operations that last `seconds` together.

        By the line through the steps measured whose slope is the median of those through two
        (Theil and Sen), which single disturbed steps do not bend; 0 where none was measured.
        """
        steps = self.gaps.get(phase)
        if not steps:
            return 0.0
        slopes = [
            (high - low) / (long - short)
            for short, low in steps
            for long, high in steps
            if long > APART * short
        ]
        slope = max(0.0, statistics.median(slopes)) if slopes else 0.0
        return (
            count * statistics.median(gap - slope * mean for mean, gap in steps) + slope * seconds
        )

    def collective(self, name: str, nbytes: int, ranks: int) -> float | None:
        """Seconds of a collective, between measured sizes by straight lines; None if unknown."""
        table = self.collectives.get(name, {}).get(ranks)
        if not table:
            return None
        sizes = [size for size, _ in table]
        at = min(max(bisect_left(sizes, nbytes), 1), len(table) - 1)
        if len(table) == 1 or nbytes <= sizes[0]:
            return table[0][1]  # latency
        (low, fast), (high, slow) = table[at - 1], table[at]
        return fast + (slow - fast) * (nbytes - low) / (high - low)

    def measure(
        self,
        model: nn.Module,
        run: Callable[[], Tensor],
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        recompute: bool,
        repeats: int = 5,
    ) -> int:
        """Time the operations of one training step that are not known yet, in context.

        Steps with a clock on every operation alternate with plain ones, whose time beyond the
        operations is the gap.

        Args:
            model: shallow; each kind of block once or more.
            run: () -> loss.
            optimizers: one for each parameter, so that updates are known by shape.
            recompute: blocks run again in backward, which has a gap of its own.

        Returns:
            How many keys were added.
        """
        step = _Step(model, run, optimizers)
        step(_Clock(model))  # cold: states are made, kernels chosen
        clock = _Clock(model)
        step(clock)
        calls = clock.calls
        rows, plain = [], []
        for _ in range(repeats):
            plain.append(step(None))
            clock = _Clock(model, keys=False)
            step(clock)
            rows.append(clock.read())
        if any(len(row) != len(calls) for row in rows):
            raise UsageError("the step runs other operations each time; it cannot be profiled")
        # The best of repetitions: other programs can only make an operation slower.
        best = [min(times) for times in zip(*rows, strict=True)]
        seen: dict[str, list[float]] = {}
        totals: dict[str, tuple[float, int]] = {}
        for (phase, key), seconds in zip(calls, best, strict=True):
            seen.setdefault(key, []).append(seconds)
            total, count = totals.get(phase, (0.0, 0))
            totals[phase] = total + seconds, count + 1
        fresh = {k: statistics.fmean(v) for k, v in seen.items() if k not in self.ops}
        self.ops |= fresh
        for phase in ("forward", "backward"):
            total, count = totals[phase]
            whole = min(times[phase] for times in plain)
            name = "recompute" if recompute and phase == "backward" else phase
            self.gaps.setdefault(name, []).append((total / count, (whole - total) / count))
        return len(fresh)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON; a crash leaves the old file or the new."""
        fields = asdict(self) | {"version": VERSION, "torch": torch.__version__}
        write_text(Path(path), json.dumps(fields, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Profile":
        """Read what `save` wrote.

        Raises:
            UsageError: no such file, not a profile, or one of another version.
        """
        try:
            fields = json.loads(Path(path).read_text(encoding="utf-8"))
            if fields.pop("version") != VERSION:
                raise ValueError(f"its version is not {VERSION}")
            fields.pop("torch")
            fields["slowdown"] = {int(n): f for n, f in fields["slowdown"].items()}
            fields["gaps"] = {k: [(m, g) for m, g in rows] for k, rows in fields["gaps"].items()}
            fields["collectives"] = {
                name: {int(n): [(s, t) for s, t in rows] for n, rows in tables.items()}
                for name, tables in fields["collectives"].items()
            }
            return cls(**fields)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{os.fspath(path)} is no profile that can be read ({error}); "
                "`holdfast plan sweep --profile FILE` makes one"
            ) from error

    @classmethod
    def of_this_device(cls, device: str = "cpu") -> "Profile":
        """An empty profile that says what it is measured on."""
        name = torch.cuda.get_device_name() if device == "cuda" else cpu_model()
        return cls(device, torch.get_num_threads(), name)


def _timer(on_gpu: bool) -> Callable[[], float]:
    # A single thread's own CPU time leaves out what other programs take of its core.
    return time.perf_counter if on_gpu or torch.get_num_threads() > 1 else time.thread_time


class _Step:
    """One optimizer step that says when its phases begin."""

    def __init__(self, model, run, optimizers):
        self.model, self.run, self.optimizers = model, run, optimizers
        self.on_gpu = next(model.parameters()).is_cuda
        self._timer = _timer(self.on_gpu)

    def _now(self) -> float:
        if self.on_gpu:
            torch.cuda.synchronize()
        return self._timer()

    def __call__(self, clock: "_Clock | None") -> dict[str, float]:
        """Run; seconds of forward and backward."""
        if clock is not None:
            with clock:
                loss = self.run()
                clock.phase = "backward"
                loss.backward()
                clock.phase = "step"
                for optimizer in self.optimizers:
                    optimizer.step()
            times = {}
        else:
            start = self._now()
            loss = self.run()
            middle = self._now()
            loss.backward()
            times = {"forward": middle - start, "backward": self._now() - middle}
        for parameter in self.model.parameters():
            parameter.grad = None
        return times


class _Clock(TorchDispatchMode):
    """Times every operation while active: on a CPU by the clock, on a GPU by torch.profiler."""

    def __init__(self, model: nn.Module, *, keys: bool = True):
        super().__init__()
        self.phase = "forward"
        self.calls: list[tuple[str, str]] = []
        self._times: list[float] = []
        self._keys = keys
        on_gpu = next(model.parameters()).is_cuda
        self._timer = _timer(on_gpu)
        activity = torch.profiler.ProfilerActivity
        self._profiler = (
            torch.profiler.profile(activities=[activity.CPU, activity.CUDA]) if on_gpu else None
        )

    def __enter__(self):
        if self._profiler is not None:
            self._profiler.__enter__()
        return super().__enter__()

    def __exit__(self, *exc):
        super().__exit__(*exc)
        if self._profiler is not None:
            torch.cuda.synchronize()
            self._profiler.__exit__(*exc)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._profiler is None:
            start = self._timer()
            result = func(*args, **kwargs)
            seconds = self._timer() - start
        else:
            seconds = 0.0
            with torch.profiler.record_function(_label(len(self._times))):
                result = func(*args, **kwargs)
        if is_timed(func, args, kwargs, result):
            self._times.append(seconds)
            if self._keys:
                self.calls.append((self.phase, op_key(func, args, kwargs)))
        return result

    def read(self) -> list[float]:
        """Seconds of each operation, in order."""
        if self._profiler is None:
            return self._times
        found = [0.0] * len(self._times)
        for event in self._profiler.events():
            number = _number(event.name)
            # The label appears on the GPU's time line too; its kernels must not count twice.
            on_cpu = event.device_type == torch.autograd.DeviceType.CPU
            if on_cpu and number is not None and number < len(found):
                found[number] += event.device_time_total / 1e6
        return found


def _label(number: int) -> str:
    return f"holdfast.op.{number}"


def _number(label: str) -> int | None:
    head, _, number = label.rpartition(".")
    return int(number) if head == "holdfast.op" else None
