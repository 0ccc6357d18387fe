"""S³ (125): reserve KV memory for the output length that is predicted, not for the longest.

Keeps    of each running request its keys and values; of a preempted one too, on the host.
Form     one contiguous reservation of prompt + predicted output tokens.
Bytes    `kv_bytes_per_token` * (prompt + reserved), with 2*L*H*d*b bytes per token; the sum over
         running requests is at most `budget` at every iteration.
Source   Jin, Wu, Brooks, Wei, S³: Increasing GPU Utilization during Generative Inference for
         Higher Throughput, NeurIPS 2023.
Departs  who has waited `patience` iterations goes first, and nobody passes: the paper's largest
         first starves. An output is capped at what the whole budget can hold. Before a predictor
         has seen lengths it answers the longest one.
"""

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from holdfast.errors import DoesNotFit, UsageError, unknown
from holdfast.units import format_bytes

POLICIES = ("dff", "fifo")


class Predictor(Protocol):
    """What the scheduler asks: how many tokens a prompt's answer will have at most."""

    def predict(self, texts: Sequence[str]) -> Sequence[int] | np.ndarray: ...

    def partial_fit(self, texts: Sequence[str], lengths: Sequence[int]) -> object: ...


@dataclass(eq=False)
class Request:
    """One request; all counts are tokens.

    `limit` is the longest output that is asked for and fits the budget, `reserved` the output
    that has room now, `produced` the output so far. `begun` says that its prompt was read. `size`
    is what its cache takes where that does not grow with the text, else None.
    """

    id: Hashable
    prompt: int
    limit: int
    text: str
    reserved: int
    produced: int = 0
    preemptions: int = 0
    waiting_since: int = 0
    number: int = 0
    size: int | None = None

    @property
    def begun(self) -> bool:
        return self.produced > 0

    @property
    def held(self) -> int:
        return self.prompt + self.produced if self.size is None else self.size

    @property
    def capacity(self) -> int:
        return self.prompt + self.reserved if self.size is None else self.size


class Admission(NamedTuple):
    """What changes before an iteration: first `preempted` leave the device, then `admitted` come.

    An admitted request that has `begun` finds its keys and values on the host.
    """

    preempted: list[Request]
    admitted: list[Request]


