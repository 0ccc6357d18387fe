"""StepGraph: operations and byte changes of one micro-batch, by block, for replaying any plan.

One traced micro-batch of a shallow copy stands for the whole model; a shard of it, for 1/t of its
heads and inner features, is the same model with smaller fields in its config.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from holdfast.errors import UsageError
from holdfast.meter import BACKWARD, fake_step
from holdfast.plan.apply import set_option
from holdfast.plan.blocks import members, stacks_of, truncate_
from holdfast.plan.compose import Life, UpdateCost, summarise
from holdfast.plan.family import UpdateCosts, trace_family
from holdfast.plan.models import ModelSource, loss_of
from holdfast.plan.profile import Op, is_timed, op_key
from holdfast.plan.trace import Key, Segment, _flops, to_fake_

OPTIONS = ("keep", "recompute")
_HALVES = {"F": (False,), "B": (True,), "tail": (True,)}
_SPLIT = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


@dataclass(frozen=True)
class Part:
    """The forward or the backward half of a segment; `real` has the block's real index."""

    traced: Key
    real: Key
    backward: bool


@dataclass(frozen=True)
class Held:
    """Device bytes by category, relative to those before: at the highest instant, at the end."""

    peak: np.ndarray
    end: np.ndarray


@dataclass(frozen=True)
class Bucket:
    """Gradients that are summed together, full after a share of the part with this number."""

    part: int
    share: float
    nbytes: int


