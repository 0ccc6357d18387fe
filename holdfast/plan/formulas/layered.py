"""Bytes, traffic and the shortest training time of layered accumulation with modular pipelines.

After Lamy-Poirier, "Layered gradient accumulation and modular pipeline parallelism: fast and
efficient training of large language models", 2021; the critical batch after Kaplan et al., "Scaling
Laws for Neural Language Models", 2020.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from holdfast.errors import DoesNotFit, UsageError
from holdfast.plan.formulas.zero import shard_elements
from holdfast.units import format_bytes

# Bytes of a parameter with its gradient, and of Adam's states, in mixed precision.
COMPUTED, STATES = 4, 12
RECOMPUTED = 8  # FLOPs for a parameter and a token: 2 forward, 4 backward, 2 forward again
CRITICAL_TOKENS, CRITICAL_POWER = 2e8, 0.21


def boundaries(layer_bytes: Sequence[int], micros: int) -> int:
    """Bytes of the tensors between layers that wait at the turn from forward to backward.

    Args:
        layer_bytes: of each layer's input for one micro-batch; that of the first layer is the
            batch itself, which nobody has to keep.
    """
    return micros * sum(layer_bytes[1:])


def gathered(layers: Sequence[int], ranks: int) -> int:
    """Elements that a rank sends for gathers in a batch: each layer once in each direction.

    The last layer turns from forward to backward without being gathered again.
    """
    sent = [(ranks - 1) * shard_elements(numel, ranks) for numel in layers]
    return 2 * sum(sent) - sent[-1]


def bubble(stages: int, micros: int, layers: int, *, modular: bool) -> Fraction:
    """Idle time of a rank, relative to its work, where all layers take equally long.

    Contiguous stages fill in (d-1) stage times; modular ones, where layer l is on rank l mod d, in
    (d-1) layer times.

    Raises:
        UsageError: stages do not divide the layers, or a modular pipeline has fewer micro-batches
            than stages.
    """
    if stages < 1 or micros < 1 or layers % stages:
        raise UsageError(f"{layers} layers, {stages} stages, {micros} micro-batches do not divide")
    if not modular:
        return Fraction(stages - 1, micros)
    if micros < stages:
        raise UsageError(
            f"{micros} micro-batches do not keep {stages} modular stages busy; use {stages} or more"
        )
    return Fraction((stages - 1) * stages, micros * layers)


def critical_batch(loss: float) -> float:
    """Tokens of a batch above which more of them save few steps, at a loss in nats per token."""
    if not 0 < loss < math.inf:
        raise UsageError(f"loss={loss} is not a positive number of nats per token")
    return CRITICAL_TOKENS / loss ** (1 / CRITICAL_POWER)


@dataclass(frozen=True)
class Training:
    """What is to be trained, and on what.

    Args:
        parameters, layers, width: of the model.
        tokens: of the whole training.
        sequence: tokens of a micro-batch, which is one sequence.
        batch: most tokens in a batch, `critical_batch` for example.
        flops: that a device reaches.
        network: bytes/s that a device sends to others.
        memory: bytes of a device for model states.
        devices: most of them.
    """

    parameters: int
    layers: int
    width: int
    tokens: float
    sequence: int
    batch: float
    flops: float
    network: float
    memory: int
    devices: int


@dataclass(frozen=True)
class Way:
    """One way to train: degrees, durations and what one device holds.

    `state_bytes` are parameters, gradients and optimizer states; `boundary_bytes` the inputs of
    layers that wait for backward, which may lie in host memory.
    """

    layered: bool
    replicas: int
    stages: int
    micros: int
    seconds: float
    step_seconds: float
    bubble: float
    network_seconds: float
    state_bytes: int
    boundary_bytes: int

    @property
    def devices(self) -> int:
        return self.replicas * self.stages


def way(job: Training, replicas: int, stages: int, micros: int, *, layered: bool) -> Way:
    """Time and bytes of one choice of degrees.

    The layered way splits all states over replicas: parameters go over the network twice and
    gradients once, while all micro-batches compute. The other way splits what Adam keeps: both go
    once, while the last micro-batch runs backward. What a rank passes to the next stage overlaps.
    """
    share = job.parameters / stages
    work = RECOMPUTED * share * micros * job.sequence / job.flops
    idle = bubble(stages, micros, job.layers, modular=layered)
    sent = 2 * share * (replicas - 1) / replicas / job.network
    exposed = 3 * sent - work if layered else 2 * sent - work * 3 / 4 / micros
    boundary = 2 * job.sequence * job.width
    passes = job.layers // stages if layered else 1
    passed = 2 * boundary * micros * passes / job.network if stages > 1 else 0.0
    step = max(work * (1 + float(idle)), passed) + max(0.0, exposed)
    if layered:
        two_layers = 2 * COMPUTED * job.parameters / job.layers
        state = (COMPUTED + STATES) * share / replicas + two_layers
    else:
        state = (COMPUTED + STATES / replicas) * share
    return Way(
        layered=layered,
        replicas=replicas,
        stages=stages,
        micros=micros,
        seconds=step * math.ceil(job.tokens / (replicas * micros * job.sequence)),
        step_seconds=step,
        bubble=float(idle),
        network_seconds=max(0.0, exposed),
        state_bytes=math.ceil(state),
        boundary_bytes=boundary * micros * job.layers // stages,
    )


def shortest(job: Training, *, layered: bool) -> Way:
    """The way that takes least time; of equal ones, that with fewest devices.

    Raises:
        UsageError: not even one sequence fits into the batch.
        DoesNotFit: no way holds its states in a device's memory.
    """
    if job.batch < job.sequence:
        raise UsageError(
            f"a batch of {job.batch:.3g} tokens holds no sequence of {job.sequence}; lower "
            "the loss that the batch is critical for, or the sequence"
        )
    ways = [way(job, *degrees, layered=layered) for degrees in _degrees(job, layered)]
    fitting = [found for found in ways if found.state_bytes <= job.memory]
    if not fitting:
        raise DoesNotFit(
            f"model states need {format_bytes(min(w.state_bytes for w in ways))} on a device, it "
            f"has {format_bytes(job.memory)}; use more devices than {job.devices}"
        )
    return min(fitting, key=lambda found: (found.seconds, found.devices))


def _degrees(job: Training, layered: bool) -> Iterator[tuple[int, int, int]]:
    sequences = int(job.batch // job.sequence)
    for stages in (d for d in range(1, job.layers + 1) if job.layers % d == 0):
        if stages > job.devices:
            return
        for micros in _spread(stages if layered else 1, sequences):
            yield min(sequences // micros, job.devices // stages), stages, micros


def _spread(least: int, most: int) -> Iterator[int]:
    """Whole numbers, each at least a fiftieth larger than the one before."""
    while least <= most:
        yield least
        least = max(least + 1, math.ceil(least * 1.02))