class Batching:
    """Requests that wait and run under a budget of KV bytes; what every scheduler here shares."""

    def __init__(self, budget: int, kv_bytes_per_token: int):
        for what, value in (("budget", budget), ("kv_bytes_per_token", kv_bytes_per_token)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"{what}={value!r} is not a positive integer number of bytes")
        self.budget, self.kv_bytes_per_token = budget, kv_bytes_per_token
        self.room = budget // kv_bytes_per_token  # tokens
        self.waiting: list[Request] = []
        self.running: dict[Hashable, Request] = {}
        self.iteration = self.submitted = self.preemptions = self.finished = 0
        self._used = self._reserved = 0

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def used_bytes(self) -> int:
        """What running requests hold of what they have reserved."""
        return self.kv_bytes_per_token * sum(r.held for r in self.running.values())

    @property
    def reserved_bytes(self) -> int:
        return self.kv_bytes_per_token * sum(r.capacity for r in self.running.values())

    @property
    def utilisation(self) -> tuple[float, float]:
        """Mean fractions of the budget, over all iterations, that were used and reserved."""
        scale = max(1, self.iteration) * self.budget
        return self._used / scale, self._reserved / scale

    def _enter(
        self, id: Hashable, prompt: int, max_output: int, text: str, size: int | None = None
    ) -> Request:
        if prompt < 1 or max_output < 1:
            raise UsageError(
                f"request {id!r}: {prompt} prompt and {max_output} output tokens; both must be "
                "at least 1"
            )
        if id in self.running or any(r.id == id for r in self.waiting):
            raise UsageError(f"request {id!r} is here already; finish it or give another id")
        least = prompt + 1 if size is None else size
        if least > self.room:
            needed = least * self.kv_bytes_per_token
            error = DoesNotFit(
                f"request {id!r}: a prompt of {prompt} tokens and one of output need {needed} "
                f"bytes ({format_bytes(needed)}), the KV budget is {self.budget} bytes "
                f"({format_bytes(self.budget)}); shorten the prompt to {max(0, self.room - 1)} "
                "tokens"
            )
            error.details = {"needed_bytes": needed, "budget_bytes": self.budget}
            raise error
        limit = max_output if size is not None else min(max_output, self.room - prompt)
        request = Request(id, prompt, limit, text, reserved=limit, number=self.submitted, size=size)
        self.submitted += 1
        self._wait(request)
        return request

    def _wait(self, request: Request) -> None:
        request.waiting_since = self.iteration
        self.waiting.append(request)

    def _run(self, request: Request) -> None:
        self.waiting.remove(request)
        self.running[request.id] = request

    def _preempt(self, request: Request) -> None:
        del self.running[request.id]
        request.preemptions += 1
        self.preemptions += 1
        self._wait(request)

    def step(self, reading: Collection[Hashable] = ()) -> list[Request]:
        """An iteration has run: every running request has produced one token.

        Args:
            reading: ids of those that have not, because their prompt takes several iterations.

        Returns:
            Those that have produced all they may and must be finished, whatever the model says.
        """
        self._used += self.used_bytes
        self._reserved += self.reserved_bytes
        self.iteration += 1
        for request in self.running.values():
            if request.id in reading:
                continue
            if request.produced >= request.reserved:
                raise UsageError(
                    f"request {request.id!r} has outgrown its room; call admit() first"
                )
            request.produced += 1
        return [r for r in self.running.values() if r.produced >= r.limit]

    def finish(self, id: Hashable) -> Request:
        """A running request has ended: what it had reserved is free at once."""
        if id not in self.running:
            raise UsageError(f"request {id!r} is not running, only {[*self.running]} are")
        self.finished += 1
        return self.running.pop(id)

    def cancel(self, id: Hashable) -> Request:
        """Nobody wants a request any more, running or waiting; nothing is learnt from it."""
        found = self.running.pop(id, None) or next((r for r in self.waiting if r.id == id), None)
        if found is None:
            known = [*self.running, *(r.id for r in self.waiting)]
            raise UsageError(f"request {id!r} neither waits nor runs, only {known} do")
        if found in self.waiting:
            self.waiting.remove(found)
        return found


