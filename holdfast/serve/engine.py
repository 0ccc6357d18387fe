"""One thread that runs a model for all requests, within one budget of key-value bytes.

Each round reads one chunk of one prompt, then decodes one token of every request that has read its
prompt. Who runs is decided by the length-aware scheduler (125) before anything is allocated.
"""

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from holdfast.context.attention.relay import SharedPrefix
from holdfast.context.cache.bounded import BoundedCache
from holdfast.context.sampling import Sampler
from holdfast.context.stream import read
from holdfast.errors import DoesNotFit
from holdfast.plan.length_aware import LengthAwareScheduler, Request
from holdfast.plan.length_predictor import LengthPredictor
from holdfast.serve import batching
from holdfast.serve.sizes import Sizes
from holdfast.serve.unavailable import Busy, Stopped

Reason = Literal["stop", "length", "cancelled", "error", "shutdown"]
# Output tokens up to which lengths are predicted, and leading tokens that are worth sharing.
PREDICTED, WORTH_SHARING = 4096, 16

log = logging.getLogger("holdfast.serve")


@dataclass(eq=False)
class Job:
    """One request.

    Args:
        ids: of the prompt.
        output: tokens at most, as `Sizes.output` allows.
        sample: chooses tokens.
        on_token: called with each token in the engine's thread; True ends the request.
        on_end: called once, with the reason, in the engine's thread.
        text: of the prompt, from which the length of the output is guessed.
        shared: leading ids that other requests are likely to begin with, too.
    """

    ids: list[int]
    output: int
    sample: Sampler
    on_token: Callable[[int], bool]
    on_end: Callable[[Reason], None]
    text: str = ""
    shared: int = 0
    produced: list[int] = field(default_factory=list)
    prefix: SharedPrefix | None = None
    ended: bool = False
    request: Request | None = None
    cache: BoundedCache | None = None
    logits: Tensor | None = None
    unread: int = 0
    number: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def decoding(self) -> bool:
        return self.cache is not None and self.unread == 0

    def drop(self) -> None:
        """Free its keys and values, at once: a cache and its layers name each other."""
        if self.cache is not None:
            self.cache.layers.clear()
        self.cache = self.logits = None