def shard(source: ModelSource, t: int) -> ModelSource:
    """What one of t tensor-parallel ranks computes: 1/t of the heads and of the inner features.

    Raises:
        UsageError: the config does not say how to split it.
    """
    if t == 1:
        return source
    config = source.config
    if config is None or not all(getattr(config, name, None) for name in _SPLIT):
        raise UsageError(
            f"t={t} splits {', '.join(_SPLIT)}, which {source.name} does not have; use t=1"
        )
    odd = [f"{name}={getattr(config, name)}" for name in _SPLIT if getattr(config, name) % t]
    if odd:
        raise UsageError(f"t={t} does not divide {', '.join(odd)} of {source.name}")
    smaller = copy.deepcopy(config)
    if not getattr(config, "head_dim", None):
        smaller.head_dim = config.hidden_size // config.num_attention_heads
    for name in _SPLIT:
        setattr(smaller, name, getattr(config, name) // t)
    return replace(source, config=smaller, path=None, make=None)


class StepGraph:
    """One micro-batch of a model, or of its 1/t shard, kept or recomputed.

    Args:
        source: the whole model.
        micro, sequence: shape of the micro-batch.
        t: degree of tensor parallelism.
    """

    def __init__(self, source: ModelSource, micro: int, sequence: int, dtype: torch.dtype, t: int):
        self.source, self.dtype = shard(source, t), dtype
        self.micro, self.sequence = micro, sequence
        self.ops: dict[str, dict[tuple[Key, bool], list[Op]]] = {}
        self.family = trace_family(
            lambda: self.source.build("meta", dtype),
            lambda: self.inputs("cpu"),
            lambda model: model,
            lambda model, batch: loss_of(model(**batch)),
            {name: partial(_set, name) for name in OPTIONS},
            lambda *_: 0.0,
            self._observe,
        )
        self.optimizer_bytes = UpdateCosts(optimizer, lambda *_: 0.0)
        self.update_ops = cache(self._update_ops)
        self.held = cache(self._held)

    def inputs(self, device: str) -> dict[str, Any]:
        return self.source.example_inputs(self.micro, self.sequence, device, self.dtype)

    def _observe(self, option: str):
        found = self.ops[option] = {}

        def see(log, key, func, args, kwargs, result, flops) -> None:
            op = _op(func, args, kwargs, result)
            found.setdefault((key, log.phase() == BACKWARD), []).append(op)

        return see

    @cached_property
    def whole(self) -> nn.Module:
        return self.source.build("meta", self.dtype)

    @property
    def depth(self) -> int:
        return sum(stack.depth for stack in self.family.stacks)

    @property
    def boundary_bytes(self) -> int:
        """Bytes of the tensor between two blocks."""
        width = getattr(self.source.config, "hidden_size", None)
        if width is None:
            raise UsageError(f"{self.source.name} has no hidden_size; use t=1 and p=1")
        return self.micro * self.sequence * width * self.dtype.itemsize

    @cached_property
    def parts(self) -> list[Part]:
        """Every segment at full depth, its forward and its backward half, in running order."""
        return [
            Part(traced, real, backward)
            for traced, real in self.family.layout
            for backward in _HALVES.get(real[0], (False, True))
        ]

    def stage_of(self, real: Key, p: int) -> int:
        """Which of p stages runs a segment: blocks evenly, all else with its neighbours."""
        name, _, index = real
        return 0 if p == 1 or name in ("prologue", "tail") else index * p // self.depth

    def parameters(self, stage: int, p: int) -> list[nn.Parameter]:
        """A stage's own parameters; what is registered after the blocks belongs to the last.

        A weight that ties the two ends is on both.
        """
        found: dict[int, nn.Parameter] = {}
        path, after = self.family.stacks[0].path if self.family.stacks else "", False
        for name, parameter in self.whole.named_parameters(remove_duplicate=False):
            home = p - 1 if after else 0
            if path and name.startswith(f"{path}."):
                after = True
                home = self.stage_of(("F", path, int(name[len(path) + 1 :].split(".")[0])), p)
            if home == stage:
                found[id(parameter)] = parameter
        return list(found.values())

    def all_ops(self, recompute: bool) -> Iterator[Op]:
        """Every operation of a step, equal blocks once."""
        for ops in self.ops[OPTIONS[recompute]].values():
            yield from ops
        for parameter in self.family.trainable:
            yield from self.update_ops(parameter.shape)

    def _update_ops(self, shape: tuple[int, ...]) -> list[Op]:
        with fake_step():
            parameter = nn.Parameter(torch.empty(shape, dtype=self.dtype))
            update = optimizer([parameter])
            parameter.grad = torch.empty(shape, dtype=self.dtype)
            update.step()
            with _Collector() as collector:
                update.step()
        return collector.ops

    def _held(self, part: Part, option: str, later: bool) -> Held:
        """Bytes of a part; `later` micro-batches find the gradients of an earlier one."""
        segment = self.family.uniform[option].segments[part.traced]
        segment = _half(segment, part.traced[0], part.backward)
        found = summarise(segment, Life(False, 2), later, lambda mark: UpdateCost(0, 0, 0.0))
        peaks = [cells[0] for _, cells in found.peaks[0].values()]
        return Held(max(peaks, key=np.sum, default=np.zeros_like(found.end[0])), found.end[0])

    def buckets(self, parts: list[Part], limit: int) -> list[Bucket]:
        """How `DistributedDataParallel` cuts the gradients of `parts`, in their order.

        A bucket closes after the gradient with which it holds `limit` bytes. A part makes its
        gradients in proportion to their bytes.
        """
        found, waiting = [], 0
        for k, part in enumerate(parts):
            segment = self.family.uniform["keep"].segments[part.traced]
            sizes = [mark.nbytes for mark in segment.gradients] if part.backward else []
            for made, nbytes in zip(accumulate(sizes), sizes, strict=True):
                waiting += nbytes
                if waiting >= limit:
                    found.append(Bucket(k, made / sum(sizes), waiting))
                    waiting = 0
        if waiting:
            found.append(Bucket(len(parts) - 1, 1.0, waiting))
        return found

    def flops(self) -> int:
        """FLOPs of one micro-batch at full depth, without recomputing."""
        kept = {at: sum(op.flops for op in ops) for at, ops in self.ops["keep"].items()}
        return sum(kept.get((part.traced, part.backward), 0) for part in self.parts)

    def real_model(self, device: str, recompute: bool) -> nn.Module:
        """A shallow copy with real tensors of plausible values: nothing is NaN or denormal."""
        model = self.source.build("meta", self.dtype)
        stacks = stacks_of(model)
        model = to_fake_(truncate_(model, stacks), device).train()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.02) if parameter.dim() > 1 else parameter.fill_(1)
            for buffer in model.buffers():
                buffer.fill_(1) if buffer.is_floating_point() else buffer.zero_()
        for block in (b for stack in stacks for b in members(model, stack.path)):
            set_option(block, OPTIONS[recompute], None)
        return model


def _set(option: str, block: nn.Module) -> None:
    set_option(block, option, None)


def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The one that steps are predicted with."""
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True, foreach=False)


class _Collector(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if is_timed(func, args, kwargs, result):
            self.ops.append(_op(func, args, kwargs or {}, result))
        return result


def _op(func: Any, args: Any, kwargs: Any, result: Any) -> Op:
    tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
    moved = sum(t.numel() * t.element_size() for t in tensors)
    dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
    return Op(op_key(func, args, kwargs), _flops(func, args, kwargs, result), moved, dtype)


def _half(segment: Segment, name: str, backward: bool) -> Segment:
    """The events of one direction: the last block's end runs the head in both.

    What is freed after the last gradient belongs to backward, though autograd has ended by then.
    """
    found = np.flatnonzero(segment.phase == BACKWARD)
    start = (
        0 if _HALVES.get(name) == (True,) else int(found[0]) if len(found) else len(segment.phase)
    )
    half = slice(start, None) if backward else slice(None, start)
    marks = [replace(mark, position=mark.position - start) for mark in segment.gradients]
    return Segment(
        segment.category[half],
        segment.place[half],
        segment.phase[half],
        segment.change[half],
        marks if backward else [],
    )
