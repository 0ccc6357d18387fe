"""Rounds of the engine, without HTTP: what runs together, what it holds, what failures do."""

import threading
import time

import pytest
import torch

from holdfast.context.attention import relay
from holdfast.context.cache.baselines import Full
from holdfast.context.cache.conformance import model, tokens
from holdfast.context.cache.policies import find
from holdfast.context.sampling import Sampler
from holdfast.context.stream import prefill_chunks, stream
from holdfast.errors import DoesNotFit, UsageError
from holdfast.serve import batching
from holdfast.serve.engine import Busy, Engine, Job, Stopped
from holdfast.serve.sizes import Sizes

UNIT = 2 * 2 * 2 * 8 * 4


class Run:
    """A job that notes what it is told."""

    def __init__(self, engine, ids, output=8, shared=0, on_token=None):
        self.tokens, self.reason, self.done = [], None, threading.Event()
        self.on_token = on_token
        self.job = Job(list(ids), output, Sampler(0.0), self._token, self._end, shared=shared)
        engine.submit(self.job)

    def _token(self, token):
        self.tokens.append(token)
        return bool(self.on_token and self.on_token(token))

    def _end(self, reason):
        self.reason = reason
        self.done.set()

    def wait(self):
        assert self.done.wait(30)
        return self.tokens


@pytest.fixture
def engine_of():
    """(net, units of budget, policy, **options) -> Engine that runs until the test ends."""
    engines = []

    def make(net, units, policy="full", ends=(), waiting=64, start=True, **options):
        options = {"prefix_budget": 0} | options
        engine = Engine(net, Sizes(net, units * UNIT, find(policy), **options), ends=ends,
                        waiting=waiting)  # fmt: skip
        engines.append(engine)
        if start:
            engine.start()
        return engine

    yield make
    for engine in engines:
        if engine.alive:
            engine.stop()


def alone(net, ids, new, policy="full", **options):
    options = {"tokens": len(ids) + new} | options
    cache = relay.BoundedCache.for_model(net, policy, batch=1, **options)
    logits = prefill_chunks(net, torch.tensor([ids]), cache)
    return [int(t) for t in stream(net, cache, logits, tokens=new)]


@pytest.mark.parametrize("policy", ["full", "sinks_recent", "random"])
def test_requests_that_decode_together_answer_as_they_do_alone(engine_of, policy, monkeypatch):
    net = model()
    sizes = {} if policy == "full" else {"tokens_per_request": 32}
    engine = engine_of(net, 1000, policy, start=False, **sizes)
    together, step = [], batching.step
    monkeypatch.setattr(
        batching, "step", lambda net, ids, *rest: together.append(len(ids)) or step(net, ids, *rest)
    )
    prompts = [tokens(1, 10 + 7 * i, seed=i)[0].tolist() for i in range(5)]
    runs = [Run(engine, ids, 30) for ids in prompts]
    engine.start()
    own = {"tokens": 32, "chunk": 8} if policy != "full" else {}
    for run, ids in zip(runs, prompts, strict=True):
        assert run.wait() == alone(net, ids, 30, policy, **own) and run.reason == "length"
    assert max(together) == 5
    assert engine.held_bytes == 0 and engine.counts["generated_tokens"] == 150


def test_a_shared_prefix_is_read_once_per_step(engine_of, monkeypatch):
    net = model()
    engine = engine_of(net, 1000, start=False, prefix_budget=200 * UNIT)
    rows, look = [], relay.SharedPrefix.look

    def counted(prefix, number, q, scaling):
        rows.append(q.shape[0])
        return look(prefix, number, q, scaling)

    monkeypatch.setattr(relay.SharedPrefix, "look", counted)
    system = tokens(1, 40)[0].tolist()
    prompts = [[*system, *tokens(1, 5, seed=i + 1)[0].tolist()] for i in range(4)]
    runs = [Run(engine, ids, 12, shared=40) for ids in prompts]
    engine.start()
    for run, ids in zip(runs, prompts, strict=True):
        assert run.wait() == alone(net, ids, 12)
    assert len(engine.prefixes) == 1 and max(rows) == 4
    # Two layers, some steps with all four: one read each, where there would be four.
    assert rows.count(4) >= 2 * 4
    assert engine.held_bytes == engine.prefixes.nbytes() == 40 * UNIT
    assert engine.counts["shared_prompt_tokens"] == 160


def test_prefixes_are_shared_where_a_policy_drops_other_tokens(engine_of):
    net = model()
    engine = engine_of(net, 1000, "sinks_recent", prefix_budget=200 * UNIT, tokens_per_request=64)
    system = tokens(1, 40)[0].tolist()
    runs = [Run(engine, [*system, i + 1, 2], 30 + 60 * i, shared=40) for i in range(2)]
    # The first keeps all of its own; the second, 90 tokens, all of the prefix and some of those.
    assert runs[0].wait() == alone(net, runs[0].job.ids, 30)
    assert runs[1].wait()[:30] == alone(net, runs[1].job.ids, 30)
    assert engine.counts["shared_prompt_tokens"] == 80 and len(runs[1].tokens) == 90


def test_who_outgrows_a_guess_goes_on_where_it_was(engine_of):
    net = model()
    engine = engine_of(net, 300, start=False)
    engine.scheduler.predictor.predict = lambda texts: [3] * len(texts)
    prompts = [tokens(1, 9, seed=i)[0].tolist() for i in range(3)]
    runs = [Run(engine, ids, 20) for ids in prompts]
    engine.start()
    for run, ids in zip(runs, prompts, strict=True):
        assert run.wait() == alone(net, ids, 20)
    assert engine.scheduler.preemptions >= 3 * 2


