"""IST: each step trains the adapters of a few drawn layers."""

import itertools
import json

import pytest
import torch
import transformers as hf

from holdfast.errors import UsageError
from holdfast.meter import Meter
from holdfast.plan import apply
from holdfast.plan.compose import Composer, Life
from holdfast.plan.family import UpdateCosts, trace_family
from holdfast.plan.file import Methods, PlanFile
from holdfast.plan.models import loss_of, resolve
from holdfast.plan.plan import Plan
from holdfast.training import adapters, checkpoint
from holdfast.training.adapters import base
from holdfast.training.adapters.ist import (
    METHOD,
    ImportanceSchedule,
    RandomSchedule,
    ScheduledOptimizer,
    adapter_layers,
    suppressed,
)
from holdfast.training.data import DataSource
from holdfast.training.run import Run, Settings
from holdfast.training.saved import saved_bytes

IDS = torch.arange(24).view(2, 12)


def llama(depth=4, **config):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    options = {"num_hidden_layers": depth, "use_cache": False, **sizes, **heads, **config}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**options)).train()


def adapted(depth=4, method="lora", **knobs):
    model = llama(depth)
    return adapters.attach(model, method, **({"rank": 2} if method == "lora" else {}), **knobs)


def optimizer_of(model, **knobs):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1, **knobs)


def train(model, optimizer, steps):
    for step in range(steps):
        loss = model((IDS + step) % 32, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model):
    return {name: t.clone() for name, t in adapters.adapter_state_dict(model).items()}


def test_all_layers_are_plain_lora_bitwise():
    plain, ours = adapted(), adapted()
    train(plain, optimizer_of(plain), 12)
    schedule = ImportanceSchedule(ours, k=4, every=3)
    train(ours, ScheduledOptimizer(optimizer_of(ours), schedule), 12)
    assert all(torch.equal(a, weights(plain)[n]) for n, a in weights(ours).items())


def test_resting_layers_do_not_move_by_momentum_or_decay():
    model = adapted()
    optimizer = optimizer_of(model)
    schedule = RandomSchedule(model, k=1, seed=3)
    names = list(schedule.layers)
    for _ in range(8):
        before = weights(model)
        (drawn,) = schedule.before_step()
        train(model, optimizer, 1)
        for name, after in weights(model).items():
            own = name.startswith(f"{names[drawn]}.")
            # B is zero, and A's gradient with it, until B has moved.
            moves = own and not (name.endswith("lora_A") and not before[name[:-1] + "B"].any())
            if moves or not own:
                assert torch.equal(after, before[name]) != own, name
        schedule.after_step()
        assert all(p.requires_grad for group in schedule.layers.values() for p in group)


def test_adapters_save_their_inputs_for_drawn_layers_alone():
    depth, rank, width, wide, tokens = 4, 2, 16, 24, IDS.numel()
    model = adapted(depth)
    schedule = RandomSchedule(model, k=1)
    kept = {}
    for drawn in ([0], [0, 2], [0, 1, 3], [0, 1, 2, 3]):
        schedule.draw = lambda drawn=drawn: drawn
        schedule.before_step()
        kept[len(drawn)] = saved_bytes(lambda: model(IDS).logits, model, [IDS])
    # Per layer: the inputs of q, k, v and of gate, up are one tensor each, o and down have their
    # own; x A^T for seven linears. The attention's output is kept by the attention as well.
    added = 4 * tokens * (width + width + wide + 7 * rank)
    assert [kept[k] - kept[1] for k in (2, 3, 4)] == [added, 2 * added, 3 * added]


def test_a_lowest_layer_that_rests_keeps_nothing_below_it():
    model = adapted(4)
    schedule = RandomSchedule(model, k=1)
    kept = []
    for drawn in range(4):
        schedule.draw = lambda drawn=drawn: [drawn]
        schedule.before_step()
        kept.append(saved_bytes(lambda: model(IDS).logits, model, [IDS]))
    assert kept == sorted(kept, reverse=True) and kept[3] < 0.6 * kept[0]


def test_draws_follow_softmax_without_replacement():
    schedule = RandomSchedule(adapted(3), k=2, seed=0)
    schedule.scores.copy_(torch.tensor([0.0, 1.0, 2.0]))
    counts = torch.zeros(3)
    for _ in range(4000):
        drawn = schedule.draw()
        assert len(set(drawn)) == 2
        counts[drawn] += 1
    p = schedule.scores.softmax(0)
    # First i, then j among the others.
    pair = p[:, None] * p / (1 - p[:, None])
    pair.fill_diagonal_(0)
    want = pair.sum(0) + pair.sum(1)
    torch.testing.assert_close(counts / 4000, want, atol=0.02, rtol=0)


