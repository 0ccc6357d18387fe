"""Simulated serving: how many tokens per second a scheduler lets one device produce.

Iterations are the events; each takes what a roofline says for reading weights and keys and values
and for computing its tokens, plus the copies of preempted requests and the predictor's latency.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from holdfast.plan.hardware import Hardware
from holdfast.plan.length_aware import LengthAwareScheduler, PagedScheduler


class Job(NamedTuple):
    """A request of a simulated day: what will be asked when, and how long the answer will be."""

    prompt: int
    output: int
    text: str = ""
    arrival: float = 0.0


@dataclass(frozen=True)
class ServingCost:
    """Seconds of an iteration by the roofline of `hardware`: weights and KV read, tokens computed.

    `parameters` counts weights, each of `bytes_per_parameter`; a multiply-add is 2 FLOPs.
    """

    hardware: Hardware
    parameters: int
    kv_bytes_per_token: int
    bytes_per_parameter: int = 2
    dtype: str = "bfloat16"

    def iteration(self, tokens: int, held: int) -> float:
        read = self.parameters * self.bytes_per_parameter + held * self.kv_bytes_per_token
        return self.hardware.seconds(2 * self.parameters * tokens, read, self.dtype)

    def swap(self, tokens: int, source: str, target: str) -> float:
        return self.hardware.transfer_seconds(tokens * self.kv_bytes_per_token, source, target)


@dataclass
class Served:
    """What a simulation found; `latencies` are seconds from arrival to the last token, by job."""

    seconds: float = 0.0
    tokens: int = 0
    preemptions: int = 0
    peak_reserved_bytes: int = 0
    peak_host_bytes: int = 0
    mean_batch: float = 0.0
    utilisation: tuple[float, float] = (0.0, 0.0)
    latencies: list[float] = field(default_factory=list)

    @property
    def throughput(self) -> float:
        """Output tokens per second."""
        return self.tokens / self.seconds


def simulate_serving(
    jobs: Sequence[Job],
    scheduler: LengthAwareScheduler | PagedScheduler,
    cost: ServingCost,
    *,
    max_output: int,
    predictor_seconds: float = 0.0,
) -> Served:
    """Serve `jobs` with a fresh scheduler; `predictor_seconds` delay all for each prediction."""
    result = Served(latencies=[0.0] * len(jobs))
    pending = deque(sorted(range(len(jobs)), key=lambda i: jobs[i].arrival))
    batch = 0
    while pending or scheduler.busy:
        while pending and (jobs[pending[0]].arrival <= result.seconds or not scheduler.busy):
            i = pending.popleft()
            result.seconds = max(result.seconds, jobs[i].arrival) + predictor_seconds
            scheduler.submit(i, jobs[i].prompt, max_output, jobs[i].text)
        preempted, admitted = scheduler.admit()
        reserved = scheduler.reserved_bytes
        assert scheduler.used_bytes <= reserved <= scheduler.budget
        result.peak_reserved_bytes = max(result.peak_reserved_bytes, reserved)
        result.seconds += sum(cost.swap(r.held, "device", "host") for r in preempted)
        result.seconds += sum(cost.swap(r.held, "host", "device") for r in admitted if r.begun)
        if preempted:
            away = sum(r.held for r in scheduler.waiting if r.begun) * scheduler.kv_bytes_per_token
            result.peak_host_bytes = max(result.peak_host_bytes, away)
        running = list(scheduler.running.values())
        tokens = sum(1 if r.begun else r.prompt for r in running)
        result.seconds += cost.iteration(tokens, sum(r.held for r in running))
        batch += len(running)
        must_end = {r.id for r in scheduler.step()}
        for request in running:
            i = int(request.id)  # type: ignore[call-overload]
            if request.produced == jobs[i].output or request.id in must_end:
                scheduler.finish(request.id)
                result.tokens += request.produced
                result.latencies[i] = result.seconds - jobs[i].arrival
    result.preemptions, result.utilisation = scheduler.preemptions, scheduler.utilisation
    result.mean_batch = batch / max(1, scheduler.iteration)
    return result