def test_bytes_never_exceed_the_budget_and_are_granted_before_they_are_taken(engine_of):
    net = model()
    # Each has a prefix of its own, for one of which there is room, and for three requests.
    engine = engine_of(net, 300, prefix_budget=35 * UNIT)
    runs = [Run(engine, tokens(1, 24 + i, seed=i)[0].tolist(), 20, shared=20) for i in range(12)]
    for run in runs:
        run.wait()
    assert 2 * 24 * UNIT < engine.peak_bytes <= engine.sizes.budget
    assert len(engine.prefixes) == 1


def test_ends_and_stops_and_cancels(engine_of):
    net = model()
    ids = tokens(1, 12)[0].tolist()
    want = alone(net, ids, 20)
    engine = engine_of(net, 300, ends={want[5]})
    until = want.index(want[5])
    run = Run(engine, ids, 20)
    assert run.wait() == want[:until] and run.reason == "stop"
    assert len(run.job.produced) == until + 1
    run = Run(engine, ids, 20, on_token=lambda _: True)
    assert run.wait() == want[:1] and run.reason == "stop"
    # Cancelled while it runs, and while it waits for room.
    other = engine_of(net, 300)
    first = Run(other, ids, 250, on_token=lambda _: time.sleep(0.01))
    second = Run(other, ids, 250)
    while not first.tokens:
        time.sleep(0.01)
    assert other.running == 1 and other.waiting == 1
    for run in (second, first):
        other.cancel(run.job)
        run.wait()
        assert run.reason == "cancelled" and len(run.tokens) < 200
    assert not second.tokens and other.held_bytes == 0


def test_a_request_that_fails_takes_no_other_along(engine_of, caplog):
    net = model()
    engine = engine_of(net, 300)
    ids = tokens(1, 12)[0].tolist()

    def fail(_):
        raise RuntimeError("no")

    runs = [Run(engine, ids, 20), Run(engine, ids, 20, on_token=fail), Run(engine, [999], 20)]
    assert runs[0].wait() == alone(net, ids, 20)
    for run in runs[1:]:
        run.wait()
        assert run.reason == "error"
    assert engine.held_bytes == 0 and "Traceback" in caplog.text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_an_engine_that_has_failed(engine_of):
    engine = engine_of(model(), 300, start=False)
    run = Run(engine, [1, 2, 3])
    engine.scheduler.admit = lambda: 1 / 0
    engine.start()
    run.wait()
    engine.stop()
    assert run.reason == "shutdown" and not engine.alive
    with pytest.raises(Stopped):
        Run(engine, [1, 2, 3])


def test_full_queues_and_stopping_engines_refuse(engine_of):
    net = model()
    ids = tokens(1, 12)[0].tolist()
    engine = engine_of(net, 300, waiting=2, start=False)
    runs = [Run(engine, ids, 4) for _ in range(2)]
    with pytest.raises(Busy, match="2 requests wait for room") as caught:
        Run(engine, ids, 4)
    assert 1 <= caught.value.retry_after <= 60 and engine.counts["refused"] == 1
    engine.start()
    runs[0].wait()
    long = Run(engine, ids, 250, on_token=lambda _: time.sleep(0.01))
    while not long.tokens:
        time.sleep(0.01)
    engine.stop()
    assert long.reason == "shutdown" and not engine.alive
    with pytest.raises(Stopped, match="shutting down"):
        Run(engine, ids, 4)


@pytest.mark.parametrize("shape", [{}, {"num_key_value_heads": 4}, {"num_hidden_layers": 1}])
def test_what_is_granted_is_never_less_than_what_a_cache_takes(shape):
    net = model(**shape)
    sizes = Sizes(net, 1 << 20, Full(), prefix_budget=0)
    for length in (*range(2, 140), *(2**n + more for n in range(8, 18) for more in (-1, 0, 1))):
        cache = sizes.cache(None, length)
        assert cache.capacity == length
        assert cache.peak_nbytes() <= sizes.tokens(length) * sizes.unit


def test_sizes_say_what_fits():
    net = model()
    sizes = Sizes(net, 1000 * UNIT, Full(), prefix_budget=0)
    assert sizes.size is None and UNIT <= sizes.unit < 1.05 * UNIT
    assert sizes.output(10, None, 400) == 400 and sizes.output(10, 502, 1) == 502
    with pytest.raises(UsageError, match="10 tokens of prompt and 503 of output are 513, at most"):
        sizes.output(10, 503, 1)
    with pytest.raises(DoesNotFit, match="one request needs"):
        Sizes(net, 20 * UNIT, Full(), prefix_budget=0)
    with pytest.raises(UsageError, match="leave tokens_per_request out"):
        Sizes(net, 1000 * UNIT, Full(), tokens_per_request=10)
    with pytest.raises(UsageError, match="for shared prefixes leave nothing"):
        Sizes(net, 1000 * UNIT, Full(), prefix_budget=1000 * UNIT)
    fixed = Sizes(net, 1000 * UNIT, find("sinks_recent"), prefix_budget=0)
    assert 8 * fixed.size * fixed.unit <= 1000 * UNIT < 9 * fixed.size * fixed.unit
    assert fixed.cache(None, 7).peak_nbytes() <= fixed.size * fixed.unit
    assert fixed.output(10_000, 5_000, 1) == 5_000
    # What a sliding window hides cannot be shared.
    assert Sizes(model("mistral"), 1000 * UNIT, Full()).registry() is None
