"""Trace one training step without weights or data: which bytes live when, and how long it takes.

The step runs under `FakeTensorMode` on a shallow copy of the model. Its event log is cut where a
block's forward or backward begins and ends; a deeper model is the same segments repeated, so that
instants are extended, never maxima. A segment keeps every event, because gradient accumulation,
consumption of gradients in the backward pass and the optimizer's step are edits of these events.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from holdfast.errors import HoldfastError
from holdfast.ledger import CATEGORIES
from holdfast.meter import BACKWARD, FORWARD, StorageLog, open_storages
from holdfast.plan.blocks import Stack, members

PLACE_CODES = {"device": 0, "host": 1}
CATEGORY_CODES = {name: i for i, name in enumerate(CATEGORIES)}


def to_fake_(model: nn.Module, device: str = "cpu") -> nn.Module:
    """Replace meta parameters and buffers by fake ones in place; ties stay tied."""
    memo: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in memo:
            made = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device
            )
            memo[id(tensor)] = (
                nn.Parameter(made, requires_grad=tensor.requires_grad)
                if isinstance(tensor, nn.Parameter)
                else made
            )
        return memo[id(tensor)]

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = cast(nn.Parameter, fake(parameter))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)
        # Rotary modules keep a second reference to a buffer outside the registry.
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor) and value.is_meta:
                vars(module)[name] = fake(value)
    return model


@dataclass(frozen=True)
class GradientMark:
    """Autograd has just accumulated a gradient: before event `position` of its segment."""

    position: int
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


@dataclass
class Segment:
    """Events between two marks: category, place, phase codes and byte changes, in order.

    `shared` says at which event a tensor that enters several blocks, or the first, is freed.
    """

    category: np.ndarray
    place: np.ndarray
    phase: np.ndarray
    change: np.ndarray
    gradients: list[GradientMark] = field(default_factory=list)
    seconds: float = 0.0
    flops: int = 0
    moved: int = 0
    shared: dict["Use", int] = field(default_factory=dict)

    def pop(self, at: int) -> tuple[int, int, int, int]:
        """Remove one event: category, place, phase, change."""
        event = self.category[at], self.place[at], self.phase[at], self.change[at]
        for name in ("category", "place", "phase", "change"):
            setattr(self, name, np.delete(getattr(self, name), at))
        self.gradients = [
            replace(mark, position=mark.position - (mark.position > at)) for mark in self.gradients
        ]
        self.shared = {use: other - (other > at) for use, other in self.shared.items()}
        return event

    def append(self, category: int, place: int, phase: int, change: int) -> None:
        self.category = np.append(self.category, np.int8(category))
        self.place = np.append(self.place, np.int8(place))
        self.phase = np.append(self.phase, np.int8(phase))
        self.change = np.append(self.change, np.int64(change))


Key = tuple[str, str, int]
# The first block that a tensor enters, and its position among that block's inputs.
Use = tuple[str, int, int]


@dataclass
class Trace:
    """Segments in the order in which they ran, and the bytes that were there before."""

    order: list[Key]
    segments: dict[Key, Segment]
    base: dict[str, int]
    regular: bool


_CUTS = ("F", "end", "B", "tail")


class _Recorder(StorageLog):
    """A storage log that also adds up what each segment computes and moves."""

    def __init__(
        self,
        op_seconds: Callable[[int, int, torch.dtype], float],
        device: str,
        observe: "Observer | None" = None,
    ):
        super().__init__(device)
        self.op_seconds, self.observe = op_seconds, observe
        self.cuts: list[tuple[int, Key]] = []
        self.costs: dict[Key, list[float]] = {}
        self.gradients: dict[Key, list[tuple[int, str]]] = {}
        self.uses: dict[int, list[Use]] = {}

    def use(self, path: str, k: int, inputs: Any) -> None:
        """Note which storages enter block k."""
        for position, storage in enumerate(open_storages(inputs)):
            sid = self.id_of(storage)
            if sid is not None:
                self.uses.setdefault(sid, []).append((path, k, position))

    def open_segment(self, key: Key) -> None:
        self.cuts.append((len(self.log.events), key))
        self.costs.setdefault(key, [0.0, 0, 0])
        self.gradients.setdefault(key, [])

    def mark(self, name: str, argument: Any = None) -> None:
        if name in _CUTS:
            self.open_segment((name, *argument))
        elif name == "gradient":
            first, key = self.cuts[-1]
            self.gradients[key].append((len(self.log.events) - first, argument))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if result is NotImplemented or func.is_view or func.namespace == "prim":
            return result
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        if not tensors:
            return result
        moved = sum(t.numel() * t.element_size() for t in tensors)
        flops = _flops(func, args, kwargs or {}, result)
        dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
        cost = self.costs[self.cuts[-1][1]]
        cost[0] += self.op_seconds(flops, moved, dtype)
        cost[1] += flops
        cost[2] += moved
        if self.observe is not None:
            self.observe(self, self.cuts[-1][1], func, args, kwargs or {}, result, flops)
        return result


# (log, segment, operation, args, kwargs, result, FLOPs), after each operation that is no view.
Observer = Callable[[StorageLog, Key, Any, tuple, dict, Any, int], None]


def _flops(func, args, kwargs, result) -> int:
    formula = flop_registry.get(func._overloadpacket)
    if formula is not None:
        return int(formula(*args, **kwargs, out_val=result))
    name = func._schema.name
    if "flash_attention_for_cpu" in name:
        backward = name.endswith("backward")
        q, k = (args[1], args[2]) if backward else (args[0], args[1])
        b, heads, n, d = q.shape
        return (10 if backward else 4) * b * heads * n * k.shape[2] * d
    return 0


def record(
    model: nn.Module,
    stacks: list[Stack],
    step: Callable[[], None],
    *,
    inputs: Any,
    op_seconds: Callable[[int, int, torch.dtype], float],
    device: str = "cpu",
    observe: Observer | None = None,
) -> Trace:
    """Run `step` (forward and backward, no optimizer) once and cut its log into segments.

    Args:
        model: fake, shallow, with every method applied.
        stacks: their `path`s hold the kept blocks, in order.
        inputs: the batch; counted under `inputs`.
        observe: sees every operation and the log, in which categories are final afterwards.

    Returns:
        A trace with `regular=False` where blocks did not run once each and in order, so that it
        must not be extended.
    """
    recorder = _Recorder(op_seconds, device, observe)
    recorder.seed("parameters", list(model.parameters()))
    recorder.seed("buffers", list(model.buffers()))
    recorder.seed("inputs", inputs)
    handles = _mark_blocks(model, stacks, recorder)
    recorder.watch_parameters((n, p) for n, p in model.named_parameters() if p.requires_grad)
    recorder.open_segment(("prologue", "", 0))
    try:
        with recorder:
            step()
    finally:
        for handle in handles:
            handle.remove()
    recorder.tag("gradients", [p.grad for p in model.parameters()])
    return _cut(recorder, stacks, dict(model.named_parameters()))


def _first_grad_tensor(value: Any) -> Tensor | None:
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor) and leaf.requires_grad and not leaf.is_leaf:
            return leaf
    return None


def _mark_blocks(model: nn.Module, stacks: list[Stack], recorder: _Recorder) -> list:
    handles = []
    for stack in stacks:
        for k, block in enumerate(members(model, stack.path)):

            def before(module, args, kwargs, stack=stack, k=k):
                recorder.mark("F", (stack.path, k))
                recorder.use(stack.path, k, (args, kwargs))
                entering = _first_grad_tensor((args, kwargs))
                if k == 0 and entering is not None:
                    entering.register_hook(lambda g, s=stack: recorder.mark("tail", (s.path, 0)))

            def after(module, args, output, stack=stack, k=k):
                recorder.mark("end", (stack.path, k))
                leaving = _first_grad_tensor(output)
                if leaving is not None:
                    leaving.register_hook(lambda g, s=stack, k=k: recorder.mark("B", (s.path, k)))

            handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(block.register_forward_hook(after))
    return handles


def _cut(recorder: _Recorder, stacks: list[Stack], parameters: dict[str, nn.Parameter]) -> Trace:
    log = recorder.log
    order = [key for _, key in recorder.cuts]
    starts = [position for position, _ in recorder.cuts]
    base = dict.fromkeys(CATEGORIES, 0)
    for sid, change, _ in log.events[: starts[0]]:
        base[log.storages[sid].category] += change
    # What enters the first block may be held by the model too, and be freed far from that block.
    shared = {
        sid: uses[0]
        for sid, uses in recorder.uses.items()
        if uses[0][1] == 0 or len({use[:2] for use in uses}) > 1
    }
    segments: dict[Key, Segment] = {}
    for key, first, last in zip(order, starts, [*starts[1:], len(log.events)], strict=True):
        events = log.events[first:last]
        storages = [log.storages[sid] for sid, _, _ in events]
        seconds, flops, moved = recorder.costs[key]
        segments[key] = Segment(
            np.array([CATEGORY_CODES[s.category] for s in storages], np.int8),
            np.array([PLACE_CODES[s.place] for s in storages], np.int8),
            np.array([phase for _, _, phase in events], np.int8),
            np.array([change for _, change, _ in events], np.int64),
            [_gradient_mark(parameters[name], name, at) for at, name in recorder.gradients[key]],
            seconds,
            int(flops),
            int(moved),
            {
                shared[sid]: at
                for at, (sid, change, _) in enumerate(events)
                if sid in shared and change < 0
            },
        )
    return Trace(order, segments, base, _regular(order, stacks))


def _gradient_mark(parameter: nn.Parameter, name: str, position: int) -> GradientMark:
    nbytes = sum(s.nbytes() for s in open_storages(parameter.grad))
    return GradientMark(position, name, tuple(parameter.shape), parameter.dtype, nbytes)


def _regular(order: list[Key], stacks: list[Stack]) -> bool:
    """Whether each block ran forward once, in order and together, and backward in reverse."""
    if len(set(order)) != len(order):
        return False
    for stack in stacks:
        count = len(stack.kept)
        forward = [key for key in order if key[0] in ("F", "end") and key[1] == stack.path]
        backward = [key for key in order if key[0] == "B" and key[1] == stack.path]
        expected = [(n, stack.path, k) for k in range(count) for n in ("F", "end")]
        mirrored = [("B", stack.path, k) for k in reversed(range(count))]
        if forward != expected or backward not in (mirrored, []):
            return False
        for run in (forward, backward):
            if run:
                at = order.index(run[0])
                if order[at : at + len(run)] != run:
                    return False
    return True


def align_(traces: list[Trace], stacks: list[Stack]) -> None:
    """Free tensors that several blocks share at one place under all options, in place.

    A mask that every block reads is freed early where blocks keep what they need, and late where
    they run again. In a mixture it lives as long as under the longest option, and where a block
    stands for several it is freed once: after the stack's last block forward, or first backward.
    """
    order = traces[0].order
    last = {stack.path: len(stack.kept) - 1 for stack in stacks}
    stands_for = {
        (stack.path, k): stack.representative.count(k)
        for stack in stacks
        for k in range(len(stack.kept))
    }
    found: dict[Use, list[tuple[Trace, Key]]] = {}
    for trace in traces:
        for key in order:
            for use in trace.segments[key].shared:
                found.setdefault(use, []).append((trace, key))
    for use, places in found.items():
        target = max((key for _, key in places), key=order.index)
        name, path, k = target
        if name in ("F", "end", "B") and stands_for[path, k] > 1:
            target = ("B", path, 0) if name == "B" else ("end", path, last[path])
        for trace, key in places:
            if key != target:
                segment = trace.segments[key]
                category, place, _, change = segment.pop(segment.shared.pop(use))
                phase = FORWARD if target[0] in ("F", "end", "prologue") else BACKWARD
                trace.segments[target].append(category, place, phase, change)


def expand(trace: Trace, stacks: list[Stack]) -> list[tuple[Key, Key]]:
    """The order of the full model: pairs (segment of the trace, the same with its real index).

    Raises:
        HoldfastError: an irregular trace of a truncated model.
    """
    by_path = {stack.path: stack for stack in stacks}
    if not trace.regular:
        if any(len(s.kept) != s.depth for s in stacks):
            raise HoldfastError("blocks do not run once each in order; trace the whole model")
        return [(key, key) for key in trace.order]
    full: list[tuple[Key, Key]] = []
    done: set[tuple[str, str]] = set()
    for key in trace.order:
        name, path, _ = key
        if name in ("prologue", "tail"):
            full.append((key, key))
            continue
        run = "F" if name == "end" else name
        if (run, path) in done:
            continue
        done.add((run, path))
        stack = by_path[path]
        indices = range(stack.depth) if run == "F" else reversed(range(stack.depth))
        for real in indices:
            k = stack.representative[real]
            for part in ("F", "end") if run == "F" else ("B",):
                full.append(((part, path, k), (part, path, real)))
    return full