@pytest.mark.parametrize("method", ["lora", "randlora", "peqa"])
def test_suppression_scales_what_the_adapter_adds(method):
    model = adapted(2, method).eval()
    train(model, optimizer_of(model), 2)
    linear = base.layers(model)["model.layers.1.self_attn.q_proj"]
    other = base.layers(model)["model.layers.0.self_attn.q_proj"]
    x = torch.randn(3, 16)
    before = weights(model)
    with torch.no_grad():
        full, untouched = linear(x), other(x)
        with suppressed(model, {"model.layers.1"}, 0.0):
            none = linear(x)
        with suppressed(model, {"model.layers.1"}, 0.25):
            quarter, same = linear(x), other(x)
    assert not torch.equal(full, none)
    torch.testing.assert_close(quarter, none + 0.25 * (full - none))
    assert torch.equal(same, untouched)
    assert all(torch.equal(t, before[n]) for n, t in weights(model).items())


def test_peft_adapters_are_drawn_and_suppressed():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, init_lora_weights=False))
    names = list(adapter_layers(model))
    assert names == [f"base_model.model.model.layers.{i}" for i in range(4)]
    schedule = ImportanceSchedule(model, k=2, every=1)
    optimizer = ScheduledOptimizer(optimizer_of(model), schedule)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        with_grad = [n for n, ps in schedule.layers.items() if any(p.grad is not None for p in ps)]
        assert len(with_grad) == 2
        optimizer.step()
        optimizer.zero_grad()
    assert schedule.scores.any()
    linear = model.base_model.model.model.layers[1].self_attn.q_proj
    x = torch.randn(3, 16)
    with suppressed(model, {names[1]}, 0.25):
        quarter = linear(x)
    bare = linear.base_layer(x)
    torch.testing.assert_close(quarter, bare + 0.25 * (linear(x) - bare))


def test_measuring_rewards_the_layer_that_matters_and_leaves_no_trace():
    model = adapted(4)
    schedule = ImportanceSchedule(model, k=1, every=1, candidates=4)
    with torch.no_grad():
        for group in schedule.layers.values():
            for parameter in group:
                parameter.normal_(std=0.1)
    sets = iter([[0], [1], [2], [3]])
    schedule.draw = lambda: next(sets)
    before, state = weights(model), torch.get_rng_state()
    key = "model.layers.2.mlp.down_proj.lora_B"
    target = before[key]

    def loss():
        return (adapters.adapter_state_dict(model)[key] - target).norm()

    schedule.measure(loss)
    assert schedule.scores.argmax() == 2
    assert schedule.scores.sum().abs() < 1e-4
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[n]) for n, t in weights(model).items())


def test_a_resumed_run_draws_on_bitwise(tmp_path):
    def start():
        model = adapted()
        return model, ScheduledOptimizer(
            optimizer_of(model), ImportanceSchedule(model, k=2, every=2)
        )

    whole, optimizer = start()
    train(whole, optimizer, 5)
    checkpoint.save(tmp_path, 5, whole, optimizer, {})
    train(whole, optimizer, 5)
    again, resumed = start()
    checkpoint.load(checkpoint.latest(tmp_path), again, resumed)
    train(again, resumed, 5)
    assert all(torch.equal(a, weights(whole)[n]) for n, a in weights(again).items())
    assert torch.equal(resumed.schedule.scores, optimizer.schedule.scores)


def test_evaluation_does_not_draw_and_micro_batches_share_a_draw():
    model = adapted()
    optimizer = ScheduledOptimizer(optimizer_of(model), ImportanceSchedule(model, k=1))
    state = optimizer.schedule.state_dict()["generator"]
    with torch.no_grad():
        model(IDS)
    model.eval()(IDS)
    assert torch.equal(optimizer.schedule.state_dict()["generator"], state)
    model.train()
    for _ in range(2):
        model(IDS, labels=IDS).loss.backward()
    with_grad = {n.split(".")[2] for n, p in model.named_parameters() if p.grad is not None}
    assert len(with_grad) == 1
    optimizer.remove()
    optimizer.step()
    model(IDS)
    assert all(p.requires_grad for ps in optimizer.schedule.layers.values() for p in ps)


@pytest.mark.parametrize(
    "knobs, message",
    [
        ({"k": 0}, "k=0 layers cannot be drawn from 4; use 1 to 4"),
        ({"k": 5}, "k=5"),
        ({"every": 0}, "every=0"),
        ({"beta": 1.0}, r"beta=1.0 is outside \[0, 1\)"),
        ({"candidates": 1}, "candidates=1"),
    ],
)
def test_bad_knobs(knobs, message):
    with pytest.raises(UsageError, match=message):
        ImportanceSchedule(adapted(), **knobs)


