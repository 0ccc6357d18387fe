import random

import numpy as np
import pytest
import torch

from holdfast.checks import tinylm
from holdfast.errors import DoesNotFit, UsageError
from holdfast.plan.hardware import load_hardware
from holdfast.plan.length_aware import LengthAwareScheduler, PagedScheduler
from holdfast.plan.length_predictor import LengthPredictor
from holdfast.plan.selective_batching import SelectiveBatching, kv_bytes_per_token
from holdfast.plan.serving_sim import Job, ServingCost, simulate_serving

KV = 10


class Says:
    """Predicts the number that is a request's text."""

    def __init__(self):
        self.lessons = []

    def predict(self, texts):
        return [int(text) for text in texts]

    def partial_fit(self, texts, lengths):
        self.lessons.append((texts, lengths))


def scheduler(tokens, policy="dff", **options):
    return LengthAwareScheduler(tokens * KV, KV, Says(), policy, **options)


def ids(requests):
    return [request.id for request in requests]


def test_the_largest_that_fit_go_first_by_hand():
    s = scheduler(100)
    for name, prompt, reserve in (("a", 10, 20), ("b", 10, 60), ("c", 5, 45), ("d", 5, 15)):
        s.submit(name, prompt, 64, str(reserve))
    # b takes 70, c no longer fits, a takes the last 30.
    assert ids(s.admit().admitted) == ["b", "a"]
    assert s.reserved_bytes == 100 * KV and s.used_bytes == 20 * KV
    s.step()
    s.finish("a")
    # 30 are free again; c still does not fit.
    assert ids(s.admit().admitted) == ["d"]
    assert s.utilisation == (20 / 100, 100 / 100)


def test_fifo_keeps_the_order_of_arrival():
    s = scheduler(100, "fifo")
    for name, reserve in (("a", 20), ("b", 90), ("c", 10)):
        s.submit(name, 5, 100, str(reserve))
    assert ids(s.admit().admitted) == ["a"]
    s.step()
    s.finish("a")
    assert ids(s.admit().admitted) == ["b"]


def test_who_outgrows_a_reservation_is_preempted_and_gets_twice_the_room():
    s = scheduler(40)
    first = s.submit("a", 10, 100, "2")
    assert first.limit == 30  # what the budget can hold at all
    s.admit()
    s.step()
    s.step()
    assert s.admit().preempted == [first] and first.reserved == 4 and first.begun
    assert s.running == {"a": first}  # came back at once, there is room
    for _ in range(2):
        s.step()
    s.submit("b", 10, 20, "20")
    # Both wait for room; a alone fits first, being preempted before b is admitted.
    change = s.admit()
    assert ids(change.preempted) == ["a"] and ids(change.admitted) == ["b"]
    assert first.reserved == 8 and s.preemptions == 2


def serve(s, outputs, arrivals):
    """Run to the end; checks the invariants at every iteration. Longest wait of any request."""
    waits, since = [0], {}
    pending = sorted(range(len(outputs)), key=lambda i: arrivals[i])
    seen = {}
    while pending or s.busy:
        while pending and arrivals[pending[0]] <= s.iteration:
            i = pending.pop(0)
            prompt, output, says = outputs[i]
            seen[i] = s.submit(i, prompt, output, str(says))
            since[i] = s.iteration
        if not s.busy:
            s.iteration += 1
            continue
        change = s.admit()
        for request in change.preempted:
            since[request.id] = s.iteration
        for request in change.admitted:
            waits.append(s.iteration - since.pop(request.id))
        assert s.running, "somebody can always run"
        assert s.used_bytes <= s.reserved_bytes <= s.budget
        s.step()
        for request in list(s.running.values()):
            if request.produced == min(request.limit, outputs[request.id][1]):
                s.finish(request.id)
    assert [seen[i].produced for i in range(len(outputs))] == [
        min(output, s.room - prompt) for prompt, output, _ in outputs
    ]
    return max(waits)


