"""What ranks on one machine do to each other: collectives by size, and computing side by side.

On a machine with few cores nothing overlaps for free. Ranks slow each other down, and a
collective's threads take turns with those that compute; both are measured, not assumed.
"""

import math
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from holdfast.errors import UsageError
from holdfast.parallel.launch import launch
from holdfast.plan.profile import Profile

SIZES = tuple(4**k for k in range(5, 13))  # 1 KiB to 16 MiB
BURST = 8  # pieces of work, about a millisecond each


def measure(
    profile: Profile, ranks: int, *, sizes: tuple[int, ...] = SIZES, repeats: int = 7
) -> None:
    """Add to `profile` its tables and factors for `ranks` processes on this machine.

    Raises:
        UsageError: fewer than 2 ranks, or the profile is not of a CPU: there ranks do not share
            processors, and links are those of the hardware file.
    """
    if ranks < 2:
        raise UsageError(f"ranks={ranks}: one rank has nobody to wait for; measure 2 or more")
    if profile.device != "cpu":
        raise UsageError(f"the profile is of {profile.device}; contention is measured on CPUs")
    found = launch(_probe, ranks, sizes, repeats, threads=profile.threads)
    # A collective ends when its last rank ends.
    for name in ("all_reduce", "send", "stall"):
        rows = [max(times) for times in zip(*(f[name] for f in found), strict=True)]
        table = profile.collectives.setdefault(name, {})
        table[2 if name == "send" else ranks] = list(zip(sizes, rows, strict=True))
    profile.slowdown[ranks] = max(1.0, sum(f["slowdown"] for f in found) / ranks)


def _probe(sizes: tuple[int, ...], repeats: int) -> dict:
    """Runs in every rank."""
    all_reduces, sends, stalls = [], [], []
    for nbytes in sizes:
        buffer = torch.ones(max(1, nbytes // 4))
        all_reduces.append(_best(partial(dist.all_reduce, buffer), repeats))
        sends.append(_best(partial(_pass_on, buffer), repeats))
        stalls.append(_stall(buffer, all_reduces[-1], 3 * repeats))
    work = _Work(512)
    alone, beside = [], []
    # Bursts are short and many, so that on a busy machine some are left alone.
    for _ in range(5 * repeats):
        # Rank by rank first, so that each has measured how fast it is with the others asleep.
        for rank in range(dist.get_world_size()):
            dist.barrier()
            if rank == dist.get_rank():
                alone.append(_seconds(work))
        dist.barrier()
        beside.append(_seconds(work))
    slowdown = min(beside) / min(alone)
    return {"all_reduce": all_reduces, "send": sends, "stall": stalls, "slowdown": slowdown}


def _stall(buffer: Tensor, single: float, repeats: int) -> float:
    """Seconds that computing loses beside an all-reduce that takes `single` seconds alone.

    Each is begun in the midst of work that outlasts it, as a bucket is while backward goes on.
    """
    work = _Work(64)
    pieces = torch.tensor(math.ceil(2 * single / min(_seconds(work) for _ in range(repeats))))
    dist.all_reduce(pieces, dist.ReduceOp.MAX)  # ranks differ; all shall work as long
    # Small ones are too short for the clock one by one; of large ones, few make a burst.
    buffers = [buffer.clone() for _ in range(max(1, BURST // int(pieces)))]
    plain: list[float] = []
    both: list[float] = []
    for _ in range(repeats):
        for times, reducing in ((plain, False), (both, True)):
            dist.barrier()
            times.append(_seconds(partial(_burst, work, int(pieces), buffers, reducing)))
    return max(0.0, min(both) - min(plain)) / len(buffers)


def _burst(work: Callable[[], None], pieces: int, buffers: list[Tensor], reducing: bool) -> None:
    pending = []
    for buffer in buffers:
        if reducing:
            pending.append(dist.all_reduce(buffer, async_op=True))
        for _ in range(pieces):
            work()
    for reduce in pending:
        reduce.wait()


class _Work:
    """What a block does: products that fit the caches, and passes over its activations."""

    def __init__(self, rows: int) -> None:
        self.x = torch.randn(rows, 256)
        self.up, self.down = torch.randn(256, 1024), torch.randn(1024, 256)

    def __call__(self) -> None:
        inner = F.gelu(self.x @ self.up)
        F.layer_norm(self.x + inner @ self.down, (256,))


def _pass_on(buffer: Tensor) -> None:
    """From rank 0 to rank 1; the others look on."""
    rank = dist.get_rank()
    if rank == 0:
        dist.send(buffer, 1)
    elif rank == 1:
        dist.recv(buffer, 0)


def _best(work: Callable[[], object], repeats: int) -> float:
    """Other programs can only make a repetition slower."""
    times = []
    for _ in range(repeats + 1):
        dist.barrier()
        times.append(_seconds(work))
    return min(times[1:])


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