def test_bad_models():
    with pytest.raises(UsageError, match=r"lm_head.* no layer index"):
        RandomSchedule(_with_head(), 1)
    with pytest.raises(UsageError, match="nothing to train"):
        RandomSchedule(llama().requires_grad_(False), 1)
    schedule = ImportanceSchedule(adapted(), k=1, every=1)
    schedule.after_step()
    with pytest.raises(UsageError, match="step 1 measures"):
        schedule.before_step()
    assert "no adapter" in METHOD.applies(llama())
    assert "no layer index" in METHOD.applies(_with_head())


def _with_head():
    return adapters.attach(llama(), "lora", targets=["q_proj", "lm_head"], rank=2)


MODEL = {
    "model_type": "llama", "vocab_size": 32, "num_hidden_layers": 4, "hidden_size": 16,
    "intermediate_size": 24, "num_attention_heads": 2,
}  # fmt: skip


def spec_of(keep):
    return Methods(adapter={"lora": {"rank": 2}}, saved=[{"ist": {"keep": keep}}])


def predicted(spec):
    source = resolve(MODEL)
    family = trace_family(
        lambda: source.build("meta", torch.float32),
        lambda: source.example_inputs(2, 64, "cpu", torch.float32),
        lambda model: apply.prepare(model, spec),
        lambda model, inputs: loss_of(model(**inputs)),
        {"keep": lambda block: None},
        lambda flops, moved, dtype: 0.0,
    )

    def make(parameters):
        return apply.make_optimizer([(str(i), p) for i, p in enumerate(parameters)], spec, 1e-3, 0)

    costs = UpdateCosts(make, lambda flops, moved, dtype: 0.0)
    composer = Composer(family, Life(False, 1), costs)
    return composer.ledger(composer.uniform("keep"))


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_a_plan_predicts_the_peak_of_the_busiest_draw(keep):
    spec = spec_of(keep)
    source = resolve(MODEL)
    model = apply.prepare(source.build("cpu", torch.float32), spec)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = apply.make_optimizer(trained, spec, 1e-3, 0.0)
    optimizer = apply.wrap_optimizer(model, optimizer, spec)
    k = optimizer.schedule.k
    # Twice, because states of a layer appear when it is first drawn.
    draws = [list(d) for d in itertools.combinations(range(4), k)] * 2
    turns = itertools.cycle(draws)
    optimizer.schedule.draw = lambda: next(turns)
    optimizer.schedule.every = len(draws)  # one more step measures importance
    batch = source.example_inputs(2, 64, "cpu", torch.float32)
    peaks = []
    for _ in range(len(draws) + 1):
        with Meter(model, optimizer, inputs=batch) as meter:
            loss_of(model(**batch)).backward()
            optimizer.step()
            optimizer.zero_grad()
        peaks.append(meter.peak)
    half = len(draws) // 2
    assert max(peaks) == predicted(spec).peak()
    assert (min(peaks[half:]) < max(peaks)) == (k < 4)
    busiest = {tuple(d) for d, peak in zip(draws, peaks, strict=False) if peak == max(peaks)}
    assert all(0 in d for d in busiest) and (0, *range(5 - k, 4)) in busiest


def test_a_plan_without_an_adapter_is_refused():
    with pytest.raises(UsageError, match=r"ist does not apply.*no adapter"):
        apply.prepare(llama(), Methods(saved=[{"ist": {}}]))


def test_a_run_trains_within_the_predicted_bytes_and_exports_all_layers(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MODEL | {"vocab_size": 264}))
    (tmp_path / "text.txt").write_text(" ".join(f"{i} squared is {i * i}." for i in range(90)))
    spec = PlanFile(
        model=str(tmp_path / "config.json"), task="pretrain", sequence=16,
        budget={"device": 2**30}, methods=spec_of(0.5),
    )  # fmt: skip
    run = Run(
        Plan(spec), Settings(DataSource((str(tmp_path / "text.txt"),)), steps=12), tmp_path / "out"
    )
    report = run.run()
    assert report["steps"] == 12 and (tmp_path / "out" / "adapter_config.json").exists()
    moved = {n for n, t in weights(run.model).items() if n.endswith("lora_B") and t.any()}
    # Two of four layers a step, twelve times: more than two have trained.
    assert len({n.split(".")[2] for n in moved}) > 2
