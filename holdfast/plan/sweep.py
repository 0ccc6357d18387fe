"""What predicted steps are for: pick a plan by time and price, serve deadlines, size a model.

Everything here asks `VTrain` for the time of one step and does arithmetic with it. A price is
money per device and hour, in any currency.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from holdfast.errors import UsageError
from holdfast.plan.blocks import stacks_of
from holdfast.plan.step_graph import shard
from holdfast.plan.vtrain import ParallelPlan, Prediction, TrainConfig, VTrain

HOUR = 3600.0
# Loss of a model of N parameters after D tokens: E + A / N^alpha + B / D^beta. Hoffmann et al.,
# Training Compute-Optimal Large Language Models, 2022, third approach.
LOSS_E, LOSS_A, LOSS_ALPHA, LOSS_B, LOSS_BETA = 1.69, 406.4, 0.34, 410.7, 0.28


@dataclass(frozen=True)
class Priced:
    """A plan with its predicted step, what the whole run costs, and whether its bytes fit."""

    plan: ParallelPlan
    prediction: Prediction
    hours: float
    cost: float
    fits: bool

    def tokens_per_second(self, config: TrainConfig) -> float:
        return config.batch * config.sequence / self.prediction.time


def plans(
    config: TrainConfig,
    devices: int,
    *,
    micros: Sequence[int] = (1, 2, 4, 8),
    schedule: str = "1f1b",
) -> list[ParallelPlan]:
    """Every way to use all `devices`: degrees that suit the model, micro-batches, recomputing.

    Raises:
        UsageError: there is none.
    """
    stacks = stacks_of(config.source.build("meta"))
    depth = stacks[0].depth if len(stacks) == 1 else 1
    found = []
    for t in _divisors(devices):
        if not _splits(config, t):
            continue
        for p in _divisors(devices // t):
            d = devices // (t * p)
            for micro in micros:
                if p <= depth and config.batch % (d * micro) == 0:
                    found += [ParallelPlan(t, d, p, micro, schedule, r) for r in (False, True)]
    if not found:
        raise UsageError(
            f"no plan uses {devices} devices for a batch of {config.batch} and micro-batches of "
            f"{', '.join(map(str, micros))}; choose a batch that {devices} divides"
        )
    return found


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


def _splits(config: TrainConfig, t: int) -> bool:
    try:
        shard(config.source, t)
    except UsageError:
        return False
    return True


def sweep(
    vtrain: VTrain,
    config: TrainConfig,
    candidates: Iterable[ParallelPlan],
    *,
    price: float = 0.0,
    steps: int = 1,
    budget: int | None = None,
    tell: Callable[[ParallelPlan], None] = lambda plan: None,
) -> list[Priced]:
    """Predict every candidate: those that fit first, then by time.

    Args:
        price: of one device for one hour.
        steps: optimizer steps of the whole run.
        budget: bytes of one device; by default what the hardware has.
        tell: called with each plan before it is predicted.
    """
    room = vtrain.hardware.device.memory if budget is None else budget
    found = []
    for plan in candidates:
        tell(plan)
        prediction = vtrain.predict(config, plan)
        hours = prediction.time * steps / HOUR
        cost = hours * plan.devices * price
        found.append(Priced(plan, prediction, hours, cost, prediction.peak_bytes <= room))
    return sorted(found, key=lambda row: (not row.fits, row.prediction.time))


@dataclass(frozen=True)
class Sized:
    """A model trained for as long as the budget lasts; `tokens_at_peak` if devices never waited."""

    name: str
    parameters: int
    tokens: float
    loss: float
    tokens_at_peak: float
    loss_at_peak: float


def expected_loss(parameters: float, tokens: float) -> float:
    """Nats per token, by the scaling law of Hoffmann et al."""
    return LOSS_E + LOSS_A / parameters**LOSS_ALPHA + LOSS_B / tokens**LOSS_BETA


def compute_optimal(
    models: Mapping[str, tuple[int, float]], seconds: float, peak_flops: float
) -> list[Sized]:
    """Which model a time budget trains best, by the speed that each really reaches; best first.

    Args:
        models: name -> (parameters, tokens per second of its best plan).
        seconds: wall-clock of the whole run.
        peak_flops: of all devices together, for comparison: 6 FLOPs per parameter and token.
    """
    if not models or seconds <= 0:
        raise UsageError(f"{len(models)} models and {seconds} s; give at least one and some time")
    found = []
    for name, (parameters, rate) in models.items():
        tokens, ideal = rate * seconds, peak_flops * seconds / (6 * parameters)
        losses = expected_loss(parameters, tokens), expected_loss(parameters, ideal)
        found.append(Sized(name, parameters, tokens, losses[0], ideal, losses[1]))
    return sorted(found, key=lambda sized: sized.loss)


@dataclass(frozen=True)
class TrainJob:
    """A run that somebody waits for: `seconds` maps a number of devices to one step's time."""

    name: str
    seconds: Mapping[int, float]
    steps: int
    deadline: float
    arrival: float = 0.0

    def __post_init__(self):
        if not self.seconds or min(self.seconds) < 1 or self.steps < 1:
            raise UsageError(f"job {self.name} needs step times by devices and at least one step")

    def speed(self, devices: int) -> float:
        """Steps per second on at most so many devices."""
        return max((1 / s for n, s in self.seconds.items() if n <= devices), default=0.0)


