"""Activation checkpoints split over ranks that would all keep the same one (ZeRO-R).

Ranks that share a model by splitting its matrices see the same input of each block. Each keeps 1/N
of it, on the device or in an arena, and the group gathers it before the block is recomputed.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from holdfast import attach
from holdfast.parallel.sharded import Sharded
from holdfast.places.activations import SMALL_ELEMENTS
from holdfast.places.arena import Arena, Entry

_keys = itertools.count()


class ContiguousArena(Arena):
    """One tensor of `budget_bytes` on a device, allocated once, in which shards lie end to end.

    Long-lived checkpoints among short-lived activations would leave the allocator holes that fit
    nothing. What comes last goes first in backward, so that a stack needs no search: space is taken
    at the top, and is free again when everything above it is. `used_peak` is the most that was
    taken, all of it is resident.
    """

    place = "device"

    def __init__(self, budget_bytes: int, device: torch.device | str = "cpu"):
        super().__init__(budget_bytes)
        self.raw = torch.empty(budget_bytes, dtype=torch.uint8, device=device)
        self._charge(budget_bytes)
        self.used_peak = 0
        self._stack: list[list[int]] = []  # [start, bytes, 1 if held]

    def _reserve(self, tensor: Tensor) -> list[int]:
        start = sum(self._stack[-1][:2]) if self._stack else 0
        size = -(-tensor.nbytes // 16) * 16  # any dtype may follow
        if start + size > self.budget_bytes:
            free = self.budget_bytes - start
            raise self._full(size, free, size - free)
        self._stack.append([start, size, 1])
        self.used_peak = max(self.used_peak, start + size)
        return self._stack[-1]

    def _typed(self, entry: Entry) -> Tensor:
        part = self.raw.narrow(0, entry.slot[0], entry.nbytes)
        return part.view(entry.like.dtype).view(entry.shape)

    def _write(self, entry: Entry, tensor: Tensor) -> None:
        self._typed(entry).copy_(tensor)

    def _read(self, entry: Entry, out: Tensor) -> None:
        out.copy_(self._typed(entry))

    def _release(self, entry: Entry) -> None:
        entry.slot[2] = 0
        while self._stack and not self._stack[-1][2]:
            self._stack.pop()


def partition_activations(
    modules: nn.Module | Iterable[nn.Module],
    group: dist.ProcessGroup | None = None,
    arena: Arena | None = None,
) -> attach.Handle:
    """Recompute each module in backward from its input, of which each rank keeps its share.

    Every rank of `group` must call the modules with equal inputs, and run backward in the same
    order, because a gather is a collective. Inputs of at most 1024 elements stay whole.

    Args:
        modules: blocks, none inside another.
        group: the ranks that see equal inputs, those of tensor parallelism; None means all.
        arena: where shares are kept; a `HostArena` leaves nothing on the device, a
            `ContiguousArena` keeps them in one piece. None leaves them to torch's allocator.
    """
    if isinstance(modules, nn.Module) and not isinstance(modules, nn.ModuleList):
        modules = [modules]
    handle = attach.Handle()
    for module in modules:
        handle += attach.wrap(module, _Partitioned(group, arena))
    return handle


class _Partitioned:
    """Runs a forward as a checkpoint whose saved inputs are shares."""

    def __init__(self, group: dist.ProcessGroup | None, arena: Arena | None):
        self.group, self.arena = group, arena

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # Of a checkpoint, only its inputs reach the hooks outside of it.
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    def _pack(self, tensor: Tensor) -> "Tensor | _Share":
        small = tensor.numel() <= SMALL_ELEMENTS
        if small or isinstance(tensor, nn.Parameter) or not tensor.is_floating_point():
            return tensor
        return _Share(tensor.detach(), self.group, self.arena)


class _Share:
    """This rank's part of a tensor, until backward has used it."""

    def __init__(self, tensor: Tensor, group: dist.ProcessGroup | None, arena: Arena | None):
        self.layout = Sharded([tensor.shape], group)
        self.arena, self.key = arena, next(_keys)
        share = tensor.new_zeros(self.layout.shard)
        flat = tensor.reshape(-1)
        for _, source, target in self.layout.pieces():
            share[target] = flat[source]
        self.share: Tensor | None = share if arena is None else None
        self.like = tensor.new_empty(0)
        if arena is not None:
            arena.put(self.key, share)

    def whole(self) -> Tensor:
        flat = self.like.new_empty(self.layout.padded)
        own = self.layout.own(flat)
        if self.arena is not None:
            self.arena.get(self.key, out=own)
        elif self.share is not None:
            own.copy_(self.share)
        self.layout.gather_(flat)
        return self.layout.view(flat, 0)

    def __del__(self):
        arena = getattr(self, "arena", None)
        if arena is not None:
            arena.evict(self.key)


def _unpack(saved: "Tensor | _Share") -> Tensor:
    return saved.whole() if isinstance(saved, _Share) else saved
