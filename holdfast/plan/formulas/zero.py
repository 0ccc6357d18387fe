"""Bytes of model states that ZeRO spreads over ranks, exact to the padding.

The defaults of `model_state` are Adam in mixed precision: 2 bytes for a parameter and its gradient,
12 for the master weight and two moments in fp32. After Rajbhandari, Rasley, Ruwase and He, "ZeRO:
Memory Optimizations Toward Training Trillion Parameter Models", SC 2020.
"""

import math
from collections.abc import Iterable, Sequence

STAGES = (0, 1, 2, 3)
SCALAR = 4  # torch counts an optimizer's steps in an fp32 scalar beside each state


def model_state(
    parameters: int,
    ranks: int,
    stage: int,
    *,
    parameter_bytes: int = 2,
    gradient_bytes: int = 2,
    optimizer_bytes: int = 12,
) -> dict[str, int]:
    """Bytes by category on one rank, where everything is one bucket; stage 0 is data parallelism.

    Stage 1 spreads the optimizer's states, stage 2 gradients too, stage 3 also parameters. What is
    spread is padded to a multiple of `ranks`.
    """
    shard = shard_elements(parameters, ranks)

    def held(since: int, nbytes: int) -> int:
        return nbytes * (shard if stage >= since else parameters)

    return {
        "parameters": held(3, parameter_bytes),
        "gradients": held(2, gradient_bytes),
        "optimizer": held(1, optimizer_bytes),
    }


def shard_elements(numel: int, ranks: int, multiple: int = 1) -> int:
    """Elements of one of `ranks` equal shards, a multiple of `multiple`."""
    return -(-numel // (ranks * multiple)) * multiple


def bucketed(numels: Sequence[int], limit: int) -> list[list[int]]:
    """Numbers of the tensors in each bucket, filled in order to at most `limit` elements.

    A tensor larger than that has a bucket of its own.
    """
    buckets: list[list[int]] = []
    room = 0
    for index, numel in enumerate(numels):
        if not buckets or numel > room:
            buckets.append([])
            room = limit
        buckets[-1].append(index)
        room -= numel
    return buckets


def resident(
    buckets: Sequence[int],
    ranks: int,
    stage: int,
    *,
    element: int = 4,
    moments: int = 2,
    frozen: int = 0,
) -> dict[str, int]:
    """What stage 1 or 2 holds on each rank between steps, in bytes by category.

    Args:
        buckets: elements of each bucket, without padding.
        element: bytes of a parameter; fp32 (4) needs no master copy, 2 bytes do.
        moments: fp32 states per parameter, 2 for Adam.
        frozen: bytes of parameters that do not train, which every rank holds.
    """
    shards = [shard_elements(numel, ranks) for numel in buckets]
    kept = sum(shards)
    master = 0 if element == 4 else 4
    return {
        "parameters": element * ranks * kept + frozen,
        "gradients": element * kept * (ranks if stage == 1 else 1),
        "optimizer": (master + 4 * moments) * kept + SCALAR * len(buckets),
    }


def gradient_peak(
    buckets: Sequence[Sequence[int]], ranks: int, stage: int, *, element: int = 4
) -> int:
    """Most bytes of gradients in backward: what is resident, and in stage 2 the largest bucket.

    A parameter larger than the limit of a bucket, whose gradient is reduced where it is, may meet
    the bucket before it, which is still under way.

    Args:
        buckets: elements of each parameter in each bucket, without padding.
    """
    whole = [element * ranks * shard_elements(sum(b), ranks) for b in buckets]
    return sum(whole) if stage == 1 else sum(whole) // ranks + max(whole)


Shape = Sequence[int]


def row_elements(shapes: Iterable[Shape], ranks: int) -> int:
    """Elements that each rank stores of parameters that are split by rows, padding included."""
    return sum(shard_elements(shape[0], ranks) * math.prod(shape[1:]) for shape in shapes)


def sharded_rows(
    trained: Sequence[Shape],
    ranks: int,
    rank: int,
    *,
    frozen: Sequence[Shape] = (),
    moments: int = 2,
) -> dict[str, int]:
    """What stage 3 holds on one rank between steps, and of gradients before one, by category.

    torch's FSDP2 splits each parameter by rows: every rank stores as many rows as the first one,
    and of gradients as many, but moments only of rows that exist, so that the last ranks hold less.
    Everything is fp32.
    """
    states = 0
    for shape in trained:
        rows = shard_elements(shape[0], ranks)
        states += max(0, min(rows, shape[0] - rank * rows)) * math.prod(shape[1:])
    stored = row_elements(trained, ranks)
    return {
        "parameters": 4 * (stored + row_elements(frozen, ranks)),
        "gradients": 4 * stored,
        "optimizer": 4 * moments * states + SCALAR * len(trained),
    }


def gathered(units: Sequence[Sequence[Shape]], ranks: int, *, element: int = 4) -> int:
    """Bytes of the parameters that stage 3 has gathered while its largest unit computes.

    Args:
        units: shapes of the parameters of each unit, frozen ones too; the last one is the root,
            which stays gathered from its forward to its backward.
        element: bytes of what the model computes in.
    """
    *inner, root = (element * ranks * row_elements(unit, ranks) for unit in units)
    return root + max(inner, default=0)


def volume(buckets: Sequence[int], ranks: int, stage: int, micros: int = 1) -> int:
    """Elements that each rank sends in one step of `micros` micro-batches of stage 1 or 2.

    One gather of the parameters, and one reduce-scatter of the gradients: in stage 2 for each
    micro-batch, because nobody keeps whole gradients to add to.
    """
    once = sum((ranks - 1) * shard_elements(numel, ranks) for numel in buckets)
    return once * (1 + (micros if stage == 2 else 1))


def volume_rows(
    units: Sequence[Sequence[Shape]],
    ranks: int,
    micros: int = 1,
    *,
    frozen: Sequence[Shape] = (),
) -> int:
    """Elements that each rank sends in one step of stage 3: twice gathered, once reduced.

    Args:
        units: as for `gathered`; the root is gathered once.
        frozen: those of them that are not reduced.
    """
    sent = [(ranks - 1) * row_elements(unit, ranks) for unit in units]
    return micros * (3 * sum(sent) - sent[-1] - (ranks - 1) * row_elements(frozen, ranks))
