"""Sharded: tensors laid end to end in one flat buffer that is split over ranks, and its traffic."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

LET_GO_SECONDS = 1.0


class Sharded:
    """Where each of several tensors lies in a flat buffer of equal shards, one for each rank.

    The buffer is padded at its end to `ranks * shard` elements. Collectives work in place: a
    rank's shard is a view of the buffer.

    Args:
        shapes: of the tensors, in the order in which they lie.
        group: the ranks; None means all.
        multiple: a shard has a multiple of so many elements; a matrix split by rows is one tensor
            with `multiple` the length of a row.
    """

    def __init__(
        self,
        shapes: Sequence[torch.Size],
        group: dist.ProcessGroup | None = None,
        *,
        multiple: int = 1,
    ):
        self.shapes, self.group = [torch.Size(shape) for shape in shapes], group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        *self._starts, self.numel = accumulate((s.numel() for s in self.shapes), initial=0)
        self.shard = -(-self.numel // (self.ranks * multiple)) * multiple
        self.padded = self.shard * self.ranks

    def own(self, flat: Tensor) -> Tensor:
        """This rank's shard (shard,) of a buffer (padded,), as a view."""
        return flat.narrow(0, self.rank * self.shard, self.shard)

    def view(self, flat: Tensor, number: int) -> Tensor:
        """One tensor in its shape, as a view of a buffer."""
        shape = self.shapes[number]
        return flat.narrow(0, self._starts[number], shape.numel()).view(shape)

    def views(self, flat: Tensor) -> list[Tensor]:
        return [self.view(flat, number) for number in range(len(self.shapes))]

    def pieces(self) -> Iterator[tuple[int, slice, slice]]:
        """What this rank holds: a tensor's number, which of its elements, where in the shard."""
        begin = self.rank * self.shard
        for number, (shape, at) in enumerate(zip(self.shapes, self._starts, strict=True)):
            low, high = max(at, begin), min(at + shape.numel(), begin + self.shard)
            if low < high:
                yield number, slice(low - at, high - at), slice(low - begin, high - begin)

    def gather_(self, flat: Tensor) -> None:
        """Fill a buffer (padded,) in which each rank's own shard is right."""
        self.begin_gather(flat).wait()

    def begin_gather(self, flat: Tensor) -> dist.Work:
        """As `gather_`; the result is there once the work was waited for."""
        work = dist.all_gather_single(flat, self.own(flat), group=self.group, async_op=True)
        return cast(dist.Work, work)

    def begin_reduce(self, flat: Tensor, out: Tensor) -> dist.Work:
        """Put the mean over ranks of this rank's shard of `flat` (padded,) into `out` (shard,).

        `out` may be `own(flat)`; the rest of `flat` is undefined afterwards.
        """
        # NCCL's mean over a single rank is not reliable.
        op = dist.ReduceOp.AVG if self.ranks > 1 else dist.ReduceOp.SUM
        work = dist.reduce_scatter_single(out, flat, op=op, group=self.group, async_op=True)
        return cast(dist.Work, work)


def until_let_go(collective: Callable[[], object], *tensors: Tensor) -> None:
    """Run a collective to its end, and until it no longer holds `tensors`.

    gloo's own thread drops them a little after it has said that it is done, so that what the caller
    then frees would live on for as long as that thread waits for a processor.
    """
    before = [_holders(t) for t in tensors]
    collective()
    if any(t.device.type != "cpu" for t in tensors):
        return  # on a GPU the allocator takes memory back in the order of streams
    # Somebody else may keep them for good: a mode that records calls, for example.
    deadline = time.monotonic() + LET_GO_SECONDS
    while any(_holders(t) > n for t, n in zip(tensors, before, strict=True)):
        if time.monotonic() > deadline:
            return
        time.sleep(0)


def _holders(tensor: Tensor) -> int:
    """References to a tensor and, from it and its views, to its bytes."""
    storage = tensor.untyped_storage()
    return tensor._use_count() + torch._C._storage_Use_Count(storage._cdata)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Sent:
    """One collective: which, how many elements each rank sends by a ring, and in how many bytes."""

    kind: str
    elements: int
    nbytes: int


class Traffic(TorchDispatchMode):
    """Record the collectives of the `with` block, whoever calls them.

    In a ring of N ranks each rank sends (N-1)/N of the whole buffer for a gather or a
    reduce-scatter, and twice that for an all-reduce; a broadcast counts as the buffer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Sent] = []

    def elements(self, kind: str | None = None) -> int:
        return sum(s.elements for s in self.sent if kind in (None, s.kind))

    def nbytes(self, kind: str | None = None) -> int:
        return sum(s.nbytes for s in self.sent if kind in (None, s.kind))

    def calls(self) -> Counter[str]:
        return Counter(s.kind for s in self.sent)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(t is not Tensor and hasattr(t, "__tensor_flatten__") for t in types):
            return NotImplemented
        if func.namespace == "c10d":
            self._note(func.__name__.partition(".")[0], args)
        return func(*args, **(kwargs or {}))

    def _note(self, name: str, args: tuple) -> None:
        if name == "_allgather_base_":
            whole, part = args[0], args[1]
            self._add("gather", whole.numel() - part.numel(), whole.itemsize)
        elif name == "_reduce_scatter_base_":
            part, whole = args[0], args[1]
            self._add("reduce", whole.numel() - part.numel(), whole.itemsize)
        elif name == "allreduce_":
            ranks = dist.ProcessGroup.unbox(args[1]).size()
            for tensor in args[0]:
                self._add("all-reduce", 2 * (ranks - 1) * tensor.numel() // ranks, tensor.itemsize)
        elif name == "broadcast_":
            for tensor in args[0]:
                self._add("broadcast", tensor.numel(), tensor.itemsize)

    def _add(self, kind: str, elements: int, itemsize: int) -> None:
        self.sent.append(Sent(kind, elements, elements * itemsize))