@dataclass
class Outcome:
    """What became of a job; `end` is None where it was turned away."""

    name: str
    end: float | None = None
    device_seconds: float = 0.0
    left: float = field(default=0.0, repr=False)


def schedule_jobs(jobs: Sequence[TrainJob], devices: int) -> dict[str, Outcome]:
    """Share devices among jobs so that whoever is admitted meets its deadline.

    At each arrival and each end every running job gets the fewest devices with which it still ends
    in time, so a new one is admitted where its fewest are free too; it waits while that may yet
    happen. What is left over goes where a device saves most time. Elastic: jobs may grow and shrink
    at any event, at no cost.
    """
    outcomes = {job.name: Outcome(job.name, left=float(job.steps)) for job in jobs}
    if len(outcomes) < len(jobs):
        raise UsageError("two jobs have one name; names are unique")
    coming = sorted(jobs, key=lambda job: job.arrival)
    waiting: list[TrainJob] = []
    running: list[TrainJob] = []
    now = 0.0
    while coming or waiting or running:
        while coming and coming[0].arrival <= now:
            waiting.append(coming.pop(0))
        given: dict[str, int] = {}
        for job in running:
            fewest = _fewest(job, outcomes[job.name].left, now, devices)
            assert fewest is not None, "it had at least its fewest ever since it was admitted"
            given[job.name] = fewest
        for job in sorted(waiting, key=lambda job: job.deadline):
            fewest = _fewest(job, job.steps, now, devices)
            if fewest is None:
                waiting.remove(job)  # too late, even with everything
            elif fewest + sum(given.values()) <= devices:
                waiting.remove(job)
                running.append(job)
                given[job.name] = fewest
        _share_out(running, outcomes, given, devices)
        ends = [now + outcomes[j.name].left / j.speed(given[j.name]) for j in running]
        following = min([*ends, *(job.arrival for job in coming[:1])], default=None)
        if following is None:
            break
        for job, end in zip(list(running), ends, strict=True):
            outcome = outcomes[job.name]
            outcome.device_seconds += given[job.name] * (following - now)
            outcome.left -= (following - now) * job.speed(given[job.name])
            if end <= following:
                outcome.end, outcome.left = following, 0.0
                running.remove(job)
        now = following
    return outcomes


def _fewest(job: TrainJob, left: float, now: float, devices: int) -> int | None:
    """Fewest devices with which a job ends in time; None where even all are too few."""
    for n in sorted(job.seconds):
        # A job on its last moment must not fail by a rounding error.
        if n <= devices and left / job.speed(n) <= (job.deadline - now) * (1 + 1e-9) + 1e-9:
            return n
    return None


def _share_out(running, outcomes, given: dict[str, int], devices: int) -> None:
    while True:
        free = devices - sum(given.values())
        best, gain = None, 0.0
        for job in running:
            have, left = given[job.name], outcomes[job.name].left
            for n in sorted(job.seconds):
                if have < n <= have + free:
                    saved = (left / job.speed(have) - left / job.speed(n)) / (n - have)
                    if saved > gain:
                        best, gain = (job.name, n), saved
        if best is None:
            return
        given[best[0]] = best[1]