class LengthAwareScheduler(Batching):
    """Which requests run in each iteration, each within what was predicted for it.

    Call `admit` before and `step` after every iteration, and `finish` for those that ended. There
    are no threads and no tensors here; whoever calls from several threads holds a lock.

    Args:
        budget: bytes of keys and values on the device.
        kv_bytes_per_token: of all layers.
        predictor: asked once per request, and taught the lengths that were observed.
        policy: "dff" fills the budget with the largest waiting reservation that fits, then the
            next; "fifo" keeps the order of arrival.
        patience: iterations after which a waiting request goes before all younger ones, and room
            is saved until it fits.
        retrain_every: finished requests between two lessons to the predictor; 0 for none.
    """

    def __init__(
        self,
        budget: int,
        kv_bytes_per_token: int,
        predictor: Predictor,
        policy: str = "dff",
        *,
        patience: int = 512,
        retrain_every: int = 256,
    ):
        super().__init__(budget, kv_bytes_per_token)
        if policy not in POLICIES:
            raise unknown("policy", policy, POLICIES)
        if patience < 0 or retrain_every < 0:
            raise UsageError(f"{patience=} and {retrain_every=} must not be negative")
        self.predictor, self.retrain_every = predictor, retrain_every
        self.patience = 0 if policy == "fifo" else patience
        self._lesson: list[tuple[str, int]] = []
        self._settled = False  # nothing that waits can run before something changes

    def submit(
        self, id: Hashable, prompt: int, max_output: int, text: str = "", size: int | None = None
    ) -> Request:
        """Queue a request; its `limit` may be less than `max_output` where the budget is small.

        Args:
            size: tokens that its cache takes, however long the text; for caches that drop entries.

        Raises:
            DoesNotFit: the prompt and one token exceed the budget; the message has the bytes.
            UsageError: a count below 1, or an id that is here already.
        """
        request = self._enter(id, prompt, max_output, text, size)
        if size is None:
            predicted = int(self.predictor.predict([text])[0])
            request.reserved = min(request.limit, max(1, predicted))
        return request

    def admit(self) -> Admission:
        """Preempt who has used up a reservation, which doubles, then fill the budget.

        All that waits fits alone, and each reservation doubles at most log2(limit) times. So there
        is always somebody to run, and everybody ends.
        """
        preempted = [r for r in self.running.values() if r.produced >= r.reserved]
        for request in preempted:
            if request.produced >= request.limit:
                raise UsageError(f"request {request.id!r} is at its limit; finish it first")
            self._preempt(request)
            request.reserved = min(2 * request.reserved, request.limit)
        free, admitted = self.budget - self.reserved_bytes, []
        candidates = [] if self._settled else sorted(self.waiting, key=self._order)
        self._settled = True
        for request in candidates:
            needed = self.kv_bytes_per_token * request.capacity
            if needed <= free:
                self._run(request)
                admitted.append(request)
                free -= needed
            elif self._aged(request):
                break
        return Admission(preempted, admitted)

    def _wait(self, request: Request) -> None:
        super()._wait(request)
        self._settled = False

    def _aged(self, request: Request) -> bool:
        return self.iteration - request.waiting_since >= self.patience

    def _order(self, request: Request) -> tuple[int, int, int]:
        if self._aged(request):
            return 0, request.waiting_since, request.number
        return 1, -request.capacity, request.number

    def finish(self, id: Hashable) -> Request:
        request = super().finish(id)
        self._settled = False
        if self.retrain_every:
            self._lesson.append((request.text, request.produced))
            if len(self._lesson) >= self.retrain_every:
                self.predictor.partial_fit(*zip(*self._lesson, strict=True))
                self._lesson.clear()
        return request

    def cancel(self, id: Hashable) -> Request:
        self._settled = False
        return super().cancel(id)


class PagedScheduler(Batching):
    """The baseline of vLLM: first come first served, blocks of KV allocated as outputs grow.

    Nothing is reserved ahead but `watermark` of the budget. Where no block is free the youngest
    running request is swapped to the host.
    """

    def __init__(
        self, budget: int, kv_bytes_per_token: int, *, block: int = 16, watermark: float = 0.01
    ):
        super().__init__(budget, kv_bytes_per_token)
        self.block = block
        self._blocks = self.room // block
        self.room = self._blocks * block  # the last, partial block is never handed out
        self._spare = int(watermark * self._blocks)

    def submit(self, id: Hashable, prompt: int, max_output: int, text: str = "") -> Request:
        return self._enter(id, prompt, max_output, text)

    def _needed(self, request: Request) -> int:
        """Blocks for what it holds and one token more."""
        return -(-(request.held + 1) // self.block)

    def admit(self) -> Admission:
        preempted: list[Request] = []
        while sum(map(self._needed, self.running.values())) > self._blocks:
            youngest = max(self.running.values(), key=lambda r: r.number)
            self._preempt(youngest)
            preempted.append(youngest)
        free = self._blocks - sum(map(self._needed, self.running.values()))
        admitted: list[Request] = []
        for request in sorted(self.waiting, key=lambda r: r.number):
            needed = self._needed(request)
            if preempted or needed > free - (self._spare if self.running else 0):
                break
            self._run(request)
            admitted.append(request)
            free -= needed
        for request in self.running.values():
            request.reserved = self._needed(request) * self.block - request.prompt
        return Admission(preempted, admitted)