@pytest.mark.parametrize("policy", ["dff", "fifo", "paged"])
@pytest.mark.parametrize("seed", range(8))
def test_never_above_the_budget_and_everybody_ends(policy, seed):
    rng = random.Random(seed)
    room = rng.choice([64, 200, 640])
    outputs = []
    for _ in range(60):
        output = min(room, int(rng.lognormvariate(3, 1)) + 1)
        says = output if rng.random() < 0.5 else rng.randint(1, room)
        outputs.append((rng.randint(1, room // 2), output, says))
    arrivals = [rng.randint(0, 200) for _ in outputs]
    if policy == "paged":
        s = PagedScheduler(room * KV, KV, block=8)
    else:
        s = scheduler(room, policy, patience=rng.choice([0, 20]))
    serve(s, outputs, arrivals)
    assert s.finished == 60 and s.reserved_bytes == 0


def test_all_need_growth_at_once():
    s = scheduler(40)
    outputs = [(8, 32, 2)] * 4
    serve(s, outputs, [0] * 4)
    # 2, 4, 8, 16, 32: four doublings each.
    assert s.preemptions == 16


def test_an_oracle_never_preempts():
    rng = random.Random(0)
    outputs = [(rng.randint(1, 30), n, n) for n in (rng.randint(1, 200) for _ in range(80))]
    s = scheduler(256)
    serve(s, outputs, [rng.randint(0, 100) for _ in outputs])
    assert s.preemptions == 0


@pytest.mark.parametrize("patience", [10, 10**9])
def test_a_stream_of_large_requests_cannot_starve_a_small_one(patience):
    s = scheduler(100, patience=patience)
    waited = None
    for i in range(400):
        # Two large ones are always there; together with either, the small one does not fit.
        while sum(r.id != "small" for r in (*s.waiting, *s.running.values())) < 2:
            s.submit(s.submitted, 10, 85, "85")
        if i == 5:
            s.submit("small", 10, 5, "5")
        if any(r.id == "small" for r in s.admit().admitted):
            waited = i - 5
        for request in s.step():
            s.finish(request.id)
    # A large one runs for 85 iterations, and one more has waited longer than the small one.
    assert (waited is not None and waited <= 2 * 85) if patience == 10 else waited is None


def test_a_prompt_beyond_the_budget_is_rejected_with_its_bytes():
    s = scheduler(100)
    with pytest.raises(DoesNotFit, match=r"'big'.*need 1010 bytes.*budget is 1000.*to 99 tokens"):
        s.submit("big", 100, 5, "5")
    assert not s.busy and s.submit("fits", 99, 5, "5").limit == 1
    paged = PagedScheduler(100 * KV, KV, block=16)
    with pytest.raises(DoesNotFit, match="to 95 tokens"):
        paged.submit("big", 96, 5)


def test_bad_calls_say_what_to_do():
    with pytest.raises(UsageError, match="budget=0 is not a positive integer"):
        LengthAwareScheduler(0, KV, Says())
    with pytest.raises(UsageError, match="unknown policy 'lifo'; nearest known: fifo"):
        scheduler(10, "lifo")
    s = scheduler(100)
    with pytest.raises(UsageError, match="0 prompt and 3 output tokens; both must be"):
        s.submit("a", 0, 3, "1")
    s.submit("a", 3, 3, "1")
    with pytest.raises(UsageError, match="'a' is here already"):
        s.submit("a", 3, 3, "1")
    with pytest.raises(UsageError, match="request 'a' is not running, only"):
        s.finish("a")
    s.admit()
    s.step()
    with pytest.raises(UsageError, match="outgrown its room; call admit"):
        s.step()
    s.cancel("a")
    assert not s.busy and s.finished == 0
    with pytest.raises(UsageError, match="'a' neither waits nor runs"):
        s.cancel("a")
    s.submit("b", 3, 1, "1")
    s.admit()
    assert ids(s.step()) == ["b"]
    with pytest.raises(UsageError, match="at its limit; finish it first"):
        s.admit()


def test_observed_lengths_are_taught_to_the_predictor():
    s = scheduler(100, retrain_every=2)
    for i, n in enumerate((3, 5, 4)):
        s.submit(i, 1, n, "9")
    s.admit()
    while s.busy:
        for request in s.step():
            s.finish(request.id)
    assert s.predictor.lessons == [(("9", "9"), (3, 4))]


COST = ServingCost(load_hardware("a100-80gb"), 10**9, KV)


def test_simulated_seconds_count_every_prediction_and_every_swap():
    jobs = [Job(10, 4, "4")] * 6
    plain = simulate_serving(jobs, scheduler(100), COST, max_output=50)
    late = simulate_serving(jobs, scheduler(100), COST, max_output=50, predictor_seconds=0.5)
    assert late.seconds == pytest.approx(plain.seconds + 3.0)
    assert plain.tokens == 24 and plain.latencies[0] <= plain.seconds
    short = [job._replace(text="2") for job in jobs]
    swapped = simulate_serving(short, scheduler(100), COST, max_output=50)
    # 12 tokens, away and back.
    again = 6 * 2 * COST.hardware.transfer_seconds(12 * KV, "device", "host")
    assert swapped.preemptions == 6 and swapped.seconds > plain.seconds + 0.9 * again


def test_reserving_less_serves_more():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(3, 1, 150), 1, 400).astype(int)
    jobs = [Job(16, int(n), str(n)) for n in lengths]
    longest = [job._replace(text="400") for job in jobs]
    rate = {
        name: simulate_serving(js, scheduler(2000), COST, max_output=400).throughput
        for name, js in (("oracle", jobs), ("max", longest))
    }
    assert rate["oracle"] > 3 * rate["max"]


WORDS = ["list", "name", "sum", "say", "tell", "compare", "essay", "explain", "story", "chapter"]


def prompts(count, seed):
    """Prompts whose first word gives the length away, among words that do not."""
    rng = np.random.default_rng(seed)
    cue = rng.integers(0, 10, count)
    noise = rng.integers(0, 200, (count, 8))
    texts = [
        f"Please {WORDS[c]} " + " ".join(f"w{n}" for n in row)
        for c, row in zip(cue, noise, strict=True)
    ]
    return texts, 100 * cue + rng.integers(1, 101, count)


def test_the_predictor_reads_cues():
    texts, lengths = prompts(400, 0)
    predictor = LengthPredictor(1000)
    assert predictor.predict(["anything"]) == [1000] and predictor.nbytes == 0
    predictor.fit(texts, lengths)
    texts, lengths = prompts(200, 1)
    right = predictor.bucket(predictor.predict(texts)) == predictor.bucket(lengths)
    assert right.mean() >= 0.9
    assert predictor.nbytes == 2 * 4097 * 10 * 4
    assert predictor.bucket([1, 100, 101, 1000, 5000]).tolist() == [0, 0, 1, 9, 9]


def test_the_predictor_goes_on_learning():
    predictor = LengthPredictor(1000).fit(["a long essay"] * 8, [950] * 8)
    assert predictor.predict(["a long essay"]) == [1000]
    for _ in range(30):
        predictor.partial_fit(["a long essay"] * 8, [50] * 8)
    assert predictor.predict(["a long essay"]) == [100]


def test_the_predictor_takes_any_encoder_and_refuses_nonsense():
    def encode(texts):
        return np.array([[len(text), 1.0] for text in texts]) / 10

    predictor = LengthPredictor(20, buckets=2, encode=encode)
    predictor.fit(["a", "a" * 20] * 20, [5, 15] * 20, epochs=50)
    assert predictor.predict(["a", "a" * 20]).tolist() == [10, 20]
    with pytest.raises(UsageError, match="2 texts and 1 lengths"):
        predictor.fit(["a", "b"], [1])
    with pytest.raises(UsageError, match="30 buckets of lengths up to 20"):
        LengthPredictor(20, buckets=30)


def llama(**options):
    # No end of sequence: lengths are those asked for.
    return tinylm.model(0, num_key_value_heads=2, **options).eval()


def alone(model, prompt, count):
    mask = torch.ones_like(prompt)[None]
    found = model.generate(
        prompt[None], attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return found[0, len(prompt) :].tolist()


def other(kind, **fields):
    from transformers import AutoConfig, AutoModelForCausalLM

    ends = {"bos_token_id": None, "eos_token_id": None, "initializer_range": 0.5}
    config = AutoConfig.for_model(kind, vocab_size=128, **fields, **ends)
    return AutoModelForCausalLM.from_config(config).eval()


MISTRAL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "sliding_window": 6,
}  # fmt: skip
MODELS = {
    "llama": llama,
    "gpt2": lambda: other("gpt2", n_embd=32, n_layer=2, n_head=4),
    "windowed": lambda: other("mistral", **MISTRAL),
}


@pytest.mark.parametrize("kind", MODELS)
def test_outputs_are_those_of_generation_alone_also_across_preemption(kind):
    model = MODELS[kind]()
    generator = torch.Generator().manual_seed(0)
    asked = [
        (torch.randint(128, (3 + 2 * i,), generator=generator), 2 + 5 * i % 17) for i in range(7)
    ]
    want = [alone(model, *request) for request in asked]
    kv = kv_bytes_per_token(model.config, torch.float32)
    s = LengthAwareScheduler(48 * kv, kv, Says())
    before = model.config._attn_implementation
    batching = SelectiveBatching(model, s, host_budget=2**20)
    for i, (prompt, count) in enumerate(asked):
        batching.submit(i, prompt, count, "3")
    swapped = 0
    while s.busy:
        batching.step()
        assert batching.device_bytes == s.reserved_bytes <= s.budget
        waiting = sum(kv * (r.held - 1) for r in s.waiting if r.begun)
        assert batching.host.resident_bytes == waiting
        swapped = max(swapped, waiting)
    assert [batching.outputs[i] for i in range(len(asked))] == want
    assert s.preemptions > 5 and swapped > 0
    batching.close()
    assert model.config._attn_implementation == before
    assert alone(model, *asked[0]) == want[0]


def test_a_request_ends_at_the_end_of_sequence_and_may_be_cancelled():
    model = llama()
    prompt = torch.arange(5)
    first, second = alone(model, prompt, 2)
    assert first != second
    model.generation_config.eos_token_id = second
    kv = kv_bytes_per_token(model.config, torch.float32)
    batching = SelectiveBatching(
        model, LengthAwareScheduler(100 * kv, kv, Says()), host_budget=2**20
    )
    batching.submit("a", prompt, 50, "50")
    batching.submit("b", prompt, 30, "30")
    batching.step()
    batching.cancel("b")
    assert batching.device_bytes == 55 * kv and batching.outputs["b"] == [first]
    assert batching.run()["a"] == [first, second]
    assert batching.device_bytes == 0 and batching.step() == {}


def test_the_driver_checks_the_bytes_per_token():
    model = llama()
    # 2 (keys and values) * 2 layers * 2 heads * 16 * 4 bytes
    assert kv_bytes_per_token(model.config, torch.float32) == 512
    with pytest.raises(UsageError, match=r"counts 10 bytes per token.*takes 512.*per_token=512"):
        SelectiveBatching(model, scheduler(100), host_budget=0)
    good = LengthAwareScheduler(512 * 100, 512, Says())
    capped = other("gemma2", **(MISTRAL | {"head_dim": 16}))
    with pytest.raises(UsageError, match="caps its attention logits"):
        SelectiveBatching(capped, good, host_budget=0)
    batching = SelectiveBatching(model, good, host_budget=0)
    with pytest.raises(UsageError, match=r"prompt is \(1, 5\); give the ids of one request"):
        batching.submit("a", torch.zeros(1, 5, dtype=torch.long), 3, "3")


def test_a_cache_of_fixed_size_takes_the_same_however_long_the_text():
    scheduler = LengthAwareScheduler(100, 1, LengthPredictor(4, buckets=1))
    for name in range(3):
        scheduler.submit(name, 1000, 50, size=40)
    assert [r.id for r in scheduler.admit().admitted] == [0, 1]
    assert scheduler.reserved_bytes == scheduler.used_bytes == 80
    # The second still reads its prompt: it has produced nothing, and nobody is preempted.
    for _ in range(49):
        assert scheduler.step(reading={1}) == [] and scheduler.admit() == ([], [])
    assert [r.id for r in scheduler.step(reading={1})] == [0]
    assert scheduler.running[1].produced == 0
    with pytest.raises(DoesNotFit, match="need 101 bytes"):
        scheduler.submit("large", 5, 5, size=101)