class Engine:
    """Runs jobs; `submit` and `cancel` may be called from any thread.

    Args:
        ends: tokens that end an answer.
        waiting: how many requests may wait; more are refused.
    """

    def __init__(
        self, model: PreTrainedModel, sizes: Sizes, *, ends: Iterable[int] = (), waiting: int = 64
    ):
        self.model, self.sizes, self.ends, self.most_waiting = model, sizes, set(ends), waiting
        longest = min(PREDICTED, sizes.longest)
        predictor = LengthPredictor(longest, buckets=min(16, longest))
        self.scheduler = LengthAwareScheduler(sizes.for_requests, sizes.unit, predictor)
        self.prefixes = sizes.registry()
        self.counts: Counter[str] = Counter()
        # What others may read at any time; all else is the engine's thread's alone.
        self.held_bytes = self.reserved_bytes = self.shared_bytes = self.peak_bytes = 0
        self._jobs: dict[int, Job] = {}
        self._number = 0
        self._seconds: deque[float] = deque([1.0], maxlen=32)
        self._changed = threading.Condition()
        self._inbox: list[Job] = []
        self._gone: list[Job] = []
        self._stopping = False
        self._device = next(model.parameters()).device
        self._thread = threading.Thread(target=self._run, name="holdfast-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End all requests and the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    @property
    def waiting(self) -> int:
        return len(self._inbox) + len(self.scheduler.waiting)

    @property
    def running(self) -> int:
        return len(self.scheduler.running)

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises:
            Busy: as many wait as may wait.
            Stopped: no more requests are taken.
        """
        with self._changed:
            if self._stopping:
                raise Stopped("the server is shutting down; ask again later")
            if self.waiting >= self.most_waiting:
                self.counts["refused"] += 1
                recent = list(self._seconds)
                each = sum(recent) / len(recent)
                seconds = each * (self.waiting + 1) / max(1, self.running)
                raise Busy(
                    f"{self.waiting} requests wait for room in the context budget, no more may; "
                    "try again later",
                    max(1, min(60, math.ceil(seconds))),
                )
            self._inbox.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Nobody waits for it any more: its bytes are free after the current round."""
        with self._changed:
            if not job.ended:
                self._gone.append(job)
                self._changed.notify()

    def _run(self) -> None:
        try:
            while self._wait():
                self._round()
        finally:
            with self._changed:
                self._stopping = True
            for job in [*self._inbox, *self._jobs.values()]:
                self._end(job, "shutdown")

    def _wait(self) -> bool:
        """Until there is something to do; takes in what came and lets go of who left."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopping or self._inbox or self._gone or self.scheduler.busy
            )
            if self._stopping:
                return False
            inbox, self._inbox = self._inbox, []
            gone, self._gone = self._gone, []
        for job in inbox:
            self._guarded([job], lambda job=job: self._enter(job))
        for job in gone:
            self._end(job, "cancelled")
        return True

    def _guarded(self, jobs: list[Job], work: Callable[[], None]) -> None:
        """Whatever goes wrong for some requests, the others go on; the log has the traceback."""
        try:
            work()
        except Exception:
            log.exception("%d request(s) failed", len(jobs))
            for job in jobs:
                self._end(job, "error")

    def _enter(self, job: Job) -> None:
        self._number += 1
        job.number = self._number
        self._jobs[job.number] = job
        prefix = None if self.prefixes is None else self.prefixes.find(job.ids[:-1])
        if prefix is not None:
            self._hold(job, prefix)
        prompt = self.sizes.tokens(len(self._own(job)))
        job.request = self.scheduler.submit(
            job.number, prompt, job.output, job.text, self.sizes.size
        )

    def _own(self, job: Job) -> list[int]:
        """What is to be read of its own: after the prefix, and what it has produced so far."""
        return job.ids[0 if job.prefix is None else job.prefix.length :] + job.produced

    def _hold(self, job: Job, prefix: SharedPrefix) -> None:
        assert self.prefixes is not None
        self.prefixes.hold(prefix)
        if job.prefix is not None:
            self.prefixes.release(job.prefix)
        job.prefix = prefix

    def _round(self) -> None:
        change = self.scheduler.admit()
        for request in change.preempted:
            self._jobs[request.id].drop()
        for request in change.admitted:
            job = self._jobs[request.id]
            self._guarded([job], lambda job=job: self._begin(job))
        reading = [j for j in self._running() if j.cache is not None and j.unread]
        if reading:
            self._guarded(reading[:1], lambda: self._read_chunk(reading[0]))
        self._decode()
        self._count_bytes()

    def _count_bytes(self) -> None:
        """Keys and values of all requests and shared prefixes, now."""
        caches = [job.cache for job in self._jobs.values() if job.cache is not None]
        self.shared_bytes = 0 if self.prefixes is None else self.prefixes.nbytes()
        self.held_bytes = self.shared_bytes + sum(cache.nbytes() for cache in caches)
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        self.reserved_bytes = self.scheduler.reserved_bytes

    def _running(self) -> list[Job]:
        return [self._jobs[id] for id in self.scheduler.running]

    def _begin(self, job: Job) -> None:
        """A request was admitted: read what it shares if nobody has, and make its cache."""
        request = job.request
        assert request is not None
        known = 0 if job.prefix is None else job.prefix.length
        if self.prefixes is not None and job.shared >= max(WORTH_SHARING, known + 1):
            try:
                prefix = self.prefixes.add(job.ids[: job.shared], on_chunk=lambda _: self._decode())
                self._hold(job, prefix)
            except DoesNotFit:
                log.info("a shared prefix of %d tokens does not fit its budget", job.shared)
        own = self._own(job)
        room = len(own) + request.reserved - len(job.produced)
        cache = self.sizes.cache(job.prefix, room)
        granted = request.capacity * self.sizes.unit
        if cache.peak_nbytes() > granted:
            raise RuntimeError(f"a cache of {cache.peak_nbytes()} bytes was granted {granted}")
        if not job.produced:
            shared = 0 if job.prefix is None else job.prefix.length
            self.counts["prompt_tokens"] += len(job.ids)
            self.counts["shared_prompt_tokens"] += shared
        job.cache, job.unread, job.logits = cache, len(own), None

    def _read_chunk(self, job: Job) -> None:
        assert job.cache is not None
        own = self._own(job)
        start = len(own) - job.unread
        part = own[start : start + job.cache.chunk]
        ids = torch.tensor([part], device=self._device)
        with torch.no_grad():
            job.logits = read(self.model, ids, job.cache, before=job.logits)
        job.unread -= len(part)
        if not job.unread:
            self._guarded([job], lambda: self._choose([job]))

    def _decode(self) -> None:
        """One more token of every request that has read its prompt and has room for it."""
        jobs = [
            job for job in self._running()
            if job.decoding and job.produced and job.request.produced < job.request.reserved
        ]  # fmt: skip
        joined = [job for job in jobs if batching.can_join(job.cache)]
        groups = [joined] if joined else []
        groups += [[job] for job in jobs if job not in joined]
        for group in groups:
            self._guarded(group, lambda group=group: self._advance(group))

    def _advance(self, jobs: list[Job]) -> None:
        ids = torch.tensor([job.produced[-1] for job in jobs], device=self._device)
        before = torch.cat([job.logits for job in jobs])
        if len(jobs) == 1:
            with torch.no_grad():
                logits = read(self.model, ids[:, None], jobs[0].cache, before=before)
        else:
            logits = batching.step(self.model, ids, [job.cache for job in jobs], before)
        for job, own in zip(jobs, logits.split(1), strict=True):
            job.logits = own
        self._choose(jobs)

    def _choose(self, jobs: list[Job]) -> None:
        """Every job has logits of its next token: draw it, and end those that are complete."""
        ended: dict[Job, Reason] = {}
        for job in jobs:
            reason = self._draw(job)
            if reason is not None:
                ended[job] = reason
        mine = {job.request.id for job in jobs}
        others = [id for id in self.scheduler.running if id not in mine]
        for request in self.scheduler.step(reading=others):
            if request.id in mine:
                ended.setdefault(self._jobs[request.id], "length")
        for job, reason in ended.items():
            self._end(job, reason)

    def _draw(self, job: Job) -> Reason | None:
        """Its next token; why it was its last, or None."""
        try:
            token = int(job.sample(job.logits))
            job.produced.append(token)
            self.counts["generated_tokens"] += 1
            return "stop" if token in self.ends or job.on_token(token) else None
        except Exception:
            log.exception("a request did not take its token")
            return "error"

    def _end(self, job: Job, reason: Reason) -> None:
        if job.ended:
            return
        job.ended = True
        # Most was held just before.
        self._count_bytes()
        job.drop()
        if job.prefix is not None:
            self.prefixes.release(job.prefix)
        self._jobs.pop(job.number, None)
        self._count_bytes()
        request = job.request
        if request is not None:
            if reason in ("stop", "length"):
                self.scheduler.finish(request.id)
            else:
                self.scheduler.cancel(request.id)
        self.counts[f"ended_{reason}"] += 1
        self._seconds.append(time.monotonic() - job.started)
        try:
            job.on_end(reason)
        except Exception:
            log.exception("a request did not take its end")
