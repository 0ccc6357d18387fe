"""Ring: every rank's block visits every rank, and sums for every rank are collected on the way.

Each rank sends to the next one and receives from the one before, both posted at once, so that no
order of ranks can block; computing on a block overlaps with passing it on. Two received blocks
exist at a time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from holdfast.errors import UsageError


@dataclass
class Traffic:
    """Bytes that this rank has sent over rings."""

    sent: int = 0


def ring(
    block: Sequence[Tensor],
    group: dist.ProcessGroup | None = None,
    *,
    traffic: Traffic | None = None,
) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield (rank in the group, that rank's block) once for each rank, beginning with our own.

    Args:
        block: tensors, of the same shapes and dtypes on all ranks of the group.
        group: the default group where it is None.
        traffic: counts what is sent: N - 1 blocks.

    Yields:
        The owner and its tensors, valid until the next one is asked for; read them only.

    All ranks must exhaust the generator. It is not differentiable.

    Raises:
        UsageError: `torch.distributed` is not initialised, or this rank is not in the group.
    """
    rank, ranks = place_in(group)
    here = [x.detach().contiguous() for x in block]
    spare: list[Tensor] | None = None
    for hop in range(ranks):
        if hop == ranks - 1:
            yield (rank - hop) % ranks, here
            return
        coming = [torch.empty_like(x) for x in here] if spare is None else spare
        work = _shift(here, coming, group, traffic)
        yield (rank - hop) % ranks, here
        for request in work:
            request.wait()
        # Our own block is the caller's memory: nothing is received into it.
        spare = here if hop else None
        here = coming


def ring_sum(
    parts: Iterator[Sequence[Tensor]],
    group: dist.ProcessGroup | None = None,
    *,
    traffic: Traffic | None = None,
) -> list[Tensor]:
    """For each rank the sum of what all ranks have for it: a reduce-scatter, lazily.

    Args:
        parts: what this rank adds, for ranks r - 1, r - 2, ... and at last for itself, r being its
            own rank; asked for one at a time while the sums so far travel. They are changed.
        group, traffic: as in `ring`; N - 1 parts are sent.

    Returns:
        The sum for this rank.
    """
    _, ranks = place_in(group)
    sums = list(next(parts))
    for _ in range(ranks - 1):
        sums = [x.contiguous() for x in sums]
        coming = [torch.empty_like(x) for x in sums]
        work = _shift(sums, coming, group, traffic, tag=1)
        mine = next(parts)
        for request in work:
            request.wait()
        sums = [x.add_(more) for x, more in zip(coming, mine, strict=True)]
    return sums


def place_in(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Rank and number of ranks in a group."""
    if not dist.is_initialized():
        raise UsageError(
            "torch.distributed is not initialised; start the script with torchrun and call "
            "init_process_group, or use holdfast.parallel.launch"
        )
    rank = dist.get_rank(group)
    if rank < 0:
        raise UsageError(f"rank {dist.get_rank()} is not in the group that was given")
    return rank, dist.get_world_size(group)


def _shift(
    going: list[Tensor],
    coming: list[Tensor],
    group: dist.ProcessGroup | None,
    traffic: Traffic | None,
    tag: int = 0,
) -> list[dist.Work]:
    """Start to send `going` to the next rank and to receive `coming` from the one before."""
    rank, ranks = place_in(group)
    if traffic is not None:
        traffic.sent += sum(x.nbytes for x in going)
    there, back = (rank + 1) % ranks, (rank - 1) % ranks
    ops = []
    for out, into in zip(going, coming, strict=True):
        ops.append(dist.P2POp(dist.isend, out, group=group, tag=tag, group_peer=there))
        ops.append(dist.P2POp(dist.irecv, into, group=group, tag=tag, group_peer=back))
    return dist.batch_isend_irecv(ops)
